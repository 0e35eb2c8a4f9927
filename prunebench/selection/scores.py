"""Scores of channels from values of weights, shared by the methods that prune widths."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunebench.errors import CellError, short_of_memory
from prunebench.models.precision import HALF, precise
from prunebench.models.units import Width
from prunebench.pruning import targets

if TYPE_CHECKING:
    from prunebench.selection.context import Context
    from prunebench.training.loop import Batch

log = logging.getLogger(__name__)

STOPS = ("before", "after")


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions: what channel scores are made of."""
    return _weights(model, nn.Linear | nn.Conv2d)


def group_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales (gamma) of the group normalisations, [C] each."""
    return _weights(model, nn.GroupNorm)


def _weights(model: nn.Module, kinds: type) -> dict[str, nn.Parameter]:
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight is not None
    }


def slices(unit: Width, values: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """What each channel of a width holds in every tensor of `values`: (tensor, axis) -> [size, k].

    Args:
        values: one tensor per parameter name (of its shape), for the parameters that take part.
    """
    found = {}
    for member in unit.members:
        if member.tensor in values:
            value = values[member.tensor]
            rows = value.index_select(member.axis, member.index.flatten().to(value.device))
            found[member.tensor, member.axis] = rows.movedim(member.axis, 0).reshape(unit.size, -1)
    return found


def per_channel(
    unit: Width, values: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean over the layers of a group of `reduce` over each channel's slice, [size].

    Args:
        values: one tensor per weight (of its shape), for the weights that take part.
        reduce: maps [size, k], a channel's k values in one layer, to [size].

    Divided by its mean over the channels, so that groups compare (torch-pruning's normalisation).
    """
    score = torch.stack([reduce(rows) for rows in slices(unit, values).values()]).mean(0)
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)


Score = Callable[[Width, Mapping[str, Tensor]], Tensor]  # of a width's channels, [size]


def of_widths(
    context: Context,
    score: Score,
    values: Mapping[str, Tensor],
    *,
    sequential: bool = False,
    uniform: bool = False,
) -> dict[str, Tensor]:
    """Scores of every width by name, for `context.plan_widths`, or with `uniform` `plan_uniform`.

    Args:
        values: of weights by name, of which scores are made of sums.
        sequential: score a width on what the cuts of those before it left, as torch-pruning's
            local pruning does, in whose order they come; else all on the dense model.
    """
    units = context.widths()
    if not sequential:
        return {unit.name: score(unit, values) for unit in units}
    counts = (
        {unit.name: targets.uniform_count(unit, context.sparsity) for unit in units}
        if uniform
        else targets.common_counts(context.model, units, context.sparsity)
    )
    remaining, scores = Remaining(values), {}
    for unit in sorted(units, key=lambda unit: unit.turn):
        scores[unit.name] = score(unit, remaining)
        stay = targets.highest(scores[unit.name].cpu(), unit, counts[unit.name])
        remaining.cut(unit, sorted(set(range(unit.size)) - set(stay)))
    return scores


class Values(Mapping):
    """What `function` makes of weights, made anew at every reading.

    So the values of one width are alive at a time; all of them would be another copy of the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]):
        self.weights, self.function = weights, function

    def __getitem__(self, name: str) -> Tensor:
        return self.function(self.weights[name])

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Remaining(Values):
    """Values in which what was cut is 0, so that sums are over what remains."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__(values, lambda value: value)
        self._gone: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)

    def cut(self, unit: Width, channels: list[int]) -> None:
        """Take channels of a width away, in all its tensors."""
        for member in unit.members:
            self._gone[member.tensor].append((member.axis, member.index[channels].flatten()))

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        for axis, rows in self._gone[name]:
            value = value.index_fill(axis, rows.to(value.device), 0)
        return value


def taylor_terms(
    weights: Mapping[str, nn.Parameter], function: Callable[[Tensor], Tensor] = lambda term: term
) -> Values:
    """`function` of w * gradient of every weight that has a gradient.

    That is the first-order Taylor term of setting it to 0.
    """
    scored = {name: weight for name, weight in weights.items() if weight.grad is not None}
    return Values(scored, lambda weight: function(precise(weight) * weight.grad))


def accumulate_gradients(
    context: Context, timesteps: int, batch: int, threshold: float = 0.0, stop: str = "before"
) -> int:
    """Sum the loss's gradients over ascending times into `.grad` of `context.model`.

    Diff-Pruning's accumulation (Fang et al. 2023, `ddpm_exp/prune.py`): one batch of images and one
    noise for all times, no averaging. It ends at the first time whose loss is below `threshold`
    times the largest loss so far. Where memory is short, the batch goes through in parts, as in
    training. Sums are in single precision where weights are in half.

    Args:
        timesteps: number of evenly spaced times, from clean to noisy.
        batch: images.
        threshold: in [0, 1]; 0 never ends it, because a loss is not negative.
        stop: "before" leaves the gradient of the time that ends it out, "after" takes it in.

    Returns:
        The number of times whose gradients were summed.

    Raises:
        CellError: `threshold` or `stop` is none of these.
    """
    if not 0 <= threshold <= 1 or stop not in STOPS:
        raise CellError(f"threshold {threshold} must be in [0, 1] and stop '{stop}' one of {STOPS}")
    for parameter in context.model.parameters():
        if parameter.dtype in HALF:
            parameter.grad_dtype = torch.float32
    (calibration,) = context.draws(batch, batch)
    size = batch
    while True:
        context.model.zero_grad()
        try:
            times = context.data.objective.grid(timesteps)
            return _accumulated(context, calibration, times, threshold, stop, batch, size)
        except RuntimeError as error:
            if not short_of_memory(error) or size == 1:
                raise
        # From the start, because some gradients of the pass that failed are in the sums.
        torch.cuda.empty_cache()
        size = -(-size // 2)
        log.warning("memory is short: %d images at once from now on", size)


def _accumulated(
    context: Context,
    calibration: Batch,
    times: Tensor,
    threshold: float,
    stop: str,
    batch: int,
    size: int,
) -> int:
    """As `accumulate_gradients`, with at most `size` images of the batch at once."""
    highest, used = 0.0, 0
    for t in times:
        parts = in_parts(context.at_time(calibration, t), batch, size)
        # The gate asks for the loss of all parts before the first one's gradients are added.
        with torch.set_grad_enabled(len(parts) == 1):
            losses = [context.loss(context.model, part) * share for part, share in parts]
        value = sum(loss.item() for loss in losses)
        highest = max(highest, value)
        ends = value < threshold * highest
        if ends and stop == "before":
            break
        if len(parts) == 1:
            losses[0].backward()
        else:
            for part, share in parts:
                (context.loss(context.model, part) * share).backward()
        used += 1
        if ends:
            break
    return used


def in_parts(batch: Batch, count: int, size: int) -> list[tuple[Batch, float]]:
    """A batch of `count` images in parts of at most `size`, each with its share of them."""
    if count <= size:
        return [(batch, 1.0)]
    rows = (range(start, min(start + size, count)) for start in range(0, count, size))
    return [(batch.rows(part), len(part) / count) for part in rows]
