"""BK-SDM's distillation and, in some batches, the guided prediction of the dense model as a target.

    L = MSE(student, target) + MSE(student, teacher) + sum_k MSE(F_k^S, F_k^T)
        + weight * MSE(g_w^S, g_w^T)                        g_w = w f(c) - (w - 1) f(nothing)

The last term has probability p and one w ~ U[low, high], both drawn per batch. With d = student -
teacher it is ||w d(c) - (w - 1) d(nothing)||^2: it asks both errors to be alike, which the other
terms do not. Reconstruction of the CFG-aware retraining loss of "Improved Techniques for Training
Smaller and Faster Stable Diffusion" (Wang & Wang, ICLR 2025 DeLTa workshop), of which only the
abstract was available: that there is such a loss is the paper's; its form (SnapFusion's, by the
same last author), the range, p and the weights are assumed.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from prunebench.recovery import Teaching
from prunebench.recovery.distillation import captured, with_features
from prunebench.recovery.guidance import GUIDANCE, mixed, sometimes, unasked
from prunebench.training.loop import Batch, Drawing, loss_of, outputs, predict, prediction_of

FAITHFUL_TO = "abstract"
RECONSTRUCTION = True
TEACHER = True
GUIDES = True


def loss(
    teaching: Teaching,
    p: float = 0.5,
    low: float = 2.0,
    high: float = 14.0,
    weight: float = 1.0,
    features: bool = True,
) -> Drawing:
    """Own loss + output and feature distillation + the guided predictions' error.

    Args:
        p: share of the batches that compare guided predictions, with two more passes each.
        low, high: the range of the guidance w.
        weight: of that term.
        features: whether features are compared.
    """
    points = teaching.kept if features else {}

    def value(model: nn.Module, batch: Batch) -> Tensor:
        scale = batch.drawn.get(GUIDANCE)
        with torch.no_grad(), captured(teaching.teacher, points) as taught:
            asked = predict(teaching.teacher, batch)
        with captured(model, points) as learnt:
            output = outputs(model, batch)
        own = prediction_of(output, batch)
        found = loss_of(output, batch) + mse_loss(own, asked)
        found = with_features(found, points, taught, learnt, mse_loss)
        if scale is None:
            return found
        with torch.no_grad():
            lesson = mixed(asked, unasked(teaching.teacher, batch, teaching.conditions), scale)
        guess = mixed(own, unasked(model, batch, teaching.conditions), scale)
        return found + weight * mse_loss(guess, lesson)

    return Drawing(value, sometimes(p, low, high))
