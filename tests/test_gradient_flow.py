"""Gradient-flow pruning against arithmetic done by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunebench.errors import CellError
from prunebench.models.units import Member, Width
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection import checks as selection
from prunebench.selection.scores import accumulate_gradients
from prunebench.selection.soft_masks import full, gains, hard, masked, readers
from prunebench.tracks import methods

FOUND = tiny.found_methods()["gradient_flow"]
NAMESPACE = methods.load(FOUND).__globals__
select, hessian_gradient, slopes = (NAMESPACE[n] for n in ("select", "hessian_gradient", "slopes"))
soft, flow, direction, step_sizes = (
    NAMESPACE[n] for n in ("soft", "flow", "direction", "step_sizes")
)
gated, spread = NAMESPACE["gated"], NAMESPACE["spread"]
QUICK = {"rounds": 2, "timesteps": 2, "batch": 4, "flow_steps": 2, "share": 0.5}


def _groups(context):
    return [readers(unit, context.model) for unit in context.widths()]


def _in_double(name: str):
    """A context whose model and losses compute in double precision, for differences."""
    context = tiny.context(name)
    units = context.widths()  # traced in single precision
    context.widths = lambda: units
    context.model.double()
    draw = context.data.draw

    def double(*arguments):
        batch = draw(*arguments)
        floats = {k: v for k, v in vars(batch).items() if getattr(v, "dtype", 0) == torch.float32}
        return dataclasses.replace(batch, **{k: v.double() for k, v in floats.items()})

    object.__setattr__(context.data, "draw", double)
    return context


def _leaves(model: nn.Module) -> dict:
    return {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}


# The score, on a quadratic.

X, Y = torch.tensor([1.0, 2.0]).diag(), torch.tensor([3.0, 0.0])
READS = Width("w", 2, (Member("0.weight", 1, torch.tensor([[0], [1]])),))


def _quadratic(weights):
    return 0.5 * (X @ weights["0.weight"][0] - Y).square().sum()


def _squared_gradient(w: list[float]) -> float:
    return (X.T @ (X @ torch.tensor(w).float() - Y)).square().sum().item()


def test_the_scores_of_a_quadratic():
    network = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.ones_(network[0].weight)
    leaves = _leaves(network)
    (gradient,) = torch.autograd.grad(_quadratic(leaves), list(leaves.values()))
    assert gradient.tolist() == [[-2, 4]]
    assert hessian_gradient([_quadratic], leaves)["0.weight"].tolist() == [[-2, 16]]
    masks = {"w": torch.ones(2)}
    scores = -slopes([_quadratic], network, [READS], False, masks)["w"]
    assert scores.tolist() == [2, -16], "S = -w (H G)"
    assert slopes([_quadratic], network, [READS], True, masks)["w"].tolist() == [2, 16]
    # Removing w0 raises the squared gradient norm (4 to first order and 1), w1 lowers it.
    change = [_squared_gradient(w) - _squared_gradient([1, 1]) for w in ([0, 1], [1, 0])]
    assert change == [5, -16]
    first = scores.argmax()
    assert first == 0, "w0 goes first although |w| ties and |w G| is (2, 4)"


# The double backward.


def _toy_losses():
    generator = torch.Generator().manual_seed(0)
    toy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    draws = [torch.randn(5, 5, generator=generator).double() for _ in range(2)]
    losses = [
        lambda weights, d=d: (functional_call(toy, weights, (d[:, :3],)) - d[:, 3:]).square().sum()
        for d in draws
    ]
    return _leaves(toy), losses


def test_the_double_backward_is_the_hessian_times_the_gradient():
    """Explicit Hessian of the summed loss; a G that is not detached would double the result."""
    leaves, losses = _toy_losses()
    names, values = list(leaves), list(leaves.values())

    def total(*given):
        return sum(loss(dict(zip(names, given, strict=True))) for loss in losses)

    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total(*values), values)])
    blocks = torch.autograd.functional.hessian(total, tuple(values))
    rows = [
        torch.cat([b.flatten(v.dim()).flatten(0, v.dim() - 1) for b in row], dim=1)
        for row, v in zip(blocks, values, strict=True)
    ]
    expected = torch.cat(rows) @ gradient
    found = torch.cat([p.flatten() for p in hessian_gradient(losses, leaves).values()])
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_double_backward_of_a_network_is_the_hessian_vector_product(core):
    context = _in_double(core)
    losses, leaves = gated(context, 0.0, 2, 3), _leaves(context.model)
    names, values = list(leaves), list(leaves.values())

    def total(*given):
        return sum(loss(dict(zip(names, given, strict=True))) for loss in losses)

    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(total(*values), values, materialize_grads=True)
        _, expected = torch.autograd.functional.hvp(total, tuple(values), gradient)
    found = hessian_gradient(losses, leaves)
    assert any(product.abs().max() > 1e-6 for product in expected)
    for name, product in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], product, rtol=1e-5, atol=1e-9, msg=name)


def test_the_timesteps_are_those_of_diff_pruning(core):
    """Same draw, same gate: as many times as Diff-Pruning accumulates gradients of."""
    for threshold in (0.0, 0.95):
        ours = len(gated(tiny.context(core), threshold, 12, 4))
        assert ours == accumulate_gradients(tiny.context(core), 12, 4, threshold)
    assert len(gated(tiny.context(core), 0.0, 12, 4)) == 12


def test_activation_checkpointing_does_not_change_the_scores():
    """Blocks that are computed again are so with m * w, not with the model's own weights."""
    found = []
    for wanted in (False, True):
        context = tiny.context("ldm", settings=tiny.settings(activation_checkpointing=wanted))
        masks = {n: 0.5 * mask for n, mask in full(context.model, context.widths()).items()}
        losses = gated(context, 0.0, 2, 3)
        found.append(slopes(losses, context.model, _groups(context), False, masks))
    tiny.assert_same(*found)


