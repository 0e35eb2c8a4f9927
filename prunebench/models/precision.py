"""Denoisers whose weights are in half precision take and return single precision.

So images, losses, scores and samplers are in single precision whatever the weights are in.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunebench.models.conditions import Condition, each

HALF = (torch.bfloat16, torch.float16)
Forward = Callable[..., Tensor]


def in_precision(
    forward: Forward, dtype: torch.dtype, x: Tensor, t: Tensor, y: Condition
) -> Tensor:
    """forward(x, t, y) with x and encoded text in `dtype`; the output has x's own.

    Times are left: networks embed them in single precision (FLUX, as released, in its own).
    """
    y = each(lambda v: v.to(dtype) if v.is_floating_point() else v, y)
    return forward(x.to(dtype), t, y).to(x.dtype)


def takes_single(forward: Forward) -> Forward:
    """A denoiser's `forward`, defined for inputs in the precision of its weights."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        own = next(self.parameters()).dtype
        if own == x.dtype or own not in HALF:
            return forward(self, x, t, y)
        return in_precision(functools.partial(forward, self), own, x, t, y)

    return wrapped


def precise(weight: Tensor) -> Tensor:
    """A weight's values, detached; those in half precision in single."""
    return weight.detach().float() if weight.dtype in HALF else weight.detach()
