"""LAPTOP-Diff: its score, its knapsack, and that scores of single layers nearly add up.

The parameters of SD v1.5's and SDXL's units are counted with the conditional UNets; the normalised
distillation is tested in test_recovery.py.
"""

import math
from types import SimpleNamespace

import numpy
import pytest
import tiny
import torch
from torch import nn

from prunebench.diffusion.objectives import objective
from prunebench.errors import CellError
from prunebench.models.dit import Bypass
from prunebench.models.units import Layer, parameter_count
from prunebench.pruning import surgery, targets
from prunebench.selection.context import Context
from prunebench.tracks import methods
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

FOUND = tiny.found_methods()["laptop_diff"]
NAMESPACE = methods.load(FOUND).__globals__
select, cover, output_loss = (NAMESPACE[n] for n in ("select", "cover", "output_loss"))
predictions = NAMESPACE["predictions"]


def _scored(context: Context, draws: int = 6) -> tuple[list, torch.Tensor]:
    batches = context.draws(draws, 4)
    return batches, predictions(context, context.model, batches)


# The score.


def test_removing_nothing_costs_nothing(name):
    context = tiny.context(name)
    assert output_loss(context, (), *_scored(context)) == 0


def test_scores_are_the_mean_squared_change_of_the_prediction(name):
    """By hand, on the model with the layer taken out by the family."""
    context = tiny.context(name)
    batches, reference = _scored(context)
    first = context.layers()[0].name
    removed = tiny.dense(name)
    context.family.remove_layer(removed, first)
    batch = batches[0]
    with torch.no_grad():
        change = context.predict(removed, batch) - context.predict(context.model, batch)
    score = output_loss(context, (first,), batches[:1], reference[: len(batch.y)])
    assert score == pytest.approx(change.square().mean().item(), rel=1e-5)
    assert score > 0


def test_scores_do_not_depend_on_the_order_of_batches(core):
    context = tiny.context(core)
    batches, reference = _scored(context, 12)
    parts = list(reference.split([len(batch.y) for batch in batches]))
    for layer in context.layers():
        forwards = output_loss(context, (layer.name,), batches, reference)
        backwards = output_loss(context, (layer.name,), batches[::-1], torch.cat(parts[::-1]))
        assert forwards == pytest.approx(backwards, rel=1e-9)


def _silence(block: nn.Module) -> None:
    """Zero the last projection of every residual branch of a layer."""
    last = [m for n, m in block.named_modules() if n.endswith(("conv2", "proj", "fc2", "to_out.0"))]
    assert last
    for parameter in (p for module in last for p in module.parameters()):
        nn.init.zeros_(parameter)


@pytest.mark.parametrize("instance", ["dit", "unet_attention"])
def test_a_silent_layer_scores_exactly_zero(instance):
    context = tiny.context(instance)
    silent, *others = context.layers()
    assert output_loss(context, (silent.name,), *_scored(context)) > 0
    for layer in (silent, *others[::2]):
        _silence(context.model.get_submodule(layer.name))
    batches, reference = _scored(context)
    scores = [
        output_loss(context, (layer.name,), batches, reference) for layer in (silent, *others)
    ]
    assert [score == 0 for score in scores] == [True, *([True, False] * len(others))[: len(others)]]


# The knapsack.


def _brute_force(scores: list, sizes: list, required: int) -> float:
    """The smallest sum of scores of any subset that holds enough."""
    masks = (numpy.arange(2 ** len(scores))[:, None] >> numpy.arange(len(scores))) & 1
    return (masks @ numpy.array(scores))[masks @ numpy.array(sizes) >= required].min()


def _covered(scores: list, sizes: list, required: int) -> list[int]:
    names = [f"{index:02d}" for index in range(len(scores))]
    removed = cover(
        dict(zip(names, scores, strict=True)), dict(zip(names, sizes, strict=True)), required
    )
    return [int(name) for name in removed]


