"""What a track may set of a sampler: the base of the options that samplers define."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """What a track may set under `sampling.options`: one typed field each, with its range."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    def refusal(self, steps: int, train_steps: int | None) -> str | None:
        """Why so many steps can't be taken with these options, beginning with the key that is to
        be changed (of `sampling`); None where they can.

        Args:
            train_steps: number of times that the objective has; None for flows.
        """
        return None

    def reads_variance(self) -> bool:
        """Whether the sampler uses the variance that a network predicts beside the noise."""
        return False
