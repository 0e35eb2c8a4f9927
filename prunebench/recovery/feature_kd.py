"""BK-SDM's distillation: own loss, the teacher's prediction, and the plain sum of feature losses.

    L = MSE(student, target) + MSE(student, teacher) + sum_k MSE(F_k^S, F_k^T)

Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", ECCV 2024, arXiv
2305.15798. MSE is a mean over one feature map, the sum is over feature points, every weight is 1,
as in the authors' script. The sum is dominated by the points with the numerically largest features.
"""

from torch.nn.functional import mse_loss

from prunebench.recovery import Teaching
from prunebench.recovery.distillation import distilled
from prunebench.training.loop import Loss

TEACHER = True
FAITHFUL_TO = "the authors' code"


def loss(teaching: Teaching) -> Loss:
    """Own loss + output distillation + sum of the feature points' mean squared errors."""
    return distilled(teaching, mse_loss)
