"""2ndMatch: the student's output is to change with its input as much as the dense model's does.

    L = MSE(student, target) + weight_kd * MSE(student, teacher)
        + weight / d * mean_b( ||J_S^T v||^2 - ||J_T^T v||^2 )^2

J is the Jacobian of the prediction by the noised image, v a random direction of unit length per
image, d the number of an image's entries. Zheng & Shlizerman, "2ndMatch: Finetuning Pruned
Diffusion Models via Second-Order Jacobian Matching", CVPR 2026, arXiv 2506.05398. Reconstruction:
the abstract and the code of the first version (FATE4869/IGSM-Official: losses, weights 1 and 0.1,
one direction) were read, the paper's text was not, nor any code of the final version. The script
sums squares over an image where this suite takes means: all terms are divided by d alike. Its
option to turn v along the teacher's dynamics is off in its own script and left out.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, normalize

from prunebench.recovery import Teaching
from prunebench.training.loop import Batch, Drawing, loss_of, outputs, prediction_of

FAITHFUL_TO = "abstract, the first version's code"
RECONSTRUCTION = True
TEACHER = True
DIRECTION = "direction"  # in `Batch.drawn`: v of every image, [N, C, H, W]


def loss(teaching: Teaching, weight: float = 0.1, weight_kd: float = 1.0) -> Drawing:
    """Own loss, output distillation and the error of ||J^T v||^2.

    Args:
        weight: of the Jacobian's term.
        weight_kd: of the output distillation.
    """

    def value(model: nn.Module, batch: Batch) -> Tensor:
        batch = replace(batch, noised=batch.noised.detach().requires_grad_(True))
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            lesson = prediction_of(outputs(teaching.teacher, batch), batch)
            taught = sensitivity(lesson, batch, create_graph=False)
            output = outputs(model, batch)
            learnt = sensitivity(prediction_of(output, batch), batch, create_graph=True)
        apart = (learnt - taught).square().mean() / batch.noised[0].numel()
        found = loss_of(output, batch) + weight * apart
        return found + weight_kd * mse_loss(prediction_of(output, batch), lesson.detach())

    return Drawing(value, _with_directions)


def sensitivity(prediction: Tensor, batch: Batch, create_graph: bool) -> Tensor:
    """||J^T v||^2 of every image, [N]; J by `batch.noised`, which the prediction depends on."""
    along = (prediction * batch.drawn[DIRECTION]).sum()
    (gradient,) = torch.autograd.grad(along, batch.noised, create_graph=create_graph)
    return gradient.flatten(1).square().sum(1)


def _with_directions(batch: Batch, generator: Generator) -> Batch:
    drawn = torch.randn(batch.noise.shape, generator=generator)
    unit = normalize(drawn.flatten(1), dim=1).view_as(drawn).to(batch.noise.device)
    return replace(batch, drawn={**batch.drawn, DIRECTION: unit})