def test_micro_batches_do_not_change_the_scores():
    context = _in_double("dit")
    whole, parts = (gated(_in_double("dit"), 0.0, 2, 5, at_once) for at_once in (5, 2))
    assert (len(whole), len(parts)) == (2, 6)
    masks = {n: 0.5 * m.double() for n, m in full(context.model, context.widths()).items()}
    first, second = (
        slopes(losses, context.model, _groups(context), False, masks) for losses in (whole, parts)
    )
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected)
    plan, _ = select(tiny.context("dit"), **{**QUICK, "micro_batch": 3})
    assert plan.notes["times"] == 2


# The step of the flow.


@pytest.mark.parametrize("seed", range(5))
def test_the_step_of_the_flow(seed):
    e, s = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed)).double()
    delta = direction(e, s, 1.1).double()
    assert (delta @ s).item() == pytest.approx(1, abs=1e-6)
    assert (delta.norm() * s.norm()).item() == pytest.approx(1.1, abs=1e-6)
    scaled = direction(1e-6 * e, s, 1.1).double()
    torch.testing.assert_close(scaled, delta), "the scale of the energy does not matter"


@pytest.mark.parametrize("factor", [0.0, -3.0, 1e-4])
def test_an_energy_parallel_to_the_sparsity_coordinate_only_shrinks(factor):
    s = -torch.rand(50, generator=torch.Generator().manual_seed(0))
    delta = direction(factor * s, s, 1.1)
    torch.testing.assert_close(delta, s / (s @ s))


# The step sizes of the flow.


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_the_step_sizes_sum_to_what_goes(kind):
    sizes = step_sizes(0.56, 100, kind)
    assert len(sizes) == 100 and min(sizes) > 0
    assert sum(sizes) == pytest.approx(0.44, abs=1e-9)


def test_exponential_steps_shrink_by_one_factor():
    sizes = step_sizes(0.56, 100, "exponential")
    assert sizes[0] == pytest.approx(1 - 0.56**0.01)
    assert sizes[99] / sizes[98] == pytest.approx(0.56**0.01)


# Masks and surgery.


