"""Cells: what a benchmark measures, one row of a leaderboard and one seed each."""

from dataclasses import asdict, dataclass

REFERENCES = ("none", "steps")  # kinds of methods that only show the dense model
PUBLISHED = "published"  # the recovery that stands for each method's own recipe


@dataclass(frozen=True)
class Cell:
    """One measurement: a row of the leaderboard and a seed."""

    track: str
    model: str
    method: str
    sparsity: float
    recovery: str
    seed: int

    @property
    def budget(self) -> str:
        return self.recovery.rpartition("-")[2]

    @property
    def published(self) -> bool:
        """Whether the cell runs its method's own recipe instead of the matched one."""
        return self.recovery.rpartition("-")[0] == PUBLISHED


def as_dict(cell: Cell) -> dict:
    return asdict(cell)
