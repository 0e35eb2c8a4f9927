"""Step distillation: the student takes one step of the sampler where the dense model takes several.

    L = max(SNR, 1) ||x - x*||^2

x* is the image with which the student's one step ends where the teacher's `fold` steps do:
SnapFusion (Li et al., NeurIPS 2023, arXiv 2306.00980), eq. 7 to 9, after Salimans & Ho 2022 (arXiv
2202.00512). The paper's own loss beside it, weight `gamma` in eq. 11, is off here. No code was
published: which times are drawn (those that the student visits, evenly), that the teacher's images
are clipped where the track's sampler clips them, and flows, whose Euler steps are DDIM's, are this
suite's.
"""

from prunebench.recovery import Teaching
from prunebench.recovery.folding import folded
from prunebench.training.loop import Drawing

FAITHFUL_TO = "SnapFusion's paper"
TEACHER = True
FOLDS = True
BOUNDED = True


def loss(teaching: Teaching, fold: int = 2, gamma: float = 0.0) -> Drawing:
    """The error of the image that the student implies, weighted.

    Args:
        fold: the teacher's steps that are one of the student's.
        gamma: weight of the model's own loss, rescaled to the size of this one.
    """
    return folded(teaching, fold, gamma)
