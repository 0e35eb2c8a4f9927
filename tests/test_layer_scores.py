"""Methods that rank layers by skipping or passing them: sensitivity, ITSD, ShortGPT, Flux-lite."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import nn

from prunebench.models.units import parameter_count
from prunebench.selection import layer_scores
from prunebench.tracks import methods
from prunebench.training.budget import BudgetMeter

FOUND = tiny.found_methods()


def _of(method: str, name: str) -> object:
    return methods.load(FOUND[method]).__globals__[name]


def _zeroed(model: nn.Module, layer: str) -> None:
    """Make a transformer block's branches write nothing."""
    for part in ("attn.proj", "mlp.fc2"):
        for parameter in model.get_submodule(f"{layer}.{part}").parameters():
            nn.init.zeros_(parameter)


# What skipping a layer costs.


def test_the_rise_of_the_loss_is_that_of_a_network_without_the_layer(core):
    """By hand, on a copy that lost the layer by its family."""
    context = tiny.context(core)
    plan = methods.load(FOUND["sensitivity"])(context, draws=8, batch=5)
    removed, layer = tiny.dense(core), context.layers()[1].name
    context.family.remove_layer(removed, layer)
    batches = tiny.context(core).draws(8, 5)
    with torch.no_grad():
        errors = [
            (context.predict(model, b) - b.target).square().flatten(1).mean(1)
            for model in (tiny.dense(core), removed)
            for b in batches
        ]
    rise = torch.cat(errors[2:]).mean() - torch.cat(errors[:2]).mean()
    assert plan.notes["rise"][layer] == pytest.approx(rise.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["sensitivity", "itsd", "short_gpt", "flux_lite"])
def test_a_block_that_writes_nothing_scores_zero(method):
    model = tiny.dense("dit")
    _zeroed(model, "blocks.2")
    context = tiny.context("dit", model, sparsity=0.2)
    plan = methods.load(FOUND[method])(context, draws=8, batch=8)
    (scores,) = (
        value if isinstance(value, dict) else value[0]
        for value in plan.notes.values()
        if isinstance(value, dict | list)
    )
    assert scores["blocks.2"] == pytest.approx(0, abs=1e-6) and len(scores) == 4
    if method != "sensitivity":  # skipping a layer may lower the loss of an untrained network
        assert "blocks.2" in plan.layers
        assert all(value > 0 for name, value in scores.items() if name != "blocks.2")


@pytest.mark.parametrize("measure", ["output", "loss"])
def test_itsd_divides_by_parameters(measure):
    """On a UNet, whose blocks differ in size, by the two functions that other methods rank by."""
    context = tiny.context("unet")
    plan = methods.load(FOUND["itsd"])(context, draws=6, batch=6, measure=measure)
    batches = tiny.context("unet").draws(6, 6)
    reference = layer_scores.predictions(context, context.model, batches)
    whole = layer_scores.loss_without(context, (), batches)
    (scores,) = plan.notes["sensitivity"]
    for unit in context.layers()[::3]:
        cost = {
            "output": layer_scores.output_loss(context, (unit.name,), batches, reference),
            "loss": layer_scores.loss_without(context, (unit.name,), batches) - whole,
        }[measure]
        assert scores[unit.name] * unit.parameters == pytest.approx(cost, rel=1e-4, abs=1e-7)


def test_itsd_ranks_alike_whatever_the_order_of_the_draws():
    context = tiny.context("unet")
    batches = context.draws(12, 4)
    cost = _of("itsd", "output_cost")
    forwards, backwards = cost(context, batches), cost(context, batches[::-1])
    names = [[unit.name] for unit in context.layers()]
    assert sorted(names, key=forwards) == sorted(names, key=backwards)


