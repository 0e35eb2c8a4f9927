"""Blocks that are run once more: copies with weights of their own, right behind the original.

Copies are children of their block, so that all names stay: block `b` and its copies `b.copies.0`,
`b.copies.1`. A hook on the block feeds them, whoever calls it and however.
"""

import copy
import functools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

COPIES = "copies"
STREAMS = ("hidden_states", "encoder_hidden_states")  # what diffusers calls a block's first inputs


def repeat(block: nn.Module, places: Sequence[int] = (0,)) -> nn.Module:
    """Have `block` followed by a copy of itself, in place; returns the copy.

    Args:
        places: which inputs the outputs of the block become, in their order; further inputs are
            given to the copy as they are.
    """
    twin = copy.deepcopy(block)
    if hasattr(twin, COPIES):
        delattr(twin, COPIES)
    if not hasattr(block, COPIES):
        setattr(block, COPIES, nn.ModuleList())
        again = functools.partial(_again, places=tuple(places))
        block.register_forward_hook(again, with_kwargs=True)
    getattr(block, COPIES).append(twin)
    return twin


def copies(block: nn.Module) -> Sequence[nn.Module]:
    """The copies that a block is followed by."""
    return getattr(block, COPIES, ())


def original(name: str) -> str:
    """What a module or parameter of this name is a copy of; of no copy, the name itself."""
    return re.sub(rf"\.{COPIES}\.\d+(?=\.|$)", "", name)


def is_copy(name: str) -> bool:
    """Whether a module of this name is a copy, or part of one."""
    return f".{COPIES}." in name


def _again(
    block: nn.Module,
    inputs: tuple,
    named: Mapping[str, object],
    output: Tensor | tuple[Tensor, ...],
    places: tuple[int, ...],
) -> Tensor | tuple[Tensor, ...]:
    for twin in copies(block):
        outputs = (output,) if isinstance(output, Tensor) else output
        given, by_name = list(inputs), dict(named)
        for place, value in zip(places, outputs, strict=True):
            if place < len(given):
                given[place] = value
            else:
                by_name[STREAMS[place]] = value
        output = twin(*given, **by_name)
    return output
