"""The plan: a small, readable, immutable description of what a dense model loses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from prunebench.errors import CellError


@dataclass(frozen=True)
class Plan:
    """What a method decided to remove.

    Attributes:
        layers: names of bypassed layers.
        copies: names of layers that run once more right behind themselves, with weights of their
            own; a name may stand several times.
        kept: for each width that shrinks, the channel, head or neuron indices that stay; none, for
            a width that may be empty.
        masks: for each masked weight, a boolean tensor of its shape, True where a weight stays.
        pattern: how masks came about: "unstructured" or "N:M", e.g. "2:4" (N of M stay); or
            "uniform" where every width lost the same share of its channels.
        steps: fraction of the sampling steps that stays.
        notes: what the method wants on record (scores, votes, the timestep it stopped at).
    """

    layers: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
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
        names = {name: list(getattr(self, name)) for name in ("layers", "copies")}
        kept = {name: list(indices) for name, indices in self.kept.items()}
        others = {"pattern": self.pattern, "steps": self.steps, "notes": dict(self.notes)}
        return {**names, "kept": kept, **others}

    def joined(self, other: "Plan") -> "Plan":
        """What both plans do, one beside the other; notes of equal name are the other's.

        Raises:
            CellError: both shrink one width, mask one weight, leave out steps, or have a pattern.
        """
        for what in ("kept", "masks"):
            if twice := sorted(set(getattr(self, what)) & set(getattr(other, what))):
                raise CellError(f"two plans can't be joined: both change '{twice[0]}'")
        if (self.pattern and other.pattern) or (self.steps != 1 and other.steps != 1):
            raise CellError("two plans can't be joined: both have a pattern, or leave out steps")
        return Plan(
            tuple(sorted({*self.layers, *other.layers})),
            (*self.copies, *other.copies),
            {**self.kept, **other.kept},
            {**self.masks, **other.masks},
            self.pattern or other.pattern,
            self.steps * other.steps,
            {**self.notes, **other.notes},
        )

    @classmethod
    def from_json(cls, content: dict, masks: Mapping[str, Tensor] = MappingProxyType({})) -> "Plan":
        kept = {name: tuple(indices) for name, indices in content["kept"].items()}
        names = {name: tuple(content.get(name, ())) for name in ("layers", "copies")}
        return cls(**{**content, **names, "kept": kept}, masks=masks)
