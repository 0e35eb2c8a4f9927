"""Soft masks on widths: numbers in [0, 1] that multiply what the weights which read a channel see.

A channel is read by the columns of convolutions and linear layers. Masking these alone scales every
path through the channel once; masking its rows too would square the mask. At 0 the layers behind
compute what they would without the channel, whatever the activation between. Only a normalisation
over several channels sees a difference: its statistics still hold the masked channel, which
surgery then takes out. `masked` multiplies these weights, for training them under masks; `gated`
their inputs, for training the masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunebench.models.units import Width
from prunebench.pruning.plan import Plan
from prunebench.selection.scores import matrices

Masks = Mapping[str, Tensor]  # for each width one number per channel, [size]


def readers(unit: Width, model: nn.Module) -> Width:
    """The part of a width that its mask multiplies: the weights that read its channels."""
    weights = matrices(model)
    read = (m for m in unit.members if m.axis == 1 and m.tensor in weights)
    return replace(unit, members=tuple(read))


def full(model: nn.Module, units: Sequence[Width]) -> dict[str, Tensor]:
    """Masks that mask nothing."""
    device = next(model.parameters()).device
    return {unit.name: torch.ones(unit.size, device=device) for unit in units}


def gains(model: nn.Module, units: Sequence[Width], masks: Masks) -> dict[str, Tensor]:
    """What multiplies each weight that reads masked channels: [1, inputs] or [1, inputs, 1, 1].

    Args:
        units: `readers` of the widths.
        masks: may require gradients.
    """
    found: dict[str, Tensor] = {}
    for unit in units:
        for member in unit.members:
            weight = model.get_parameter(member.tensor)
            blank = weight.new_ones(1, weight.shape[1], *[1] * (weight.dim() - 2))
            gain = found.setdefault(member.tensor, blank)
            mask = masks[unit.name].to(gain.dtype).unsqueeze(1)
            gain.view(-1)[member.index.to(gain.device)] = mask
    return found


class Mask(nn.Module):
    """The effective weight m * w of a raw weight w."""

    def __init__(self, gain: Tensor):
        super().__init__()
        self.register_buffer("gain", gain)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


@contextmanager
def masked(model: nn.Module, units: Sequence[Width], masks: Masks) -> Iterator[nn.Module]:
    """Inside, `model` computes and trains with m * w; afterwards it has its raw weights w."""
    places = []
    for name, gain in gains(model, units, masks).items():
        path, _, leaf = name.rpartition(".")
        places.append((model.get_submodule(path), leaf))
        parametrize.register_parametrization(*places[-1], Mask(gain))
    yield model
    for module, leaf in places:
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


@contextmanager
def gated(model: nn.Module, units: Sequence[Width]) -> Iterator[Callable[[Masks], None]]:
    """Inside, channels are multiplied where they are read; it yields what takes the masks.

    At first these mask nothing. The model computes what it would with `masked`, but keeps no
    product of a weight for the backward pass and computes no gradient of one. Masks stay until the
    next are given, so that blocks whose activations are computed again in the backward pass see
    them too.
    """
    read, held = [readers(unit, model) for unit in units], {}

    def put(masks: Masks) -> None:
        held.update(gains(model, read, masks))

    put(full(model, units))
    hooks = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, inputs, name=name: (inputs[0] * held[name], *inputs[1:])
        )
        for name in held
    ]
    try:
        yield put
    finally:
        for hook in hooks:
            hook.remove()


def hard(plan: Plan, like: Masks) -> dict[str, Tensor]:
    """The masks of a plan: 1 for the channels it keeps and 0 for the others."""
    masks = {name: torch.ones_like(mask) for name, mask in like.items()}
    for name, indices in plan.kept.items():
        masks[name].zero_()[list(indices)] = 1
    return masks
