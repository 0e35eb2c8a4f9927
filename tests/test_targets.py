"""Targets: exact counts, exact patterns, deterministic ties, and targets that cannot be met."""

import itertools
import math

import pytest
import tiny
import torch

from prunebench.errors import CellError
from prunebench.models.units import Layer, Member, Width, parameter_count
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection.checks import check_target

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def _checked(name: str, plan: Plan, sparsity: float) -> float:
    """Applies a plan and checks its target as the select stage does; returns what was reached."""
    whole, family = tiny.dense(name), tiny.INSTANCES[name].module
    layers = [unit for g in ("block", "branch") for unit in family.layers(whole, g)]
    widths = family.widths(whole) if plan.kept else []
    pruned = surgery.apply(tiny.dense(name), plan, family)
    check_target(whole, pruned, plan, sparsity, targets.tolerance(whole, layers, widths, plan))
    return targets.reached(whole, pruned, plan)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_layers_meet_every_target_within_one(name, granularity, sparsity):
    model, family = tiny.dense(name), tiny.INSTANCES[name].module
    layers = family.layers(model, granularity)
    order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(4))
    plan = targets.plan_layers(model, [layers[i] for i in order], sparsity)
    reached = _checked(name, plan, sparsity) if plan.layers else 0.0
    largest = max(layer.parameters for layer in layers) / parameter_count(model)
    assert abs(reached - sparsity) <= largest / 2 + 1e-9  # stopping elsewhere would be farther


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_widths_meet_every_possible_target(name, sparsity):
    model, family = tiny.dense(name), tiny.INSTANCES[name].module
    units = family.widths(model)
    sizes = targets.Sizes(model, units)
    possible = sizes.removed({u.name: u.size - u.groups for u in units}) / sizes.total
    plan = tiny.plan(name, "widths", sparsity)
    unit = targets.tolerance(model, [], units, plan)
    if possible + unit < sparsity:
        with pytest.raises(CellError, match=f"the target is {sparsity} and one unit is"):
            _checked(name, plan, sparsity)
    else:
        assert abs(_checked(name, plan, sparsity) - sparsity) <= unit


