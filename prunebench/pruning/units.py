"""What can be pruned: layers, widths and weights, described by data that every family fills in."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A residual block or branch that can be bypassed."""

    name: str
    parameters: int


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
    must leave each of them, or the normalisation loses its shape.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    groups: int = 1


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
