"""What can be pruned: layers, widths and weights, described by data that every family fills in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Of layers, from coarse to fine: pairs of blocks or levels, blocks with the projections around
# them, blocks, their branches.
GRANULARITIES = ("stage", "whole", "block", "branch")


@dataclass(frozen=True)
class Layer:
    """A residual block or branch that can be bypassed, or run once more where it is `copyable`."""

    name: str
    parameters: int
    copyable: bool = False


@dataclass(frozen=True)
class Member:
    """Where the channels of a width live in one tensor: channel c occupies `index[c]` of `axis`."""

    tensor: str
    axis: int
    index: Tensor  # int64 [size, k]


@dataclass(frozen=True)
class Width:
    """Channels, heads or neurons that can only leave together, in all member tensors at once.

    `groups` is the number of normalisation groups over the channels: the same number of channels
    must leave each of them, or the normalisation loses its shape. A width that `may_be_empty` can
    lose all its channels: its readers then give their bias, whatever comes in. `turn` is its place
    among the widths of tools that cut one after the other; equal ones go as they are listed.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    groups: int = 1
    may_be_empty: bool = False
    turn: int = 0


def inner_width(
    name: str,
    module: nn.Module,
    kind: str,
    size: int,
    writers: Sequence[str],
    readers: Sequence[str],
    *,
    block: int = 1,
    start: int = 0,
    groups: int = 1,
    may_be_empty: bool = False,
) -> Width:
    """The width between layers of `module` that write its channels and those that read them.

    Args:
        name: of `module` in the model; the width is `name.kind`.
        size: channels, heads or neurons.
        writers: layers (or norms) whose rows and biases are the channels: all of them once, or
            several times over, one after another (fused q, k and v; a GEGLU's values and gates).
        readers: layers whose columns are the channels, from column `start` on.
        block: neighbouring rows or columns that make up one channel (a head's dimension).
        may_be_empty: whether the module still works when all its channels have left.
    """
    members = []
    for writer in writers:
        layer = module.get_submodule(writer)
        times = len(layer.weight) // (size * block) if size else 1
        rows = torch.arange(len(layer.weight)).view(times, size, block).transpose(0, 1).flatten(1)
        leaves = ("weight",) if layer.bias is None else ("weight", "bias")
        members += [Member(f"{name}.{writer}.{leaf}", 0, rows) for leaf in leaves]
    columns = torch.arange(start, start + size * block).view(size, block)
    members += [Member(f"{name}.{reader}.weight", 1, columns) for reader in readers]
    return Width(f"{name}.{kind}", size, tuple(members), groups, may_be_empty)


def filled(units: Iterable[Width]) -> list[Width]:
    """The widths that have channels left."""
    return [unit for unit in units if unit.size]


def unemptied(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names of the parameters that have elements: emptied widths leave some without."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return [name for name in names if sizes.get(name, 1)]


def bias_alone(reader: nn.Linear, x: Tensor) -> Tensor:
    """What the reader of an emptied width gives for tokens [..., any]: its bias, [..., out]."""
    return reader(x.new_zeros(*x.shape[:-1], 0))


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
