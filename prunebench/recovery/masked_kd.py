"""TinyFusion's masked distillation: hidden states are compared without their massive activations.

    L = 0.9 L_KD + 0.1 L_own + beta (1 - done) L_rep
    L_rep = mean_k mean( (M_S h_S - M_T h_T)^2 ),   M = 1[ |h - mean(h)| < sigmas * std(h) ]

Fang et al., "TinyFusion: Diffusion Transformers Learned Shallow", CVPR 2025, arXiv 2412.01199, with
the weights and the decay of its published script (VainF/TinyFusion, train_masked_kd.py; beta 1e-2
for DiT, 2e-4 for SiT, to 0 over the training). Mean and std are of one image's whole hidden state;
student and teacher have masks of their own and nothing is rescaled. L_KD is MSE(student, teacher)
and, for a learned variance, the divergence of both steps. The script pairs the layers of halved
DiTs by hand; here every feature point is compared with its own, and the decay is per step, not per
epoch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from prunebench.recovery import Teaching
from prunebench.recovery.distillation import captured, surviving
from prunebench.training.loop import Batch, Loss, loss_of, outputs, prediction_of

FAITHFUL_TO = "the authors' code"
TEACHER = True


def loss(
    teaching: Teaching,
    own: float = 0.1,
    beta: float = 0.01,
    beta_flow: float = 0.0002,
    sigmas: float = 2.0,
) -> Loss:
    """Output distillation, the model's own loss and the masked hidden states' error.

    Args:
        own: weight of the model's own loss; that of the output's is 1 - own.
        beta, beta_flow: weight of the hidden states at the beginning, for noise and for flows.
        sigmas: an activation further from the mean than so many standard deviations is left out.
    """

    def value(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), captured(teaching.teacher, teaching.kept) as taught:
            lesson = outputs(teaching.teacher, batch)
        with captured(model, teaching.kept) as learnt:
            output = outputs(model, batch)
        start = beta_flow if batch.objective.name == "flow" else beta
        pairs = [(surviving(taught[n], kept), learnt[n]) for n, kept in teaching.kept.items()]
        hidden = sum(masked_error(*pair, sigmas) for pair in pairs) / max(1, len(pairs))
        return (
            (1 - own) * _output_error(output, lesson, batch)
            + own * loss_of(output, batch)
            + start * (1 - batch.done) * hidden
        )

    return value


def masked_error(teacher: Tensor, student: Tensor, sigmas: float) -> Tensor:
    """L_rep of one feature point, both [N, ...], []."""
    return mse_loss(usual(student.float(), sigmas), usual(teacher.detach().float(), sigmas))


def usual(hidden: Tensor, sigmas: float) -> Tensor:
    """`hidden` [N, ...] with 0 where it is `sigmas` standard deviations or more off its mean."""
    flat = hidden.detach().flatten(1)
    shape = (-1, *[1] * (hidden.dim() - 1))
    mean, spread = (v.view(shape) for v in (flat.mean(1), flat.std(1, correction=0)))
    return hidden * ((hidden - mean).abs() < sigmas * spread)


def _output_error(output: Tensor, lesson: Tensor, batch: Batch) -> Tensor:
    error = mse_loss(prediction_of(output, batch), prediction_of(lesson, batch))
    if output.shape[1] == batch.target.shape[1]:
        return error
    return error + batch.objective.variance_apart(output, lesson, batch.noised, batch.t)
