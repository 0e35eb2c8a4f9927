"""LAPTOP-Diff's normalised distillation: every feature point weighs the same, whatever its scale.

    L = MSE(student, target) + MSE(student, teacher)
        + sum_k mean_b( ||F_k^T - F_k^S||^2_b / ||F_k^T||^2_b )

Zhang et al., "LAPTOP-Diff", arXiv 2404.11098: each feature loss is weighted by the norm of the
teacher's features. Reconstruction: that the norm is squared and taken per sample, that the whole
feature term is not rescaled, and the unit weights of the other terms (BK-SDM's) are not from the
paper, of which this part was not available.
"""

from torch import Tensor

from prunebench.recovery import Teaching
from prunebench.recovery.distillation import distilled
from prunebench.training.loop import Loss

TEACHER = True
FAITHFUL_TO = "the paper's opening"
RECONSTRUCTION = True

SMALLEST = 1e-8  # of a squared norm: a teacher's feature that is all zero divides by this


def loss(teaching: Teaching) -> Loss:
    """Own loss + output distillation + sum of the feature points' relative errors."""
    return distilled(teaching, relative_error)


def relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the batch of the squared error over the teacher's squared norm, both [N, ...]."""
    teacher, student = teacher.detach().float().flatten(1), student.float().flatten(1)
    error = (teacher - student).square().sum(1)
    return (error / teacher.square().sum(1).clamp_min(SMALLEST)).mean()
