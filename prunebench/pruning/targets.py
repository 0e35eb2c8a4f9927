"""From scores to plans that meet a target sparsity.

A target is the fraction of the denoiser's parameters that goes (for masks: is zeroed). Lower scores
go first. A plan may miss its target by one unit: one layer, one channel per normalisation group.
"""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from prunebench.errors import CellError
from prunebench.models.precision import precise
from prunebench.models.units import GRANULARITIES, Layer, Width, parameter_count
from prunebench.pruning.plan import Plan

SCOPES = ("global", "kinds", "local")  # of what is ranked together: see `plan_ranked`
UNIFORM = "uniform"  # a plan's pattern where every width loses the same share of its channels


def plan_layers(model: nn.Module, order: Sequence[Layer], sparsity: float, **notes: object) -> Plan:
    """Remove layers in the given order, passing over those that would lead away from the target."""
    target = sparsity * parameter_count(model)
    removed: list[Layer] = []
    for layer in order:
        before = sum(unit.parameters for unit in removed)
        if abs(before + layer.parameters - target) < abs(before - target):
            removed.append(layer)
    return Plan(layers=tuple(sorted(unit.name for unit in removed)), notes=notes)


def plan_widths(
    model: nn.Module, units: Sequence[Width], scores: Mapping[str, Tensor], sparsity: float, **notes
) -> Plan:
    """Remove the lowest channels of every width at one common ratio (`common_counts`).

    Args:
        scores: for each width's name, one score per channel, [size].
    """
    _check_channels(units, scores)
    counts = common_counts(model, units, sparsity)
    kept = {
        u.name: highest(scores[u.name].cpu(), u, counts[u.name]) for u in units if counts[u.name]
    }
    return Plan(kept=kept, notes=notes)


def common_counts(model: nn.Module, units: Sequence[Width], sparsity: float) -> dict[str, int]:
    """How many channels go from each width, at one common ratio.

    The ratio is the largest whose plan does not exceed the target; single channels then fill the
    rest, taken where rounding had held most back.
    """
    sizes = Sizes(model, units)
    target = sparsity * sizes.total
    low, high = 0.0, 1.0
    for _ in range(30):
        ratio = (low + high) / 2
        low, high = (
            (ratio, high) if sizes.removed(_counts(units, ratio)) <= target else (low, ratio)
        )
    counts = _counts(units, low)
    for unit in sorted(units, key=lambda u: counts[u.name] / u.size):
        more = {**counts, unit.name: counts[unit.name] + unit.groups}
        closer = abs(sizes.removed(more) - target) < abs(sizes.removed(counts) - target)
        if closer and more[unit.name] < unit.size:
            counts = more
    return counts


def _check_channels(units: Sequence[Width], scores: Mapping[str, Tensor]) -> None:
    """Every width has one finite score per channel."""
    for unit in units:
        if unit.name not in scores:
            raise CellError(f"width '{unit.name}' has no scores")
        if tuple(scores[unit.name].shape) != (unit.size,):
            found = list(scores[unit.name].shape)
            raise CellError(f"scores of width '{unit.name}' are {found}, not [{unit.size}]")
        check_finite(f"width '{unit.name}'", scores[unit.name])


def check_finite(unit: str, scores: Tensor) -> None:
    """Scores that are NaN or infinite have no order: refused with the unit's name."""
    wrong = int((~scores.isfinite()).sum())
    if wrong:
        raise CellError(f"{wrong} of {scores.numel()} scores of {unit} are not finite numbers")


