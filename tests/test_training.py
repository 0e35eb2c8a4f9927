"""The training loop and the budget meter."""

import copy
import dataclasses
import math

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call

from prunebench.errors import CellError, UserError
from prunebench.models.activations import checkpoint_activations
from prunebench.pruning import surgery
from prunebench.selection.contract import counting
from prunebench.training import loop
from prunebench.training.budget import KEYS, BudgetMeter, unspent


def _train(name: str, model: nn.Module, **options) -> list[float]:
    settings = tiny.settings(**options.pop("settings", {}))
    options = {"images": 64, "seed": 0, **options}
    names = tiny.INSTANCES[name].module.weights(model)
    return loop.train(model, tiny.data(name), settings, muon_names=names, **options)


@pytest.mark.parametrize("muon", [0.0, 5e-3])
def test_the_loss_falls(core, muon):
    model = tiny.dense(core)
    losses = _train(core, model, images=320, settings={"muon_learning_rate": muon})
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not model.training


def test_the_loss_is_the_objectives(name):
    """The mean squared error to the target; in training, DiT's has a term for its variance."""
    data, model = tiny.data(name), tiny.dense(name)
    batch = data.draw(4, torch.Generator().manual_seed(0), torch.device("cpu"))
    noised, target = data.objective.noised(batch.x0, batch.noise, batch.t)
    assert torch.equal(batch.noised, noised) and torch.equal(batch.target, target)
    with torch.no_grad():
        output = model(noised, data.objective.model_time(batch.t), batch.y)
        simple = (output[:, : tiny.INSTANCES[name].channels] - target).square().mean().item()
        assert loop.simple_loss(model, batch).item() == pytest.approx(simple, rel=1e-5)
        more = 0
        if output.shape != target.shape:
            more = data.objective.variance_loss(output, batch.x0, noised, batch.t).item()
        assert loop.own_loss(model, batch).item() == pytest.approx(simple + more, rel=1e-5)
        assert (more > 0) == (name == "dit_sigma")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_same_seed_gives_the_same_weights(core, ema):
    states = []
    for seed in (0, 0, 1):
        model = tiny.dense(core)
        torch.manual_seed(len(states))  # global randomness takes no part
        _train(core, model, seed=seed, settings={"ema": ema, "class_dropout": 0.2})
        states.append(model.state_dict())
    tiny.assert_same(states[0], states[1])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


@pytest.mark.parametrize("muon", [0.0, 5e-3])
@pytest.mark.parametrize("kind", ["unstructured", "2:4"])
def test_masked_entries_stay_exactly_zero(core, kind, muon):
    """In the averaged weights too, under weight decay and both optimisers."""
    plan = tiny.plan(core, kind)
    model = surgery.apply(tiny.dense(core), plan, tiny.INSTANCES[core].module)
    before = copy.deepcopy(model.state_dict())
    settings = {"ema": 0.7, "weight_decay": 0.01, "muon_learning_rate": muon}
    _train(core, model, masks=plan.masks, settings=settings)
    for weight, mask in plan.masks.items():
        value = model.get_parameter(weight)
        assert not value[~mask].any()
        assert (value[mask] != before[weight][mask]).float().mean() > 0.9


