"""What planning knows of every model family without torch, one module each, named like the family.

Such a module holds

- `Config`, what `models.<name>.config` of a track may say: one typed field per key, with its range,
  and how keys must fit each other;
- `TINY`, small instances by name, on which tests and `prunebench check` try methods, recoveries and
  the family itself. Training one on a few hundred images must take seconds on one core.

The networks themselves are in `prunebench/models/<family>.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

# Far above every network that was ever trained: more is a slip of the keyboard.
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # channels, classes, features
Depth = Annotated[int, Field(ge=0, le=10_000)]  # blocks
Positive = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Takes:
    """What a network takes.

    Attributes:
        channels: of its images or latents, [channels, side, side].
        side: in pixels (of latents); None where any multiple of `multiple` will do.
        multiple: what sides must be a multiple of.
        classes: number of classes; None without.
        no_class: whether a class stands for "no class", which guidance and dropping classes need.
        learns_variance: whether it predicts the variance too.
        text: width of the tokens of the text that it reads; None where it reads none.
        pooled: width of the pooled text that it reads beside them; None without.
    """

    channels: int
    side: int | None = None
    multiple: int = 1
    classes: int | None = None
    no_class: bool = False
    learns_variance: bool = False
    text: int | None = None
    pooled: int | None = None


class Config(BaseModel):
    """The settings of a network, which a family's `build` turns into one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    def takes(self) -> Takes:
        """What a network of these settings takes."""
        raise NotImplementedError

    def small(self, channels: int, side: int, text: int) -> dict[str, object]:
        """Settings of a small network of the same kind, on which a track can be rehearsed.

        Args:
            channels, side: of its images or latents.
            text: width of each text encoder, where it reads text.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Instance:
    """One small model of a family with the objective it is for.

    Attributes:
        objective: as in a track.
        image: shape of its images; needed where `Config.takes` leaves the side open.
        texts: shape of every tensor that stands for one prompt, by name; None for a network that
            takes classes, or nothing.
    """

    family: str
    config: Mapping[str, object]
    objective: Mapping[str, object] = field(default_factory=lambda: {"name": "noise"})
    image: tuple[int, int, int] | None = None
    texts: Mapping[str, tuple[int, ...]] | None = None


def divides(other: str) -> AfterValidator:
    """The value, or each of a list, divides that of the key `other`, which stands before it."""

    def check(value: int | Sequence[int] | None, info: ValidationInfo) -> object:
        for whole in _each(info.data.get(other)):
            for part in _each(value):
                if whole % part:
                    raise ValueError(f"{part} does not divide {other}, which has {whole}")
        return value

    return AfterValidator(check)


def as_long_as(other: str) -> AfterValidator:
    """A list has as many entries as that of the key `other`; one value stands for all."""

    def check(value: object, info: ValidationInfo) -> object:
        wanted = info.data.get(other)
        if isinstance(value, list) and wanted is not None and len(value) != len(wanted):
            raise ValueError(f"has {len(value)} entries, {other} has {len(wanted)}")
        return value

    return AfterValidator(check)


def same_or_twice(other: str) -> AfterValidator:
    """The value is that of the key `other`, or twice that: channels that predict a variance too."""

    def check(value: int, info: ValidationInfo) -> int:
        own = info.data.get(other, value)
        if value not in (own, 2 * own):
            raise ValueError(f"{value} is neither {other}, {own}, nor twice that (a variance)")
        return value

    return AfterValidator(check)


def must(holds: Callable[[object], bool], otherwise: str) -> AfterValidator:
    """Refuses a value for which `holds` is false, saying why."""

    def check(value: object) -> object:
        if not holds(value):
            raise ValueError(f"{value} {otherwise}")
        return value

    return AfterValidator(check)


def _each(value: object) -> Sequence[int]:
    if value is None:
        return ()
    return value if isinstance(value, list) else (value,)
