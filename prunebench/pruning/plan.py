"""The plan: a small, readable, immutable description of what is gone from a dense model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What a method decided to remove.

    Attributes:
        layers: names of bypassed layers.
        kept: for each width that shrinks, the channel, head or neuron indices that stay; none, for
            a width that may be empty.
        masks: for each masked weight, a boolean tensor of its shape, True where a weight stays.
        pattern: how masks came about: "unstructured" or "N:M", e.g. "2:4" (N of M stay); or
            "uniform" where every width lost the same share of its channels.
        steps: fraction of the sampling steps that stays.
        notes: what the method wants on record (scores, votes, the timestep it stopped at).
    """

    layers: tuple[str, ...] = ()
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    pattern: str | None = None
    steps: float = 1.0
    notes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kept", "masks", "notes"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def to_json(self) -> dict:
        """Everything but the masks, which are tensors and are stored beside it."""
        plain = {name: getattr(self, name) for name in ("layers", "pattern", "steps")}
        kept = {name: list(indices) for name, indices in self.kept.items()}
        return {**plain, "layers": list(self.layers), "kept": kept, "notes": dict(self.notes)}

    @classmethod
    def from_json(cls, content: dict, masks: Mapping[str, Tensor] = MappingProxyType({})) -> "Plan":
        kept = {name: tuple(indices) for name, indices in content["kept"].items()}
        return cls(**{**content, "layers": tuple(content["layers"]), "kept": kept}, masks=masks)