def _counts(units: Sequence[Width], ratio: float) -> dict[str, int]:
    """Channels to remove from each width: whole rounds over its norm groups, never all of them."""
    rounds = {
        u.name: min(math.floor(ratio * u.size / u.groups), u.size // u.groups - 1) for u in units
    }
    return {u.name: rounds[u.name] * u.groups for u in units}


def highest(scores: Tensor, unit: Width, removed: int) -> tuple[int, ...]:
    """Indices that stay: in each norm group all but its lowest; on ties the later ones stay."""
    order = scores.view(unit.groups, -1).argsort(dim=1, stable=True)
    offset = torch.arange(unit.groups).unsqueeze(1) * (unit.size // unit.groups)
    stays = (order + offset)[:, removed // unit.groups :]
    return tuple(sorted(stays.flatten().tolist()))


def plan_ranked(
    model: nn.Module,
    units: Sequence[Width],
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    **notes,
) -> Plan:
    """Rank channels and remove the lowest until the target is met; widths may lose unequal shares.

    Args:
        units: the widths that are ranked; others keep all their channels.
        scores: for each width's name, one score per channel, [size].
        scope: "global" compares all scores, "kinds" those of all heads, of all neurons and so on,
            "local" those of a width. Every pool of scores that are compared loses the same share;
            of the n of a pool floor(n * (1 - share)) stay.

    Under a normalisation one channel of each group goes at a time, ranked by their mean score. A
    width that may be empty can lose all its channels, but not by a local ranking.

    Raises:
        CellError: scores are missing or not finite numbers, or the scope is none of these.
    """
    _check_channels(units, scores)
    sizes, order = Sizes(model, units), _removal_order(units, scores, scope)
    target = sparsity * sizes.total

    def counts(length: int) -> dict[str, int]:
        rounds = order[:length].bincount(minlength=len(units)).tolist()
        return {u.name: count * u.groups for u, count in zip(units, rounds, strict=True)}

    def removed(length: int) -> int:
        return sizes.removed(counts(length))

    reaching = bisect.bisect_left(range(len(order)), target, key=removed)
    length = min((max(reaching - 1, 0), reaching), key=lambda k: abs(removed(k) - target))
    gone = counts(length)
    kept = {u.name: highest(scores[u.name].cpu(), u, gone[u.name]) for u in units if gone[u.name]}
    return Plan(kept=kept, notes=notes)


def _removal_order(units: Sequence[Width], scores: Mapping[str, Tensor], scope: str) -> Tensor:
    """Which width loses a channel of every normalisation group, first to last: indices of `units`.

    The j-th of a pool's n goes as soon as the share that is removed exceeds (j - 1) / n.
    """
    pools: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        pools.setdefault(_pool(unit, scope), []).append(index)
    owners, shares = [], []
    for members in pools.values():
        parts = [_rounds(units[i], scores[units[i].name], scope == "local") for i in members]
        owner = torch.tensor(members).repeat_interleave(torch.tensor([len(p) for p in parts]))
        owners.append(owner[torch.cat(parts).argsort(stable=True)])
        total = sum(units[i].size // units[i].groups for i in members)
        shares.append(torch.arange(len(owner), dtype=torch.float64) / total)
    return torch.cat(owners)[torch.cat(shares).argsort(stable=True)]


def _pool(unit: Width, scope: str) -> str:
    """What a width's channels are compared with."""
    pools = {"global": "", "kinds": unit.name.rpartition(".")[2], "local": unit.name}
    if scope not in pools:
        raise CellError(f"scope is '{scope}'; known: {', '.join(SCOPES)}")
    return pools[scope]


def _rounds(unit: Width, scores: Tensor, one_stays: bool) -> Tensor:
    """The ascending mean scores of a width's rounds over its normalisation groups."""
    found = precise(scores).cpu().view(unit.groups, -1).sort(dim=1).values.mean(0)
    return found if unit.may_be_empty and not one_stays else found[:-1]


def plan_uniform(
    units: Sequence[Width], scores: Mapping[str, Tensor], ratio: float, **notes
) -> Plan:
    """Remove the lowest channels of every width at `ratio` of its own channels.

    The rule of torch-pruning's local pruning, as Diff-Pruning uses it (VainF/Diff-Pruning,
    ddpm_exp/torch_pruning/pruner/algorithms/metapruner.py): a width of C channels
    loses n = C - int(C (1 - ratio)), with a normalisation floor(n / groups) from each of its groups
    (128 -> 96 at 0.3 under GroupNorm(32)). How many parameters go follows from it.
    """
    _check_channels(units, scores)
    kept = {}
    for unit in units:
        if count := uniform_count(unit, ratio):
            kept[unit.name] = highest(scores[unit.name].cpu(), unit, count)
    return Plan(kept=kept, pattern=UNIFORM, notes=notes)


def uniform_count(unit: Width, ratio: float) -> int:
    """Channels that a uniform ratio removes from a width; at least one stays in each norm group."""
    count = unit.size - int(unit.size * (1 - ratio))
    rounds = min(count // unit.groups, unit.size // unit.groups - 1)
    return rounds * unit.groups


def check_uniform(plan: Plan, units: Sequence[Width], ratio: float) -> None:
    """Every width of a uniform plan lost exactly what its ratio says."""
    for unit in units:
        left = len(plan.kept.get(unit.name, range(unit.size)))
        right = unit.size - uniform_count(unit, ratio)
        if left != right:
            raise CellError(
                f"the plan keeps {left} of {unit.size} channels of width '{unit.name}'; "
                f"a uniform ratio of {ratio} keeps {right}"
            )


class Sizes:
    """Counts parameters after removing channels, without doing it."""

    def __init__(self, model: nn.Module, units: Sequence[Width]):
        self.total = parameter_count(model)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.members: dict[str, list[tuple[str, int, int]]] = {}
        for unit in units:
            for member in unit.members:
                entry = (unit.name, member.axis, member.index.shape[1])
                self.members.setdefault(member.tensor, []).append(entry)

    def removed(self, counts: Mapping[str, int]) -> int:
        """Parameters that go with `counts[name]` channels of every width."""
        gone = 0
        for tensor, members in self.members.items():
            shape = list(self.shapes[tensor])
            for name, axis, per_channel in members:
                shape[axis] -= counts.get(name, 0) * per_channel
            gone += math.prod(self.shapes[tensor]) - math.prod(shape)
        return gone


def plan_weights(
    model: nn.Module, scores: Mapping[str, Tensor], sparsity: float, **notes: object
) -> Plan:
    """Mask the globally lowest weights until `sparsity` of all parameters are zero.

    Of equal scores the first go first.
    """
    count = round(sparsity * parameter_count(model))
    shapes, parts = {}, []
    for name, score in scores.items():
        check_finite(f"weight '{name}'", score)
        shapes[name] = score.shape
        parts.append(precise(score).flatten().cpu())
    flat = torch.cat(parts)
    if count > len(flat):
        raise CellError(
            f"sparsity {sparsity} needs {count} zeros but only {len(flat)} weights can be masked"
        )
    parts = _above(flat, count).split([shape.numel() for shape in shapes.values()])
    masks = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
    return Plan(masks=masks, pattern="unstructured", notes=notes)


def _above(scores: Tensor, count: int) -> Tensor:
    """False for the `count` lowest, bool [n]; sorting FLUX's would take 200 GB for the indices."""
    if not count:
        return torch.ones(len(scores), dtype=torch.bool)
    threshold = np.partition(scores.numpy(), count - 1)[count - 1].item()
    stays = scores >= threshold
    equal = (scores == threshold).nonzero().flatten()
    stays[equal[: count - int((~stays).sum())]] = False
    return stays


def plan_n_of_m(scores: Mapping[str, Tensor], n: int, m: int, **notes: object) -> Plan:
    """Keep the n highest of every m consecutive weights along the input dimension.

    Weights whose input dimension is not a multiple of m have no such pattern and stay dense.
    """
    _check_pattern(n, m)
    masks = {}
    for name, score in scores.items():
        check_finite(f"weight '{name}'", score)
        if score.shape[1] % m == 0:
            masks[name] = n_of_m_mask(score.cpu(), n, m)
    notes = {**notes, "stay_dense": sorted(set(scores) - set(masks))}
    return Plan(masks=masks, pattern=f"{n}:{m}", notes=notes)


def _check_pattern(n: int, m: int) -> None:
    if not 0 < n < m:
        raise CellError(f"a pattern {n}:{m} removes {'all' if n < 1 else 'nothing'}; N of N:M must "
                        "be from 1 to M - 1")  # fmt: skip


def n_of_m_mask(score: Tensor, n: int, m: int) -> Tensor:
    """True for the n highest of every m along dimension 1 of a matrix or a convolution weight.

    The first of equal scores stays. The mask is on the scores' device.
    """
    groups = score.movedim(1, -1).unflatten(-1, (-1, m))
    kept = torch.zeros_like(groups, dtype=torch.bool)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept.scatter_(-1, order[..., :n], True)
    return kept.flatten(-2).movedim(-1, 1).contiguous()


def reached(dense: nn.Module, pruned: nn.Module, plan: Plan) -> float:
    """Fraction of the dense model's parameters that the plan removed or masks.

    Negative where copied layers hold more than what was removed.
    """
    masked = sum(int((~mask).sum()) for mask in plan.masks.values())
    return 1 - (parameter_count(pruned) - masked) / parameter_count(dense)


def tolerance(
    model: nn.Module, layers: Sequence[Layer], widths: Sequence[Width], plan: Plan
) -> float:
    """One unit of each kind that the plan prunes, as a fraction of the model's parameters."""
    units = []
    if plan.layers or plan.copies:
        units.append(max(unit.parameters for unit in layers))
    if plan.kept:
        sizes = Sizes(model, widths)
        units.append(max(sizes.removed({unit.name: unit.groups}) for unit in widths))
    if plan.masks or not units:
        units.append(1)
    return sum(units) / parameter_count(model)


def layers_of(model: nn.Module, family: ModuleType, plan: Plan) -> list[Layer]:
    """The layers whose size is a plan's tolerance: coarser ones only where it names some."""
    found = {granularity: family.layers(model, granularity) for granularity in GRANULARITIES}
    units = [*found["block"], *found["branch"]]
    for coarser in ("whole", "stage"):
        if not {*plan.layers, *plan.copies} <= {layer.name for layer in units}:
            units = [*found[coarser], *units]
    return units


def most(model: nn.Module, family: ModuleType, kind: str) -> float:
    """The largest fraction of the parameters that pruning units of a kind can remove."""
    if kind == "layers":
        removable = sum(unit.parameters for unit in family.layers(model, "block"))
    elif kind == "widths":
        units = family.widths(model)
        removable = Sizes(model, units).removed({u.name: u.size - u.groups for u in units})
    else:
        removable = sum(model.get_parameter(name).numel() for name in family.weights(model))
    return removable / parameter_count(model)


def n_and_m(pattern: str) -> tuple[int, int] | None:
    """N and M of a pattern "N:M", None of another."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pattern)
    return (int(found[1]), int(found[2])) if found else None


def check_n_of_m(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> None:
    """Every weight that has the pattern is masked, and keeps exactly N of every M.

    Args:
        shapes: of all weights that may be masked.
    """
    if (numbers := n_and_m(plan.pattern)) is None:
        raise CellError(f"unknown pattern '{plan.pattern}'; known: unstructured, uniform and N:M")
    n, m = numbers
    _check_pattern(n, m)
    for name, shape in shapes.items():
        if shape[1] % m == 0 and name not in plan.masks:
            raise CellError(
                f"'{name}' is not masked; a {n}:{m} plan masks every weight that has the pattern"
            )
    for name, mask in plan.masks.items():
        fits = mask.shape[1] % m == 0
        if not fits or bool((mask.movedim(1, -1).unflatten(-1, (-1, m)).sum(-1) != n).any()):
            raise CellError(f"the mask of '{name}' does not keep {n} of every {m} weights")
