"""Runs 2:4-masked matrices on the GPU's sparse kernels, so that what they bring is measured.

NVIDIA GPUs from compute capability 8.0 on multiply a 2:4 matrix by skipping its zeros, in half
precision. PyTorch reaches them through `to_sparse_semi_structured` (cuSPARSELt unless CUTLASS is
forced), for matrices only and only at certain multiples of rows and columns. Everything else stays
dense, and so does every convolution. The dense model it is timed against has the same precision.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from prunebench.models.precision import HALF, Half
from prunebench.pruning.plan import Plan

PATTERN, DTYPE = "2:4", torch.float16


def contestants(
    pruned: nn.Module, dense: nn.Module, plan: Plan
) -> tuple[nn.Module, nn.Module, dict | None]:
    """The pruned and the dense model as they are timed, and the report on kernels.

    Only a 2:4 plan has a report. Where one of its layers has a kernel, both models are copies in
    half precision (their own, where they are in one; a pruned one that was cast to one already gets
    its kernels in place); else both are returned as they are.
    """
    if plan.pattern != PATTERN:
        return pruned, dense, None
    if isinstance(pruned, Half):
        return pruned, dense, accelerate_in_place(pruned.model, plan)
    fast, report = accelerate(pruned, plan)
    return fast, Half(dense, _half_of(dense)) if report["accelerated"] else dense, report


def _half_of(model: nn.Module) -> torch.dtype:
    """The half precision to time a model in: its own, which takes no copy, or DTYPE."""
    own = next(model.parameters()).dtype
    return own if own in HALF else DTYPE


def accelerate(model: nn.Module, plan: Plan) -> tuple[nn.Module, dict]:
    """A half-precision copy of a 2:4-masked model whose matrices use sparse kernels.

    Where no layer can, the model itself is returned. For inference only (`torch.inference_mode`).

    Returns:
        The model, and a report: "pattern"; "device"; "precision" of the returned model; how many
        layers are "accelerated" "of" those masked; "dense", the reason for every layer of them
        that is not; "reason", one that holds for all layers, or None.
    """
    fit, report = _survey(model, plan)
    if fit:
        model = Half(model, _half_of(model))
        compress(model.model, fit)
    precision = next(model.parameters()).dtype
    return model, {**report, "precision": _name(precision)}


def accelerate_in_place(model: nn.Module, plan: Plan) -> dict:
    """As `accelerate`, of a model that is in half precision already and needs no copy."""
    fit, report = _survey(model, plan)
    compress(model, fit)
    return {**report, "precision": _name(next(model.parameters()).dtype)}


def _survey(model: nn.Module, plan: Plan) -> tuple[list[str], dict]:
    """The masked layers that have a kernel, and the report but for the precision."""
    device = next(model.parameters()).device
    layers = [name.removesuffix(".weight") for name in plan.masks]
    reason = missing_kernels(device)
    why = {} if reason else {name: obstacle(model.get_submodule(name)) for name in layers}
    fit = [name for name, text in why.items() if text is None]
    report = {
        "pattern": PATTERN,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "accelerated": len(fit),
        "of": len(layers),
        "dense": {name: text for name, text in why.items() if text},
        "reason": reason,
    }
    return fit, report


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def missing_kernels(device: torch.device) -> str | None:
    """Why a device has no 2:4 kernels, or None if it has."""
    if device.type != "cuda":
        return f"no 2:4 kernels on this {device.type.upper()}: the pattern brings no speed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"no 2:4 kernels below compute capability 8.0; this GPU has {capability}"
    if _backend().BACKEND == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this PyTorch was built without cuSPARSELt"
    return None


def obstacle(layer: nn.Module) -> str | None:
    """Why a masked layer has no 2:4 kernel, or None if it has; looks at type and shape only."""
    if not isinstance(layer, nn.Linear):
        return f"{type(layer).__name__}: kernels exist for matrices only"
    limits = _backend()._DTYPE_SHAPE_CONSTRAINTS[DTYPE]
    rows, columns = layer.weight.shape
    if not layer.weight.numel():
        return "nothing is left of it"
    if rows % limits.sparse_min_rows or columns % limits.sparse_min_cols:
        return (
            f"{rows}x{columns} is not a multiple of "
            f"{limits.sparse_min_rows}x{limits.sparse_min_cols}"
        )
    return None


def _backend() -> type[SparseSemiStructuredTensor]:
    """The class that `to_sparse_semi_structured` makes; its shape limits are kept nowhere else."""
    if SparseSemiStructuredTensor._FORCE_CUTLASS:
        return SparseSemiStructuredTensorCUTLASS
    return SparseSemiStructuredTensorCUSPARSELT


def compress(model: nn.Module, names: Iterable[str]) -> None:
    """Store the named layers' weights, which have the pattern, for the sparse kernels."""
    for name in names:
        _compress(model.get_submodule(name))


def _compress(layer: nn.Linear) -> None:
    weight = to_sparse_semi_structured(layer.weight.detach().contiguous())
    layer.weight = nn.Parameter(weight, requires_grad=False)
    # The kernels flatten their input with `view`, which a transposed one (UNet attention) refuses.
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
