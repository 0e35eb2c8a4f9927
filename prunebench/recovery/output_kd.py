"""Output distillation: the model's own loss, and the teacher's prediction as a second target.

    L = MSE(student, target) + MSE(student, teacher)

The first two terms of BK-SDM (Kim et al., ECCV 2024, arXiv 2305.15798), both with weight 1 as in
the authors' script. Student and teacher see the same noised images, times and classes.
"""

from prunebench.recovery import Teaching
from prunebench.recovery.distillation import distilled
from prunebench.training.loop import Loss

TEACHER = True
FAITHFUL_TO = "the authors' code"


def loss(teaching: Teaching) -> Loss:
    """Own loss + output distillation."""
    return distilled(teaching)