@pytest.mark.parametrize("spread", [0.5, 4.0])
@pytest.mark.parametrize("largest", [20, 10**8])
def test_the_knapsack_is_exact(spread, largest):
    """Against all subsets, also where a subset misses by one parameter of hundreds of millions."""
    random = numpy.random.default_rng(0)
    for m in (1, 2, 3, 5, 8, 11, 13):
        scores = (1e-4 * numpy.exp(random.normal(0, spread, m))).tolist()
        sizes = random.integers(1, largest, m).tolist()
        a_subset = sum(size for size in sizes if random.random() < 0.5)
        shares = [math.ceil(share * sum(sizes)) for share in (0.1, 0.25, 0.5, 0.9, 1.0)]
        for required in (*shares, max(a_subset, 1), min(a_subset + 1, sum(sizes))):
            removed = _covered(scores, sizes, required)
            assert sum(sizes[i] for i in removed) >= required
            best = _brute_force(scores, sizes, required)
            assert sum(scores[i] for i in removed) == pytest.approx(best, rel=1e-9)


def test_a_solution_short_by_less_than_the_solvers_tolerance_is_no_solution():
    """Two of six equal layers hold one parameter too little; the cheapest third one has to go."""
    scores = [0.0, 9.6e-9, 0.0, 9.8e-9, 5.8e-9, 1.0e-8]
    assert _covered(scores, [5_657_920] * 6, 11_315_841) == [0, 2, 4]


def test_the_objective_does_not_fall_with_the_sparsity():
    random = numpy.random.default_rng(1)
    scores, sizes = random.random(12).tolist(), random.integers(1, 10**6, 12).tolist()
    sums = [
        sum(scores[i] for i in _covered(scores, sizes, math.ceil(share * sum(sizes))))
        for share in numpy.linspace(0, 1, 21)
    ]
    assert sums == sorted(sums)
    assert sums[0] == 0 and sums[-1] == pytest.approx(sum(scores))


def test_no_target_selects_nothing():
    assert _covered([1.0, 0.0], [5, 5], 0) == []


def test_too_high_a_target_says_what_the_layers_hold():
    with pytest.raises(CellError, match="11 parameters have to go but the 2 layers hold 10"):
        _covered([1.0, 2.0], [5, 5], 11)
    with pytest.raises(CellError, match="lower the sparsity"):
        select(tiny.context("dit", sparsity=0.99), draws=1)


