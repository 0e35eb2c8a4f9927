"""Denoisers in other number formats than single precision take and return single precision.

So images, losses, scores and samplers are in single precision whatever the weights are in.
`converted` makes what cells of a precision are sampled and timed with.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunebench.models.conditions import Condition, each
from prunebench.models.copies import rebuilt

HALF = (torch.bfloat16, torch.float16)
INT8_MULTIPLE = 8  # rows and columns: what cuBLAS's int8 product takes
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
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


class Half(nn.Module):
    """A copy of a denoiser in half precision that takes and returns single precision.

    What is in this precision already is shared.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.dtype = dtype
        self.model = rebuilt(model, lambda v: v.to(dtype) if v.is_floating_point() else v)
        self.null_class = getattr(model, "null_class", None)

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        return in_precision(self.model, self.dtype, x, t, y)


def converted(model: nn.Module, precision: str) -> tuple[nn.Module, dict | None]:
    """A model as the cells of a precision are sampled and timed with; for inference only.

    "fp32": the model itself, as its weights are stored. "bf16": a copy whose weights and
    activations are cast, no autocast. "int8": a copy whose linear layers have int8 weights, a scale
    per row, and whose inputs are rounded to int8 at every call, a scale per token (torchao's
    Int8DynamicActivationInt8WeightConfig, symmetric: a zero stays one). Their sums are exact;
    everything else, products of two activations too, is as stored.

    Returns:
        The model, and what `records.parts.Arithmetic` holds; None for "fp32".
    """
    if precision == "fp32":
        return model, None
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PRODUCTS)}
    if precision == "bf16":
        report = {"weights": "bfloat16", "activations": "bfloat16", "how": "cast", "left": {}}
        copy = Half(model, torch.bfloat16)
    else:
        why = {name: int8_obstacle(layer) for name, layer in layers.items()}
        copy, how = _int8(model, {name for name, reason in why.items() if reason is None})
        left = {name: reason for name, reason in why.items() if reason}
        report = {"weights": "int8", "activations": "int8", "how": how, "left": left}
    return copy.eval(), {
        **report,
        "converted": len(layers) - len(report["left"]),
        "of": len(layers),
    }


def int8_obstacle(layer: nn.Module) -> str | None:
    """Why a layer stays as it is in int8, or None if it does not.

    The same on every device: a cell's images should not depend on where they are drawn.
    """
    if not isinstance(layer, nn.Linear):
        return f"{type(layer).__name__}: int8 products are of matrices only"
    rows, columns = layer.weight.shape
    if not layer.weight.numel():
        return "no channel is left of it"
    if rows % INT8_MULTIPLE or columns % INT8_MULTIPLE:
        return f"{rows}x{columns} is not a multiple of {INT8_MULTIPLE}x{INT8_MULTIPLE}"
    return None


def _int8(model: nn.Module, names: set[str]) -> tuple[nn.Module, str]:
    """A copy with these linear layers in int8, and how; the rest shares the model's tensors."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.utils import should_reduce_range

    # Without VNNI a CPU's sums of products of 8 bits overflow.
    short = should_reduce_range(next(model.parameters()).device)
    config = Int8DynamicActivationInt8WeightConfig(reduce_range=short, set_inductor_config=False)
    copy = rebuilt(model)
    quantize_(copy, config, lambda _, name: name in names)
    how = "dynamic per token, weights per row"
    return copy, f"{how}; 7 bits, because this CPU has no VNNI" if short else how


def precise(weight: Tensor) -> Tensor:
    """A weight's values, detached; those in half precision in single."""
    return weight.detach().float() if weight.dtype in HALF else weight.detach()
