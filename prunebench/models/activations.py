"""Activation checkpointing: of a block only its inputs are kept for the backward pass.

It is diffusers' protocol, which the suite's own families follow: a module that runs blocks has the
flag `gradient_checkpointing`, and runs them by `_gradient_checkpointing_func` where it is set.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from prunebench.errors import UserError


def checkpoint_activations(model: nn.Module, wanted: bool = True) -> None:
    """Keep only the inputs of blocks for the backward pass, which runs the blocks again.

    Gradients are the same; calls without gradients are not touched.

    Raises:
        UserError: the family runs no blocks that way.
    """
    found = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if wanted and not found:
        raise UserError(f"activation_checkpointing: {type(model).__name__} has none; leave it out")
    for module in found:
        module.gradient_checkpointing = wanted
        module._gradient_checkpointing_func = recomputed


def run(owner: nn.Module, block: nn.Module, *inputs: Tensor) -> Tensor:
    """A block of `owner`, which has the flag, on tensors."""
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        return recomputed(block, *inputs)
    return block(*inputs)


def recomputed(block: nn.Module, *inputs: object) -> object:
    """A block whose activations are computed again in the backward pass.

    With the tensors it has now: under `functional_call` the block has others by then, and the
    gradients would silently be theirs.
    """
    tensors = dict(block.named_parameters()) | dict(block.named_buffers())

    def forward(*inputs: object) -> object:
        return functional_call(block, tensors, inputs)

    return checkpoint(forward, *inputs, use_reentrant=False)
