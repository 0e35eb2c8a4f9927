"""What bypassing layers does to a model, shared by the methods that prune layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunebench.models.copies import shell, without
from prunebench.models.units import Layer, parameter_count

if TYPE_CHECKING:
    from prunebench.selection.context import Context
    from prunebench.training.loop import Batch

Rows = tuple[Tensor, Tensor]  # hidden states without and with a layer, float [rows, width]


@torch.no_grad()
def predictions(context: Context, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """What `model` predicts for the draws, [draws, C, H, W]."""
    return torch.cat([context.predict(model, batch) for batch in batches])


def output_loss(
    context: Context, names: Sequence[str], batches: Sequence[Batch], reference: Tensor
) -> float:
    """Mean squared change of the prediction when the named layers are bypassed together."""
    with context.without(*names) as model:
        change = predictions(context, model, batches) - reference
    return change.double().square().mean().item()


@torch.no_grad()
def loss_without(context: Context, names: Sequence[str], batches: Sequence[Batch]) -> float:
    """Mean loss over the draws when the named layers are bypassed together."""
    with context.without(*names) as model:
        losses = [context.loss(model, batch).double() * len(batch.x0) for batch in batches]
    return (sum(losses) / sum(len(batch.x0) for batch in batches)).item()


def greedy(
    context: Context,
    layers: Sequence[Layer],
    score: Callable[[Sequence[str], Layer], float],
) -> tuple[list[Layer], list[dict[str, float]]]:
    """Layers one by one until the target is met, scored anew after each; and the scores.

    Only those that lead towards the target are scored.

    Args:
        score: of the names that are gone and one more layer; the lowest goes next.
    """
    target = context.sparsity * parameter_count(context.model)
    order: list[Layer] = []
    rounds: list[dict[str, float]] = []
    while True:
        left = target - sum(unit.parameters for unit in order)
        near = [u for u in layers if u not in order and abs(left - u.parameters) < abs(left)]
        if not near:
            return order, rounds
        gone = [unit.name for unit in order]
        rounds.append({unit.name: score(gone, unit) for unit in near})
        order.append(min(near, key=lambda unit: rounds[-1][unit.name]))


@torch.no_grad()
def influences(
    context: Context, batches: Sequence[Batch], distance: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """Mean over the draws of what `distance` makes of every block's input and output, by name.

    A block's input is what takes the place of its output where the block is bypassed: its own input
    or, where a UNet's block changes the width, the projection of it. One pass through the whole
    model scores all blocks.

    Args:
        distance: maps hidden states before and behind a block, two [rows, width], to [rows].
    """
    names = [layer.name for layer in context.layers()]
    model, empty = shell(context.model), without(context.model, context.family, names)
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def watch(name: str, bypass: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, named: Mapping, output: object) -> None:
            values = distance(_rows(bypass(*inputs, **named)), _rows(output)).double()
            sums[name] += values.sum().item()
            counts[name] += len(values)

        return hook

    for name in names:
        hook = watch(name, empty.get_submodule(name))
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    for batch in batches:
        context.predict(model, batch)
    return {name: sums[name] / counts[name] for name in names}


def _rows(state: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A hidden state as one row per token or pixel, of one tensor or of several."""
    if isinstance(state, tuple):
        return torch.cat([_rows(part) for part in state])
    state = state.movedim(1, -1) if state.dim() == 4 else state
    return state.flatten(0, -2).float()