def test_re_scoring_asks_what_the_next_block_adds():
    """Scores of the second round are differences of the joint removal to the first one alone."""
    context = tiny.context("dit", sparsity=0.5)
    plan = methods.load(FOUND["itsd"])(context, draws=8, batch=8, re_score=True)
    first, second = plan.notes["sensitivity"]
    gone = min(first, key=first.__getitem__)
    assert len(plan.layers) == 2 and gone in plan.layers and gone not in second
    batches = tiny.context("dit").draws(8, 8)
    reference = layer_scores.predictions(context, context.model, batches)
    alone = layer_scores.output_loss(context, (gone,), batches, reference)
    for name, score in second.items():
        both = layer_scores.output_loss(context, (gone, name), batches, reference)
        size = parameter_count(context.model.get_submodule(name))
        assert score * size == pytest.approx(both - alone, rel=1e-4)


def test_re_scoring_stops_where_no_block_leads_nearer_the_target():
    context = tiny.context("unet", sparsity=0.25)
    sizes = {unit.name: unit.parameters for unit in context.layers()}
    order, rounds = layer_scores.greedy(
        context, context.layers(), lambda gone, unit: -unit.parameters
    )
    plan = context.plan_layers(order)
    assert [unit.name for unit in order] and set(plan.layers) == {unit.name for unit in order}
    target = 0.25 * parameter_count(context.model)
    left = target - sum(sizes[name] for name in plan.layers)
    rest = [size for name, size in sizes.items() if name not in plan.layers]
    assert all(abs(left - size) >= abs(left) for size in rest) and len(rounds) == len(order)


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="measure 'clip' is none of output, loss"):
        methods.load(FOUND["itsd"])(tiny.context("dit"), measure="clip")


# What passing a block does to the hidden states.


def test_influence_is_one_minus_the_cosine_and_error_the_mean_square():
    turned, squared = _of("short_gpt", "turned"), _of("flux_lite", "squared_change")
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    after = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-1.0, 0.0], [2.0, 1.0]])
    expected = [0, 1, 2, 1 - 2 / 5**0.5]
    torch.testing.assert_close(turned(before, after), torch.tensor(expected), atol=1e-6, rtol=0)
    assert squared(before, after).tolist() == [12.5, 2.5, 2.0, 0.5]


def test_influences_of_every_family_come_from_what_stands_behind_the_block(name):
    """Against the hidden state that a forward hook sees with and without the block removed.

    Bypassing a block leaves everything before it as it was, so that the bypass puts out the state
    that the block would have passed on.
    """
    context = tiny.context(name)
    (batch,) = context.draws(4, 4)
    layer = context.layers()[-1].name
    values = layer_scores.influences(context, [batch], lambda a, b: (a - b).square().sum(1))
    states = []
    bypassed = tiny.dense(name)
    context.family.remove_layer(bypassed, layer)
    for model in (tiny.dense(name), bypassed):
        with torch.no_grad(), _output_of(model, layer) as seen:
            context.predict(model, batch)
        states.append(seen[0])
    rows = states[0].numel() / states[0].shape[1 if states[0].dim() == 4 else -1]
    expected = (states[0] - states[1]).double().square().sum().item() / rows
    assert values[layer] == pytest.approx(expected, rel=1e-4) and values[layer] > 0
    assert list(values) == [unit.name for unit in context.layers()]


@contextmanager
def _output_of(model: nn.Module, name: str) -> Iterator[list[torch.Tensor]]:
    """The outputs of a module in the block, those that are tuples as one tensor."""
    seen: list[torch.Tensor] = []

    def hook(_module: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> None:
        seen.append(torch.cat(output, dim=1) if isinstance(output, tuple) else output)

    handle = model.get_submodule(name).register_forward_hook(hook)
    yield seen
    handle.remove()


def test_passes_of_influences_are_metered_once():
    meter = BudgetMeter()
    context = tiny.context("dit", meter=meter)
    layer_scores.influences(context, context.draws(10, 4), lambda a, b: (a - b).sum(1))
    assert meter.counts == {"student_forward": 10}