def test_an_average_of_zero_leaves_the_last_weights():
    last, averaged, seen = tiny.dense("dit"), tiny.dense("dit"), []

    def watched(model, batch):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return loop.own_loss(model, batch)

    _train("dit", last, settings={"ema": 0.0})
    _train("dit", averaged, settings={"ema": 0.9}, loss=watched)
    final = dict(last.named_parameters())
    # The average of what followed each step, by hand; the first update takes the weights as is.
    trail = [step["blocks.0.mlp.fc1.weight"] for step in seen[1:]]
    trail.append(final["blocks.0.mlp.fc1.weight"].detach())
    expected = trail[0]
    for weight in trail[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(averaged.blocks[0].mlp.fc1.weight.detach(), expected)
    assert not torch.equal(expected, trail[-1])


def test_a_learned_variance_that_is_no_number_fails_the_cell():
    model = tiny.dense("dit_sigma")
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(math.nan)
    with pytest.raises(CellError, match="the training loss is nan at step 0 of 8"):
        _train("dit_sigma", model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails_the_cell(value):
    calls = []

    def broken(model, batch):
        calls.append(1)
        return loop.own_loss(model, batch) * (value if len(calls) == 3 else 1)

    with pytest.raises(CellError, match=f"the training loss is {value} at step 2 of 8"):
        _train("dit", tiny.dense("dit"), loss=broken)
    assert len(calls) == 3


@pytest.mark.parametrize(("images", "steps"), [(0, 0), (7, 0), (8, 1), (63, 7), (64, 8)])
def test_no_more_images_than_allowed(images, steps):
    model, meter = tiny.dense("dit"), BudgetMeter()
    losses = _train("dit", meter.watch(model), images=images)
    assert len(losses) == steps
    assert meter.counts["student_forward"] == meter.counts["student_backward"] == 8 * steps
    if not steps:
        tiny.assert_same(model.state_dict(), tiny.dense("dit").state_dict())


def test_the_learning_rate_rises_then_falls_to_zero():
    factor = loop._cosine(loop.Progress(100), tiny.settings(warmup=0.1))
    assert [factor(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.5)
    assert 0 < factor(99) < 0.001
    assert loop._cosine(loop.Progress(100), tiny.settings())(0) == 1.0


def test_the_rate_is_held_until_the_last_removal_and_falls_to_zero_after_it():
    for done in (0, 60):  # the recovery goes on with what selection held
        progress = loop.Progress(100, done=done, held=60)
        factor = loop._cosine(progress, tiny.settings(warmup=0.1))
        rates = [factor(step - done) for step in range(done, 100)]
        if not done:
            assert rates[4] == pytest.approx(0.5) and set(rates[10:60]) == {1.0}
        assert rates[60 - done] == 1.0 and rates[80 - done] == pytest.approx(0.5)
        assert 0 < rates[-1] < 0.01


def test_muon_takes_the_prunable_matrices_only():
    model, family = tiny.dense("unet"), tiny.INSTANCES["unet"].module
    adam, muon = loop._optimizers(
        model, tiny.settings(muon_learning_rate=0.1), family.weights(model)
    )
    names = {parameter: n for n, parameter in model.named_parameters()}
    chosen = {names[p] for group in muon.param_groups for p in group["params"]}
    assert chosen == {n for n in family.weights(model) if model.get_parameter(n).dim() == 2}
    rest = {names[p] for group in adam.param_groups for p in group["params"]}
    assert rest == set(names.values()) - chosen
    assert len(loop._optimizers(model, tiny.settings(), family.weights(model))) == 1


def test_half_of_the_drawn_images_are_mirrored_and_nothing_else_changes():
    plain = tiny.data("dit", 64)
    mirrored = dataclasses.replace(plain, flip=True)
    one, two = (
        data.draw(400, torch.Generator().manual_seed(0), torch.device("cpu"))
        for data in (plain, mirrored)
    )
    for name in ("y", "t", "noise"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    flipped = (two.x0 != one.x0).flatten(1).any(1)
    assert 0.4 < flipped.double().mean() < 0.6
    assert torch.equal(two.x0[flipped], one.x0[flipped].flip(3))


def test_dropped_classes_become_no_class():
    data, model = tiny.data("dit"), tiny.dense("dit")
    generator = torch.Generator().manual_seed(0)
    batch = data.draw(2000, generator, torch.device("cpu"))
    dropped = loop._drop_some(
        batch, data.conditions, model, tiny.settings(class_dropout=0.25), generator
    )
    share = (dropped.y == model.null_class).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    kept = dropped.y != model.null_class
    assert torch.equal(dropped.y[kept], batch.y[kept])
    assert torch.equal(dropped.noised, batch.noised)
    assert (
        loop._drop_some(batch, data.conditions, model, tiny.settings(class_dropout=0.0), generator)
        is batch
    )


# The meter against counts taken independently (selection.contract.counting).


def _spent(meter: BudgetMeter) -> dict:
    return {key.removeprefix("student_"): meter.counts[key] for key in KEYS[:2]}


@pytest.fixture
def counts(core):
    with counting(tiny.dense(core), tiny.INSTANCES[core].module) as counts:
        yield counts


def test_the_meter_counts_what_passes(core, counts):
    meter, model = BudgetMeter(), tiny.dense(core)
    meter.watch(model)
    x, t, y = tiny.inputs(core, 5)
    with torch.no_grad():
        model(x, t, y)
    assert _spent(meter) == {"forward": 5, "backward": 0}
    model(x, t, y).sum()  # a graph that nobody follows back
    model(x[:2], t[:2], y[:2]).sum().backward()
    torch.autograd.grad(model(x, t, y).sum(), list(model.parameters())[:1])
    output = model(x[:3], t[:3], y[:3])
    (output.sum() + output.square().sum()).backward()
    assert _spent(meter) == {"forward": 20, "backward": 10}
    assert _spent(meter) == {"forward": counts["forward"], "backward": counts["backward"]}


def test_the_meter_counts_training(core, counts):
    meter, model = BudgetMeter(), tiny.dense(core)
    _train(core, meter.watch(model), settings={"ema": 0.5})
    assert _spent(meter) == {"forward": 64, "backward": 64} == dict(counts)


def test_copies_and_bypassed_models_are_metered(core, counts):
    context = tiny.context(core)
    inputs = tiny.inputs(core, 4)
    copy.deepcopy(context.model)(*inputs).sum().backward()
    copy.deepcopy(copy.deepcopy(context.model))(*inputs)
    first = context.layers()[0].name
    with context.without(first) as shell:
        shell(*inputs).sum().backward()
        with torch.no_grad():
            copy.deepcopy(shell)(*inputs)
    assert _spent(context._meter) == {"forward": 16, "backward": 8} == dict(counts)


def test_teacher_passes_are_counted_apart():
    meter = BudgetMeter()
    teacher, student = meter.watch(tiny.dense("dit"), "teacher"), meter.watch(tiny.dense("dit"))
    inputs = tiny.inputs("dit", 4)
    (student(*inputs) - teacher(*inputs)).square().sum().backward()
    with meter.clock():
        pass
    report = meter.report()
    assert {key: report[key] for key in KEYS} == dict.fromkeys(KEYS, 4)
    assert report.keys() == {*KEYS, "wall_s"} and report["wall_s"] > 0


def test_an_unspent_budget_is_all_zero():
    assert unspent() == {**dict.fromkeys(KEYS, 0), "wall_s": 0.0}


def test_the_clock_counts_what_fails_too():
    meter = BudgetMeter()
    with pytest.raises(RuntimeError), meter.clock():
        raise RuntimeError
    assert meter.wall_s > 0


# A training in parts is the same training.


def _in_parts(images: list[int], **settings) -> tuple[nn.Module, loop.Progress]:
    torch.manual_seed(0)
    model, data = tiny.dense("dit"), tiny.data("dit")
    options = tiny.settings(**settings)
    progress = loop.Progress(sum(images) // options.batch)
    generator = torch.Generator().manual_seed(7)
    batches = [data.draw(options.batch, generator, torch.device("cpu")) for _ in range(8)]
    feed = iter(batches)
    same = loop.Data(data.images, data.labels, data.objective)
    object.__setattr__(same, "draw", lambda *_: next(feed))
    for part in images:
        loop.train(model, same, options, images=part, seed=0, muon_names=[], progress=progress)
    return model, progress


def test_parts_share_schedule_and_average(monkeypatch):
    """With plain gradient descent, which keeps no state, parts give the whole to the last bit."""
    descent = lambda model, settings, _: [torch.optim.SGD(model.parameters(), lr=0.1)]  # noqa: E731
    monkeypatch.setattr(loop, "_optimizers", descent)
    whole, _ = _in_parts([64], ema=0.8, warmup=0.25)
    parts, progress = _in_parts([24, 16, 24], ema=0.8, warmup=0.25)
    tiny.assert_same(whole.state_dict(), parts.state_dict())
    assert (progress.done, progress.total) == (8, 8)
    for name, parameter in parts.named_parameters():
        assert torch.equal(parameter, progress.average[name])


def test_an_unfinished_training_has_its_plain_weights():
    model, data = tiny.dense("dit"), tiny.data("dit")
    progress = loop.Progress(8)
    loop.train(model, data, tiny.settings(ema=0.9), images=32, seed=0, muon_names=[],
               progress=progress)  # fmt: skip
    name, weight = next(iter(model.named_parameters()))
    assert progress.done == 4 and not torch.equal(weight, progress.average[name])


def test_a_parameter_that_is_cut_between_parts_starts_its_average_anew():
    model, data, progress = tiny.dense("dit"), tiny.data("dit"), loop.Progress(4)
    options = {"seed": 0, "muon_names": [], "progress": progress}
    loop.train(model, data, tiny.settings(ema=0.9), images=16, **options)
    tiny.INSTANCES["dit"].module.remove_layer(model, "blocks.1.attn")
    rows = model.blocks[1].adaLN_modulation[1].weight
    kept, other = rows.detach().clone(), progress.average["blocks.0.mlp.fc1.weight"].clone()
    loop.train(model, data, tiny.settings(ema=0.9, learning_rate=1e-8), images=8, **options)
    torch.testing.assert_close(progress.average["blocks.1.adaLN_modulation.1.weight"], kept)
    now = model.blocks[0].mlp.fc1.weight.detach()
    expected = 0.9 * other + 0.1 * now
    torch.testing.assert_close(progress.average["blocks.0.mlp.fc1.weight"], expected)
    assert not torch.equal(other, now)


def test_names_of_parametrized_weights_are_plain():
    assert loop._plain("blocks.0.mlp.fc1.parametrizations.weight.original") == (
        "blocks.0.mlp.fc1.weight"
    )
    assert loop._plain("x.weight") == "x.weight"


def _gradients(name: str, checkpointed: bool) -> tuple[dict, int]:
    """Gradients of the loss under a bypassed block, and how often a convolution or matrix ran."""
    model, calls = tiny.dense(name), []
    family = tiny.INSTANCES[name].module
    family.remove_layer(model, family.layers(model, "block")[1].name)
    if checkpointed:
        checkpoint_activations(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    batch = tiny.data(name).draw(4, torch.Generator().manual_seed(0), torch.device("cpu"))
    loop.own_loss(model.train(), batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("name_", ["dit", "uvit", "unet_attention", "ldm", "flux"])
def test_checkpointed_activations_are_computed_again_and_change_no_gradient(name_):
    kept, once = _gradients(name_, False)
    again, twice = _gradients(name_, True)
    assert twice > 1.3 * once  # attention of plain UNets is kept
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("name_", ["dit", "uvit", "ldm", "flux"])
def test_what_is_computed_again_has_the_weights_it_was_called_with(name_):
    """The weights of `functional_call` are gone when the backward pass runs the blocks again."""
    found = []
    for checkpointed in (False, True):
        model = tiny.dense(name_)
        checkpoint_activations(model, checkpointed)
        weights = {n: (1.5 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
        output = functional_call(model, weights, tiny.inputs(name_))
        loss = output.square().mean()
        found.append(torch.autograd.grad(loss, [*weights.values()], allow_unused=True))
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None]
    assert len(pairs) > 10 and all(torch.equal(a, b) for a, b in pairs)


def test_checkpointing_is_a_setting_of_training_and_selection():
    settings = {"activation_checkpointing": True}
    model, plain = tiny.dense("ldm"), tiny.dense("ldm")
    _train("ldm", model, settings=settings)
    _train("ldm", plain)
    tiny.assert_same(model.state_dict(), plain.state_dict())
    context = tiny.context("unet", settings=tiny.settings(**settings))
    assert context.model.is_gradient_checkpointing
    assert context.widths()  # they are traced
    with pytest.raises(UserError, match="activation_checkpointing: Linear has none"):
        checkpoint_activations(nn.Linear(1, 1))
