"""Copies of models that share tensors: a full one of FLUX takes 24 GB in half precision."""

import copy
from collections.abc import Callable, Iterable
from types import ModuleType

from torch import Tensor, nn


def rebuilt(
    model: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> nn.Module:
    """A copy of a model's modules with parameters of its own over what `tensor` makes of each one.

    Without `tensor` the memory is the model's: the copy may replace parameters, but what changes
    their values changes both.
    """
    stands: dict[int, object] = {id(buffer): tensor(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        own = nn.Parameter(tensor(parameter.detach()), parameter.requires_grad)
        stands[id(parameter)] = own
    return copy.deepcopy(model, stands)


def shell(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that has its very parameters, gradients included."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without(model: nn.Module, family: ModuleType, layers: Iterable[str]) -> nn.Module:
    """A `shell` of a model in which layers are bypassed."""
    smaller = shell(model)
    for name in layers:
        family.remove_layer(smaller, name)
    return smaller
