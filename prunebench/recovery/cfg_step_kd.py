"""Step distillation that is aware of guidance: sometimes teacher and student are compared guided.

    L = L_dstl + gamma * sg(L_dstl / L_ori) * L_ori

L_dstl is that of `step_kd`; with probability p, drawn per batch, every prediction in it is guided
by one w ~ U[low, high], common to teacher and student. SnapFusion (Li et al., NeurIPS 2023, arXiv
2306.00980), eq. 10 and 11, with the paper's p, gamma and range. The formula by which L_ori is
rescaled is not printed there; this one, and that L_ori is taken at the same input, is assumed.
"""

from prunebench.recovery import Teaching
from prunebench.recovery.folding import folded
from prunebench.recovery.guidance import sometimes
from prunebench.training.loop import Drawing

FAITHFUL_TO = "SnapFusion's paper"
RECONSTRUCTION = True
TEACHER = True
GUIDES = True
FOLDS = True
BOUNDED = True


def loss(
    teaching: Teaching,
    fold: int = 2,
    gamma: float = 0.2,
    p: float = 0.1,
    low: float = 2.0,
    high: float = 14.0,
) -> Drawing:
    """As `step_kd`, guided in a share p of the batches.

    Args:
        fold: the teacher's steps that are one of the student's.
        gamma: weight of the model's own loss, rescaled to the size of the other.
        low, high: the range of the guidance w.
    """
    return folded(teaching, fold, gamma, sometimes(p, low, high))
