"""Scores of channels from values of weights, shared by the methods that prune widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunebench.errors import CellError
from prunebench.pruning.units import Width

if TYPE_CHECKING:
    from prunebench.selection import Context

STOPS = ("before", "after")


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions: what channel scores are made of."""
    return _weights(model, nn.Linear | nn.Conv2d)


def group_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales (gamma) of the group normalisations, [C] each."""
    return _weights(model, nn.GroupNorm)


def _weights(model: nn.Module, kinds: type) -> dict[str, nn.Parameter]:
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight is not None
    }


def slices(unit: Width, values: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """What each channel of a width holds in every tensor of `values`: (tensor, axis) -> [size, k].

    Args:
        values: one tensor per parameter name (of its shape), for the parameters that take part.
    """
    found = {}
    for member in unit.members:
        if member.tensor in values:
            value = values[member.tensor]
            rows = value.index_select(member.axis, member.index.flatten().to(value.device))
            found[member.tensor, member.axis] = rows.movedim(member.axis, 0).reshape(unit.size, -1)
    return found


def per_channel(
    unit: Width, values: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean over the layers of a group of `reduce` over each channel's slice, [size].

    Args:
        values: one tensor per weight (of its shape), for the weights that take part.
        reduce: maps [size, k], a channel's k values in one layer, to [size].

    Divided by its mean over the channels, so that groups compare (torch-pruning's normalisation).
    """
    score = torch.stack([reduce(rows) for rows in slices(unit, values).values()]).mean(0)
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)


def taylor_terms(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """w * gradient of every weight that has one: the first-order Taylor term of setting it to 0."""
    return {
        name: weight.detach() * weight.grad
        for name, weight in weights.items()
        if weight.grad is not None
    }


def accumulate_gradients(
    context: Context, timesteps: int, batch: int, threshold: float = 0.0, stop: str = "before"
) -> int:
    """Sum the loss's gradients over ascending times into `.grad` of `context.model`.

    Diff-Pruning's accumulation (Fang et al. 2023, `ddpm_exp/prune.py`): one batch of images and one
    noise for all times, no averaging. It ends at the first time whose loss is below `threshold`
    times the largest loss so far.

    Args:
        timesteps: number of evenly spaced times, from clean to noisy.
        batch: images.
        threshold: in [0, 1]; 0 never ends it, because a loss is not negative.
        stop: "before" leaves the gradient of the time that ends it out, "after" takes it in.

    Returns:
        The number of times whose gradients were summed.

    Raises:
        CellError: `threshold` or `stop` is none of these.
    """
    if not 0 <= threshold <= 1 or stop not in STOPS:
        raise CellError(f"threshold {threshold} must be in [0, 1] and stop '{stop}' one of {STOPS}")
    (calibration,) = context.draws(batch, batch)
    context.model.zero_grad()
    highest, used = 0.0, 0
    for t in context.data.objective.grid(timesteps):
        loss = context.loss(context.model, context.at_time(calibration, t))
        highest = max(highest, loss.item())
        ends = loss.item() < threshold * highest
        if ends and stop == "before":
            break
        loss.backward()
        used += 1
        if ends:
            break
    return used
