"""Scores of channels from values of weights, shared by the methods that prune widths."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from prunebench.pruning.units import Width


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions: what channel scores are made of."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
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