def test_layers_that_cost_nothing_are_not_removed_in_excess():
    assert _covered([0.0] * 4, [5, 5, 5, 5], 10) in [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert len(_covered([0.0, 0.0, 0.0], [10, 1, 1], 10)) == 1


# Additivity, on a toy residual net whose layers are all alike but for what they write.


class _Residual(nn.Module):
    """x + scale * tanh(x W) on the channels, written to the channels where `mask` is 1."""

    def __init__(self, mask: torch.Tensor, scale: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(len(mask), len(mask), generator=generator))
        self.mask, self.scale = mask, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = torch.einsum("nchw,cd->ndhw", x, self.matrix).tanh()
        return x + self.scale * self.mask.view(-1, 1, 1) * branch


class _Toy(nn.Module):
    def __init__(self, masks: torch.Tensor, scale: float):
        super().__init__()
        self.blocks = nn.ModuleList(_Residual(mask, scale) for mask in masks)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _toy_context(scale: float, orthogonal: bool, sparsity: float = 0.5) -> Context:
    size = 4
    masks = torch.eye(size) if orthogonal else torch.ones(size, size)
    family = SimpleNamespace(
        layers=lambda model, _: [
            Layer(f"blocks.{i}", parameter_count(b))
            for i, b in enumerate(model.blocks)
            if isinstance(b, _Residual)
        ],
        remove_layer=lambda model, name: model.set_submodule(name, Bypass()),
    )
    images = torch.randint(0, 256, (64, size, 4, 4), generator=torch.Generator().manual_seed(1))
    data = loop.Data(images.byte(), torch.zeros(64).long(), objective({"name": "noise"}))
    options = {"method": "toy", "meter": BudgetMeter(), "settings": tiny.settings(), "seed": 0}
    return Context(_Toy(masks, scale), family, {}, data, sparsity=sparsity, **options)


def _ratio(scale: float, orthogonal: bool) -> float:
    """Joint loss over the sum of single ones, for the two of four layers that select removes."""
    plan = select(_toy_context(scale, orthogonal), draws=32, batch=32)
    found = plan.notes["additivity"]
    assert len(plan.layers) == 2
    assert found["ratio"] == pytest.approx(found["joint"] / found["sum"])
    return found["ratio"]


def test_small_orthogonal_contributions_add_up():
    gaps = [abs(_ratio(scale, orthogonal=True) - 1) for scale in (1e-1, 1e-2, 1e-3)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]
    assert gaps[2] < 0.01


def test_equal_contributions_do_not_add_up_however_small():
    """Two layers that write the same: (2d)^2 against d^2 + d^2."""
    assert _ratio(1e-3, orthogonal=False) == pytest.approx(2, rel=0.01)


def test_the_joint_error_is_at_most_the_sum_of_telescoped_steps(core):
    """sqrt(joint) <= sum_k sqrt(mean (f_Sk - f_Sk-1)^2), exactly, on the method's own draws."""
    context = tiny.context(core, sparsity=0.5)
    batches, reference = _scored(context)
    removed = select(tiny.context(core, sparsity=0.5), draws=6, batch=4).layers
    assert len(removed) > 1
    steps, before = [], reference
    for count in range(1, len(removed) + 1):
        steps.append(math.sqrt(output_loss(context, removed[:count], batches, before)))
        with context.without(*removed[:count]) as shell:
            before = predictions(context, shell, batches)
    joint = math.sqrt(output_loss(context, removed, batches, reference))
    assert joint <= sum(steps) * (1 + 1e-6)
    assert joint > 0 and len(set(steps)) == len(steps)


# Removals, and what the row says of itself.


def test_every_removal_keeps_the_outputs_shape(name):
    context = tiny.context(name)
    single = {layer.name for g in ("block", "branch") for layer in context.layers(g)}
    chosen = select(context, draws=1, granularity="branch").layers
    (batch,) = context.draws(2, 2)
    for names in [*((layer,) for layer in sorted(single)), chosen]:
        with context.without(*names) as shell:
            assert predictions(context, shell, [batch]).shape == batch.target.shape, names


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_what_is_removed_is_what_the_plan_counts(core, granularity):
    context = tiny.context(core, sparsity=0.4)
    plan = select(context, draws=1, granularity=granularity, slack=0.0)
    sizes = {layer.name: layer.parameters for layer in context.layers(granularity)}
    pruned = surgery.apply(tiny.dense(core), plan, context.family)
    gone = sum(sizes[removed] for removed in plan.layers)
    assert parameter_count(pruned) == parameter_count(context.model) - gone
    assert plan.notes["share_of_prunable"] == pytest.approx(gone / sum(sizes.values()))
    assert plan.notes["granularity"] == granularity
    assert plan.notes["summary"].startswith("additivity: joint/sum = ")
    required = 0.4 * parameter_count(context.model)
    assert all(gone - sizes[removed] < required <= gone for removed in plan.layers)


def test_slack_rounds_to_the_nearest_number_of_equal_layers():
    """Of four equal blocks 0.25 is nearest to one; the strict constraint takes two."""
    context = tiny.context("dit")
    share = context.layers()[0].parameters / parameter_count(context.model)
    assert 0.125 < share < 0.25
    counts = {slack: len(select(context, draws=1, slack=slack).layers) for slack in (0.0, 0.5)}
    assert counts == {0.0: 2, 0.5: 1}
    nearest = targets.plan_layers(context.model, context.layers(), 0.25)
    assert len(nearest.layers) == 1


def test_scoring_costs_one_pass_for_each_layer_and_two(core):
    """One of the dense model, one of each single removal, one of the chosen set."""
    meter = BudgetMeter()
    context = tiny.context(core, meter=meter)
    select(context, draws=5, batch=4)
    assert meter.counts["student_forward"] == 5 * (len(context.layers()) + 2)
    assert meter.counts["student_backward"] == 0