def test_sizes_predict_what_surgery_removes(name):
    """For plans in which axes shared by several widths shrink by different numbers."""
    family, units = (
        tiny.INSTANCES[name].module,
        tiny.INSTANCES[name].module.widths(tiny.dense(name)),
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        counts, kept = {}, {}
        for unit in units:
            rounds = int(torch.randint(unit.size // unit.groups, (1,), generator=generator))
            counts[unit.name] = rounds * unit.groups
            scores = torch.rand(unit.size, generator=generator)
            kept[unit.name] = targets.highest(scores, unit, counts[unit.name])
        model = tiny.dense(name)
        before, predicted = parameter_count(model), targets.Sizes(model, units).removed(counts)
        surgery.apply(model, Plan(kept=kept), family)
        assert before - parameter_count(model) == predicted > 0
        assert tiny.output(model, name).isfinite().all()


def test_width_plans_keep_normalisation_groups_balanced():
    units = tiny.INSTANCES["unet"].module.widths(tiny.dense("unet"))
    kept = tiny.plan("unet", "widths", 0.4).kept
    normed = [unit for unit in units if unit.groups > 1 and unit.name in kept]
    assert normed
    for unit in normed:
        block = unit.size // unit.groups
        per_group = [sum(i // block == g for i in kept[unit.name]) for g in range(unit.groups)]
        assert len(set(per_group)) == 1


def test_width_plans_remove_the_lowest_of_each_group():
    unit = Width("w", 6, (Member("weight", 0, torch.arange(6).unsqueeze(1)),), groups=2)
    model = torch.nn.Linear(10, 6, bias=False)
    scores = {"w": torch.tensor([3.0, 1.0, 2.0, 30.0, 20.0, 10.0])}
    assert targets.plan_widths(model, [unit], scores, 1 / 3).kept == {"w": (0, 2, 3, 4)}
    tied = {"w": torch.ones(6)}
    assert targets.plan_widths(model, [unit], tied, 1 / 3).kept == {"w": (1, 2, 4, 5)}
    assert targets.plan_widths(model, [unit], scores, 0.99).kept == {"w": (0, 3)}
    assert targets.plan_widths(model, [unit], scores, 1e-6).kept == {}


def test_widths_without_a_target_leave_the_network_alone(core):
    plan = tiny.plan(core, "widths", 1e-9)
    assert not plan.kept
    model = surgery.apply(tiny.dense(core), plan, tiny.INSTANCES[core].module)
    assert torch.equal(tiny.output(model, core), tiny.output(tiny.dense(core), core))


def test_output_channels_survive_any_ratio():
    family = tiny.INSTANCES["unet"].module
    for sparsity in (0.2, 0.6, 0.85):
        model = surgery.apply(tiny.dense("unet"), tiny.plan("unet", "widths", sparsity), family)
        assert model.conv_out.out_channels == 1 and model.conv_in.in_channels == 1


def test_layers_go_in_the_given_order_unless_they_lead_away_from_the_target():
    model = torch.nn.Linear(100, 1, bias=False)
    order = [Layer("a", 10), Layer("b", 30), Layer("c", 5)]
    for sparsity, expected in ((0.1, "a"), (0.2, "ac"), (0.3, "ab"), (0.4, "ab"), (0.45, "abc")):
        assert targets.plan_layers(model, order, sparsity).layers == tuple(expected)
    assert targets.plan_layers(model, order, 0.04).layers == ("c",)
    assert targets.plan_layers(model, order, 0.02).layers == ()
    assert targets.plan_layers(model, order, 0.9, why="x").notes == {"why": "x"}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_unstructured_masks_have_exactly_the_count(name, sparsity):
    model, family = tiny.dense(name), tiny.INSTANCES[name].module
    available = sum(model.get_parameter(weight).numel() for weight in family.weights(model))
    count = round(sparsity * parameter_count(model))
    if count > available:
        with pytest.raises(CellError, match=f"needs {count} zeros but only {available} weights"):
            tiny.plan(name, "unstructured", sparsity)
        return
    plan = tiny.plan(name, "unstructured", sparsity)
    assert sum(int((~mask).sum()) for mask in plan.masks.values()) == count
    _checked(name, plan, sparsity)


def test_unstructured_masks_are_global_and_ties_go_in_order():
    model = torch.nn.Linear(10, 1, bias=False)
    scores = {"a": torch.tensor([[1.0, 1.0, 5.0]]), "b": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    masks = targets.plan_weights(model, scores, 0.3).masks
    assert masks["a"].tolist() == [[False, False, True]]
    assert masks["b"].tolist() == [True, False, True, True]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("shape", [(6, 16), (5, 8, 3, 3)], ids=["linear", "conv"])
def test_n_of_m_masks_keep_the_n_highest_of_every_m(n, m, shape):
    score = torch.rand(shape, generator=torch.Generator().manual_seed(6))
    mask = targets.n_of_m_mask(score, n, m)
    assert mask.shape == score.shape and mask.is_contiguous()
    rows, columns = score.movedim(1, -1).reshape(-1, shape[1]), mask.movedim(1, -1)
    for row, kept in zip(rows, columns.reshape(-1, shape[1]), strict=True):
        for start in range(0, shape[1], m):
            group, chosen = row[start : start + m], kept[start : start + m]
            assert chosen.sum() == n
            assert group[chosen].min() > group[~chosen].max()


def test_n_of_m_ties_are_deterministic():
    assert targets.n_of_m_mask(torch.ones(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]


def test_n_of_m_leaves_unfitting_weights_dense(name):
    plan = tiny.plan(name, "2:4")
    scores = {"fits": torch.rand(3, 8), "odd": torch.rand(8, 6)}
    mixed = targets.plan_n_of_m(scores, 2, 4)
    assert set(mixed.masks) == {"fits"} and mixed.notes["stay_dense"] == ["odd"]
    assert all(mask.float().mean() == 0.5 for mask in plan.masks.values())
    targets.check_n_of_m(plan, {name: mask.shape for name, mask in plan.masks.items()})
    with pytest.raises(CellError, match="'more' is not masked; a 2:4 plan masks every weight"):
        targets.check_n_of_m(mixed, {"fits": (3, 8), "odd": (8, 6), "more": (4, 4)})


def test_broken_n_of_m_masks_are_found():
    three = torch.tensor([[True, True, True, False]])
    for masks in ({"w": three}, {"w": torch.ones(1, 6, dtype=torch.bool)}):
        with pytest.raises(CellError, match="'w' does not keep 2 of every 4"):
            targets.check_n_of_m(Plan(masks=masks, pattern="2:4"), {})


@pytest.mark.parametrize(("n", "m"), [(4, 4), (1, 1), (0, 4), (5, 4), (-1, 2)])
def test_patterns_that_remove_nothing_or_all_are_refused(n, m):
    with pytest.raises(CellError, match="must be from 1 to M - 1"):
        targets.plan_n_of_m({"w": torch.rand(4, 20)}, n, m)
    if n >= 0:
        everything = Plan(masks={"w": torch.ones(4, 20, dtype=torch.bool)}, pattern=f"{n}:{m}")
        with pytest.raises(CellError, match=f"a pattern {n}:{m} removes"):
            targets.check_n_of_m(everything, {})


@pytest.mark.parametrize("pattern", ["two:four", "2:4:8", "2", "", "2:4 "])
def test_other_words_are_no_pattern(pattern):
    with pytest.raises(CellError, match="unknown pattern"):
        targets.check_n_of_m(Plan(pattern=pattern), {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_are_refused_with_the_unit(value):
    model, family = tiny.dense("dit"), tiny.INSTANCES["dit"].module
    weights = {name: model.get_parameter(name).detach().clone() for name in family.weights(model)}
    last = list(weights)[-1]
    weights[last].view(-1)[3] = value
    for plan in (lambda s: targets.plan_weights(model, s, 0.25),
                 lambda s: targets.plan_n_of_m(s, 2, 4)):  # fmt: skip
        with pytest.raises(CellError, match=f"1 of .* scores of weight '{last}' are not finite"):
            plan(weights)
    units = family.widths(model)
    scores = {unit.name: torch.rand(unit.size) for unit in units}
    plans = (lambda s: targets.plan_widths(model, units, s, 0.25),
             lambda s: targets.plan_uniform(units, s, 0.25))  # fmt: skip
    for plan in plans:
        assert plan(scores).kept
        wrong = {
            **scores,
            units[0].name: scores[units[0].name].clone().index_fill_(0, torch.tensor(1), value),
        }
        with pytest.raises(CellError, match=f"1 of .* scores of width '{units[0].name}'"):
            plan(wrong)
        with pytest.raises(CellError, match=f"width '{units[0].name}' has no scores"):
            plan({name: score for name, score in scores.items() if name != units[0].name})
        with pytest.raises(CellError, match=f"scores of width '{units[0].name}' are "):
            plan({**scores, units[0].name: torch.rand(3)})


def test_reached_counts_removed_and_masked():
    dense, pruned = torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 8, bias=False)
    assert targets.reached(dense, pruned, Plan()) == pytest.approx(0.2)
    mask = torch.arange(80).view(8, 10) >= 20
    plan = Plan(masks={"weight": mask}, pattern="unstructured")
    assert targets.reached(dense, pruned, plan) == pytest.approx(0.4)


def test_a_target_missed_by_more_than_a_unit_is_an_error():
    plan = tiny.plan("dit", "block", 0.5)
    assert len(plan.layers) == 2
    for sparsity in (0.5, 0.6):
        assert _checked("dit", plan, sparsity) == pytest.approx(2 * 18912 / 87684)
    with pytest.raises(
        CellError, match=r"removes 0\.4314 .* target is 0\.8 and one unit is 0\.2157"
    ):
        _checked("dit", plan, 0.8)
    with pytest.raises(CellError, match=r"the target is 0\.3"):
        _checked("dit", Plan(steps=0.5), 0.3)


@pytest.mark.parametrize("kind", ["block", "widths", "unstructured"])
def test_most_is_what_can_go_and_no_more(name, kind):
    """The track's own check of its sparsities: just below it is a plan, just above it is none."""
    family, model = tiny.INSTANCES[name].module, tiny.dense(name)
    most = targets.most(model, family, {"block": "layers", "widths": "widths"}.get(kind, "weights"))
    plan = tiny.plan(name, kind, most - 1e-6)
    pruned = surgery.apply(model, plan, family)
    assert targets.reached(tiny.dense(name), pruned, plan) == pytest.approx(most, abs=2e-5)
    if kind == "unstructured":
        with pytest.raises(CellError, match="weights can be masked"):
            tiny.plan(name, kind, most + 1e-4)


# Ranking.


def _rows(*sizes: int, kinds: str = "heads") -> tuple[torch.nn.Module, list[Width]]:
    """Matrices [size, 3] whose rows are a width each that may be empty, of the kinds in turn."""
    model = torch.nn.ModuleList(torch.nn.Linear(3, size, bias=False) for size in sizes)
    named = zip(sizes, itertools.cycle(kinds.split()))
    return model, [
        Width(f"{i}.{kind}", n, (Member(f"{i}.weight", 0, torch.arange(n).view(-1, 1)),), 1, True)
        for i, (n, kind) in enumerate(named)
    ]


def test_a_global_rank_takes_the_lowest_wherever_they_are():
    """A third of nine equal channels: two of the first width and one of the last."""
    model, units = _rows(2, 3, 4)
    values = [[2.0, 1.0], [9.0, 8.0, 7.0], [5.0, 4.0, 0.0, 6.0]]
    scores = {u.name: torch.tensor(value) for u, value in zip(units, values, strict=True)}
    plan = targets.plan_ranked(model, units, scores, 3 / 9)
    assert plan.kept == {"0.heads": (), "2.heads": (0, 1, 3)}
    local = targets.plan_ranked(model, units, scores, 3 / 9, "local")
    assert local.kept == {"0.heads": (0,), "1.heads": (0, 1), "2.heads": (0, 1, 3)}


POOLS = {
    "global": [["0.heads", "1.neurons", "2.heads", "3.neurons"]],
    "kinds": [["0.heads", "2.heads"], ["1.neurons", "3.neurons"]],
    "local": [["0.heads"], ["1.neurons"], ["2.heads"], ["3.neurons"]],
}


@pytest.mark.parametrize("stays", [0.9, 0.8, 0.55, 0.3])
@pytest.mark.parametrize("scope", targets.SCOPES)
def test_of_every_pool_the_highest_floor_of_its_share_stays(scope, stays):
    """With equal channels a target in parameters is one in channels."""
    model, units = _rows(20, 40, 20, 80, kinds="heads neurons")
    generator = torch.Generator().manual_seed(0)
    scores = {unit.name: torch.rand(unit.size, generator=generator) for unit in units}
    plan = targets.plan_ranked(model, units, scores, 1 - stays, scope)
    for pool in POOLS[scope]:
        ranked = torch.cat([scores[name] for name in pool]).sort(descending=True).values
        kept = torch.cat([scores[name][list(plan.kept[name])] for name in pool])
        count = math.floor(len(ranked) * stays + 1e-9)
        assert torch.equal(kept.sort(descending=True).values, ranked[:count])


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("scope", targets.SCOPES)
def test_ranked_plans_meet_their_target_within_one_unit(core, scope, sparsity):
    model, family = tiny.dense(core), tiny.INSTANCES[core].module
    units, generator = family.widths(model), torch.Generator().manual_seed(1)
    scores = {unit.name: torch.randn(unit.size, generator=generator) for unit in units}
    plan = targets.plan_ranked(model, units, scores, sparsity, scope)
    unit = targets.tolerance(model, [], units, plan)
    assert abs(_checked(core, plan, sparsity) - sparsity) <= unit
    assert len({len(kept) for kept in plan.kept.values()}) > 1


def test_only_ranked_widths_lose_channels():
    context = tiny.context("dit", sparsity=0.1)
    scores = {u.name: torch.rand(u.size) for u in context.widths() if u.name.endswith("neurons")}
    assert set(context.plan_ranked(scores).kept) <= set(scores)


def test_what_may_not_be_empty_keeps_a_channel_of_each_group():
    model, family = tiny.dense("unet"), tiny.INSTANCES["unet"].module
    units = family.widths(model)
    scores = {unit.name: torch.full((unit.size,), float(i)) for i, unit in enumerate(units)}
    kept = targets.plan_ranked(model, units, scores, 0.6).kept
    grouped = [unit for unit in units if unit.name in kept and not unit.may_be_empty]
    assert min(len(kept[unit.name]) - unit.groups for unit in grouped) == 0
    assert surgery.apply(model, Plan(kept=kept), family)


def test_an_unknown_scope_is_refused():
    model, units = _rows(4)
    with pytest.raises(CellError, match="scope is 'glob'; known: global, kinds, local"):
        targets.plan_ranked(model, units, {"0.heads": torch.rand(4)}, 0.5, "glob")
