"""What images are asked for: a class each, or a prompt each.

Data and samplers know one *label* per image, the number of its class or of its prompt. `Conditions`
make of labels what the network takes, its *condition*: the labels themselves, or tensors that were
encoded of the prompts. The first axis of every tensor of a condition counts images.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

Condition = Tensor | Mapping[str, Tensor]


def each(function: Callable[..., Tensor], condition: Condition, *others: Condition) -> Condition:
    """`function` of every tensor of a condition, and of the same one of others like it."""
    if isinstance(condition, Mapping):
        return {
            name: function(value, *(other[name] for other in others))
            for name, value in condition.items()
        }
    return function(condition, *others)


class Conditions(Protocol):
    """What networks of a kind are conditioned on."""

    def of(self, labels: Tensor) -> Condition:
        """What the network takes for images with these labels, int64 [N]."""

    def nothing(self, asked: Condition, model: nn.Module) -> Condition:
        """What it takes for as many images of which nothing is asked; like `asked`."""


class Classes:
    """Networks that take the number of a class, or none."""

    def of(self, labels: Tensor) -> Tensor:
        return labels

    def nothing(self, asked: Tensor, model: nn.Module) -> Tensor:
        return torch.full_like(asked, model.null_class)


CLASSES = Classes()


def dropped(
    conditions: Conditions, asked: Condition, model: nn.Module, chosen: Tensor
) -> Condition:
    """`asked`, but nothing where `chosen`, bool [N]."""

    def mixed(own: Tensor, nothing: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (own.dim() - 1)), nothing, own)

    return each(mixed, asked, conditions.nothing(asked, model))
