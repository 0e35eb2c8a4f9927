"""Cells: what a benchmark measures, one row of a leaderboard and one seed each."""

from dataclasses import asdict, dataclass

UNPRUNED = ("none", "steps")  # kinds of methods that only show the dense model
RECIPE = "recipe"  # the recovery that stands for each method's own
# Axes of a cell that have a folder only where a track has several values of them.
AXES = ("dense_seed", "precision", "sampling")
PRECISIONS = ("fp32", "bf16", "int8")  # the most precise first, which others are compared with
DEFAULT = "default"  # the sampling that a model's own `sampling` is


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: a row of the leaderboard and the seeds of one repetition.

    Attributes:
        dense_seed: of the dense model's training.
        precision: of the network when it is sampled and timed; one of PRECISIONS.
        sampling: what it is sampled by: DEFAULT, or a name in the model's `samplings`.
        seed: of everything that is drawn after that training.
    """

    track: str
    model: str
    dense_seed: int = 0
    method: str
    sparsity: float
    recovery: str
    precision: str = PRECISIONS[0]
    sampling: str = DEFAULT
    seed: int

    @property
    def budget(self) -> str:
        return self.recovery.rpartition("-")[2]

    @property
    def by_recipe(self) -> bool:
        """Whether the cell runs its method's own recipe instead of the matched one."""
        return self.recovery.rpartition("-")[0] == RECIPE


def as_dict(cell: Cell) -> dict:
    return asdict(cell)
