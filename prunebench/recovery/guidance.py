"""Predictions under classifier-free guidance, as the recoveries that are aware of it compare them.

    g_w = w f(c) - (w - 1) f(nothing)

SnapFusion (Li et al., NeurIPS 2023, arXiv 2306.00980), eq. 3 and 10; the same form for noise,
velocity and flows, and w = 1 is no guidance.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from prunebench.models.conditions import Conditions
from prunebench.training.loop import Batch, outputs, prediction_of

GUIDANCE = "guidance"  # in `Batch.drawn`: w of every image, [N]
Redraw = Callable[[Batch, Generator], Batch]


def guided(
    model: nn.Module, batch: Batch, conditions: Conditions | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The guided prediction [N, C, H, W], and all that the model puts out where it is not guided.

    Args:
        scale: w of every image, [N]; None for no guidance, which takes one pass instead of two.
    """
    output = outputs(model, batch)
    asked = prediction_of(output, batch)
    if scale is None:
        return asked, output
    return mixed(asked, unasked(model, batch, conditions), scale), output


def unasked(model: nn.Module, batch: Batch, conditions: Conditions) -> Tensor:
    """The prediction of a batch where nothing is asked, [N, C, H, W]."""
    nothing = replace(batch, y=conditions.nothing(batch.y, model))
    return prediction_of(outputs(model, nothing), batch)


def mixed(asked: Tensor, null: Tensor, scale: Tensor) -> Tensor:
    """g_w of both predictions; w = 1 gives the first to the last bit."""
    # In single precision: under autocast the predictions are in half, and lerp does not mix types.
    return torch.lerp(null.float(), asked.float(), scale.view(-1, 1, 1, 1))


def unchanged(batch: Batch, _: Generator) -> Batch:
    return batch


def sometimes(p: float, low: float, high: float) -> Redraw:
    """With probability p, one w from U[low, high] for a whole batch; else none."""

    def redraw(batch: Batch, generator: Generator) -> Batch:
        coin, place = torch.rand(2, generator=generator).tolist()
        if coin >= p:
            return batch
        scale = torch.full_like(batch.noise[:, 0, 0, 0], low + (high - low) * place)
        return replace(batch, drawn={**batch.drawn, GUIDANCE: scale})

    return redraw