def _half(unit: Width) -> tuple[int, ...]:
    block = unit.size // unit.groups
    return tuple(c for c in range(unit.size) if c % block < max(1, block // 2))


def _masked_and_sliced(name: str, chosen) -> tuple[torch.Tensor, torch.Tensor]:
    model, family = tiny.dense(name), tiny.INSTANCES[name].module
    units = family.widths(model)
    plan = Plan(kept={unit.name: _half(unit) for unit in units if chosen(unit)})
    groups = [readers(unit, model) for unit in units]
    with masked(model, groups, hard(plan, full(model, units))):
        by_mask = tiny.output(model, name)
    return by_mask, tiny.output(surgery.apply(tiny.dense(name), plan, family), name)


def test_a_mask_of_zero_is_surgery_where_no_norm_spans_the_channels(name):
    by_mask, sliced = _masked_and_sliced(name, lambda unit: unit.groups == 1)
    assert not torch.allclose(by_mask, tiny.output(tiny.dense(name), name), atol=1e-3)
    torch.testing.assert_close(by_mask, sliced, rtol=1e-5, atol=1e-5)


def test_a_mask_of_zero_is_not_surgery_across_a_group_norm():
    """Stated in soft_masks: the statistics still hold the masked channels."""
    by_mask, sliced = _masked_and_sliced("unet", lambda unit: unit.groups > 1)
    assert not torch.allclose(by_mask, sliced, atol=1e-3)


def test_every_width_has_weights_that_read_it(name):
    context = tiny.context(name)
    assert all(group.members for group in _groups(context))


def test_a_mask_multiplies_the_signal_once():
    """Half a mask on every neuron of an MLP halves what the MLP writes, less its bias."""
    context = tiny.context("dit")
    mlp = context.model.blocks[0].mlp
    groups = [group for group in _groups(context) if group.name == "blocks.0.mlp.neurons"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = mlp(x) - mlp.fc2.bias
    with masked(context.model, groups, {groups[0].name: torch.full((groups[0].size,), 0.5)}):
        after = mlp(x) - mlp.fc2.bias
    torch.testing.assert_close(after, before / 2)


def test_training_under_masks_trains_the_raw_weights(core):
    context = tiny.context(core, train_images=16)
    masks = {name: 0.5 * mask for name, mask in full(context.model, context.widths()).items()}
    groups = _groups(context)
    name = groups[0].members[0].tensor
    raw = context.model.get_parameter(name).detach().clone()
    with masked(context.model, groups, masks):
        path, _, leaf = name.rpartition(".")
        torch.testing.assert_close(getattr(context.model.get_submodule(path), leaf), raw / 2)
        context.train(context.model, 16)
    trained = context.model.get_parameter(name)
    assert context.model.state_dict().keys() == tiny.dense(core).state_dict().keys()
    assert not torch.equal(trained, raw), "the masked weight was not trained"
    assert (trained - raw).norm() < 0.3 * raw.norm(), "the mask was folded into the raw weight"


# The link between the two processes (section 2.2).


def _half_squared_gradient(losses, network, groups, masks) -> float:
    factors = gains(network, groups, masks)
    leaves = {
        n: (p.detach() * factors.get(n, 1)).requires_grad_() for n, p in network.named_parameters()
    }
    total = sum(loss(leaves) for loss in losses)
    gradient = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return sum(g.square().sum() for g in gradient).item() / 2


@pytest.mark.parametrize("level", [1.0, 0.7])
def test_minus_the_score_is_the_slope_of_the_energy(core, level):
    """Central differences of 1/2 |G(m * w)|^2 in single masks, at full and at lowered masks."""
    context = _in_double(core)
    losses, groups = gated(context, 0.0, 2, 3), _groups(context)
    masks = {n: level * m.double() for n, m in full(context.model, context.widths()).items()}
    found = slopes(losses, context.model, groups, False, masks)
    for unit in groups[::5]:
        energy = []
        for step in (1e-4, -1e-4):
            moved = {**masks, unit.name: masks[unit.name].clone()}
            moved[unit.name][1] += step
            energy.append(_half_squared_gradient(losses, context.model, groups, moved))
        slope = (energy[0] - energy[1]) / 2e-4
        assert found[unit.name][1].item() == pytest.approx(slope, rel=1e-4, abs=1e-9), unit.name


def test_a_gradient_in_the_raw_weights_would_add_its_own_square():
    """Why the effective-weight definition: d/dm of 1/2 |grad_w L(m * w)|^2 is w H G + G^2."""
    w, m = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = _quadratic({"0.weight": (m * w).unsqueeze(0)})
    (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.square().sum() / 2, m)
    assert slope.tolist() == [-2 + 4, 16 + 16]


def test_the_flow_first_lowers_what_soft_masks_choose_first(core):
    context = tiny.context(core)
    units, groups = context.widths(), _groups(context)
    losses, ones = gated(context, 0.0, 2, 4), full(context.model, units)

    def slope(masks):
        return slopes(losses, context.model, groups, False, masks)

    def plan_at(scores, part=1.0):
        return targets.plan_widths(context.model, units, scores, part * context.sparsity)

    (by_soft,) = soft(ones, slope, plan_at, rounds=1, schedule="linear", own_decay=False)
    scores = torch.cat([*slope(ones).values()])
    delta = direction(scores, -torch.ones_like(scores) / len(scores), 1.1)
    assert torch.equal(delta.argsort(stable=True), scores.argsort(stable=True))
    # A step too short to be clamped, which would tie the masks that rise.
    moved = (1 + 1e-3 * delta).split([len(mask) for mask in ones.values()])
    by_flow = hard(plan_at(dict(zip(ones, moved, strict=True))), ones)
    tiny.assert_same(by_flow, by_soft)


# The schedule, on one width whose lowest slopes are chosen.


def _lowest(scores, part=1.0):
    count = round(part * 8)
    return Plan(kept={"w": tuple(scores["w"].argsort(stable=True)[count:].tolist())})


def _soft(slope, rounds=4, schedule="linear", own_decay=False):
    masks = soft({"w": torch.ones(16)}, slope, _lowest, rounds, schedule, own_decay)
    return torch.stack([mask["w"] for mask in masks])


def _fixed(_):
    return {"w": torch.arange(16.0)}


def test_soft_masks_fall_to_zero_without_rising():
    masks = _soft(_fixed)
    assert masks[:, 0].tolist() == [0.75, 0.5, 0.25, 0]
    for own_decay in (False, True):
        for schedule in ("linear", "cubic"):
            masks = _soft(_fixed, schedule=schedule, own_decay=own_decay)
            assert (masks.diff(dim=0) <= 0).all(), "a mask rose although the choice is the same"
            assert set(masks[-1].tolist()) == {0, 1} and masks[-1].sum() == 8


def test_the_chosen_share_follows_the_schedule():
    shares = {s: (_soft(_fixed, schedule=s) < 1).sum(1).tolist() for s in ("linear", "cubic")}
    assert shares == {"linear": [2, 4, 6, 8], "cubic": [round(8 * x) for x in _cubic(4)]}


def _cubic(rounds: int) -> list[float]:
    return [1 - (1 - k / rounds) ** 3 for k in range(1, rounds + 1)]


def test_groups_come_back():
    orders = iter([torch.arange(16.0), -torch.arange(16.0)])
    masks = _soft(lambda _: {"w": next(orders)}, rounds=2)
    assert masks[0].tolist() == [0.5] * 4 + [1] * 12
    assert masks[1].tolist() == [1] * 8 + [0] * 8


def test_own_decay_avoids_the_jump_of_late_choices():
    """1 / K a round for what is chosen from the start, 1 / (rounds left) for what comes later."""
    alike, own = (_soft(_fixed, own_decay=flag) for flag in (False, True))
    assert own[:, 0].tolist() == alike[:, 0].tolist() == [0.75, 0.5, 0.25, 0]
    assert alike[:, 2].tolist() == [1, 0.5, 0.25, 0]
    assert own[:, 2].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_own_decay_ends_at_zeros_and_ones_whatever_was_chosen_before():
    generator = torch.Generator().manual_seed(0)
    masks = _soft(lambda _: {"w": torch.rand(16, generator=generator)}, 7, own_decay=True)
    assert set(masks[-1].tolist()) == {0, 1} and len(set(masks.flatten().tolist())) > 7


@pytest.mark.parametrize("own_decay", [False, True])
def test_one_round_is_one_shot_pruning(core, own_decay):
    """The plan of the scores of the dense model, of which nothing is trained."""
    context = tiny.context(core)
    plan, _ = select(context, process="soft", rounds=1, timesteps=2, batch=4, own_decay=own_decay)
    again = tiny.context(core)
    ones = full(again.model, again.widths())
    scores = slopes(gated(again, 0.05, 2, 4), again.model, _groups(again), False, ones)
    assert plan.kept == again.plan_widths(scores).kept
    assert plan.notes["mask_before_removal"] == 1


def test_masks_of_the_flow_stay_in_range_and_end_hard():
    ones = {"w": torch.ones(16)}
    generator = torch.Generator().manual_seed(0)
    rounds = list(
        flow(
            ones,
            lambda _: {"w": torch.randn(16, generator=generator)},
            _lowest,
            3,
            7,
            1.1,
            "linear",
        )
    )
    assert len(rounds) == 3
    assert all(mask["w"].min() >= 0 and mask["w"].max() <= 1 for mask in rounds)
    assert rounds[1]["w"].mean() < rounds[0]["w"].mean() < 1
    assert set(rounds[2]["w"].tolist()) == {0, 1} and rounds[2]["w"].sum() == 8


# The method as a whole.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dt": "exponential", "score": "unsigned"},
        {"process": "soft", "schedule": "cubic", "own_decay": True, "uniform": True},
    ],
)
def test_every_option_gives_a_valid_plan(core, options):
    context = tiny.context(core, train_images=64)
    plan, model = selection.select(context, select, "widths", {**QUICK, **options})
    assert context.trained_images == 32, "half of the budget"
    assert plan.pattern == ("uniform" if "uniform" in options else None)
    assert 0 < plan.notes["mask_before_removal"] <= 1
    assert not any("parametrizations" in name for name in model.state_dict())


def test_what_training_did_is_in_the_returned_model():
    """Raw weights, sliced: neither the dense weights nor those scaled by a mask."""
    context = tiny.context("dit", train_images=64)
    plan, model = select(context, **QUICK)
    dense = surgery.apply(tiny.dense("dit"), plan, context.family)
    for name, weight in dense.named_parameters():
        moved = (model.get_parameter(name) - weight).norm() / weight.norm()
        assert 0 < moved < 0.5, f"{name} is off by {moved:.2f} of its norm"


def test_training_in_between_changes_later_choices():
    kept = [
        select(tiny.context("dit", train_images=images), **{**QUICK, "share": 1.0})[0].kept
        for images in (0, 64)
    ]
    assert kept[0] != kept[1]


def test_the_budget_is_spread_in_whole_steps():
    def images(total, share, rounds):
        context = SimpleNamespace(train_images=total, settings=tiny.settings(batch=8))
        return spread(context, share, rounds)

    assert images(64, 0.5, 2) == [16, 16]
    assert images(100, 0.5, 4) == [8, 16, 8, 16], "six steps of eight images"
    assert images(16, 0.5, 3) == [0, 0, 8], "fewer steps than rounds"
    assert images(0, 0.5, 2) == [0, 0]


def test_the_control_sums_magnitudes_of_single_weights(core):
    """So it bounds the signed sum, and is above it where a group's terms have both signs."""
    context = tiny.context(core)
    losses, units = gated(context, 0.0, 2, 3), context.widths()
    signed, magnitude = (
        slopes(losses, context.model, _groups(context), absolute, full(context.model, units))
        for absolute in (False, True)
    )
    for name, sums in signed.items():
        assert (magnitude[name] >= sums.abs() - 1e-9).all(), name
    assert any((magnitude[n] > 1.5 * signed[n].abs() + 1e-9).any() for n in signed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "hard"}, "process is 'hard'; known: soft, flow"),
        ({"score": "HG"}, "score is 'HG'; known: signed, unsigned"),
        ({"rounds": 0}, "rounds is 0 and r is 1.1; both must be at least 1"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(CellError, match=message):
        select(tiny.context("dit"), **options)


def test_it_is_labelled_as_a_guess_and_not_cited():
    rows = (FOUND, *FOUND.variants)
    assert [row.name for row in rows] == [
        f"gradient_flow{end}" for end in ("", "_unsigned", "_literal")
    ]
    for row in rows:
        assert row.reconstruction and row.title.endswith("(reconstruction)")
        assert row.guessed and not row.bibtex
    assert len({row.guessed for row in rows}) == 3, "each says what it assumes"
    page = (tiny.ROOT / "docs" / "methods" / "gradient_flow.md").read_text()
    assert page.startswith("# Gradient-flow pruning (reconstruction)")


def test_a_row_says_how_much_of_the_budget_trained_under_soft_masks():
    plan, _ = select(tiny.context("dit", train_images=64), **QUICK)
    assert plan.notes["summary"].endswith("; 32 of 64 images trained under soft masks")
    plan, _ = select(tiny.context("dit"), **QUICK)
    assert "trained" not in plan.notes["summary"]
