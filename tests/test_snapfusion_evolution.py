"""SnapFusion's evolution: robust training, values, the order of actions, and what they cost."""

import importlib.util

import pytest
import tiny
import torch

from prunebench.evaluation.cost import count_macs
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery
from prunebench.training.loop import own_loss

spec = importlib.util.spec_from_file_location("s", tiny.ROOT / "methods/snapfusion_evolution.py")
snapfusion = importlib.util.module_from_spec(spec)
spec.loader.exec_module(snapfusion)


def _evolution(name: str = "dit", **changes) -> snapfusion.Evolution:
    context = tiny.context(name, **changes)
    costs = {layer.name: 1.0 for layer in context.layers("whole")}
    return snapfusion.Evolution(context, costs)


def test_counted_costs_are_what_removal_saves():
    context = tiny.context("dit")
    costs, whole = context.macs("branch"), tiny.dense("dit")
    inputs = tiny.inputs("dit", 1)
    before = count_macs(whole, *inputs)["macs"]
    for name, cost in list(costs.items())[:3]:
        smaller = tiny.dense("dit")
        tiny.INSTANCES["dit"].module.remove_layer(smaller, name)
        assert before - count_macs(smaller, *inputs)["macs"] == cost > 0
    assert context._meter.counts["student_forward"] == 0


def test_measured_costs_are_metered_and_one_per_shape():
    context = tiny.context("dit")
    table = context.latencies(batch=2, rounds=2, warmup=0)
    assert table.keys() == {layer.name for layer in context.layers()}
    assert len(set(table.values())) == 1 and min(table.values()) > 0
    assert context._meter.counts["student_forward"] == 2 and context.clocked == table


def test_without_skipping_the_loss_is_the_models_own():
    evolution = _evolution()
    (batch,) = evolution.context.draws(4, 4)
    loss = snapfusion.skipping(evolution, 0.0)(evolution.model, batch)
    assert torch.equal(loss, own_loss(evolution.model, batch))


def test_a_skipped_block_is_a_removed_one_and_trains_the_others():
    evolution = _evolution()
    (batch,) = evolution.context.draws(4, 4)
    names = evolution.present()
    loss = snapfusion.skipping(evolution, float(len(names)))(evolution.model, batch)  # all go
    smaller = tiny.dense("dit")
    for name in names:
        tiny.INSTANCES["dit"].module.remove_layer(smaller, name)
    assert torch.equal(loss, own_loss(smaller, batch))
    loss.backward()
    assert evolution.model.x_embedder.proj.weight.grad.abs().max() > 0
    assert evolution.model.blocks[0].mlp.fc1.weight.grad is None


def test_blocks_of_least_value_go_and_those_of_most_are_copied():
    evolution = _evolution(sparsity=0.43)  # two of the four blocks
    lost = {"blocks.0": 3.0, "blocks.1": 1.0, "blocks.2": -2.0, "blocks.3": 9.0}
    left, costs = dict(lost), []
    while evolution.act({n: left[n] for n in evolution.present()}, 1, 1, 1):
        costs.append(evolution.log[-1]["cost"])
    assert [(entry["action"], entry["layers"]) for entry in evolution.log] == [
        ("remove", ["blocks.2"]),
        ("remove", ["blocks.1"]),
        ("copy", ["blocks.3"]),
        ("remove", ["blocks.0"]),
    ]
    assert costs == [3.0, 2.0, 3.0, 2.0]  # a removal never costs
    plan = evolution.plan()
    pruned = surgery.apply(tiny.dense("dit"), plan, tiny.INSTANCES["dit"].module)
    assert parameter_count(pruned) == parameter_count(evolution.model)
    assert plan.copies == ("blocks.3",)


def test_robust_training_is_charged_and_none_without_a_budget():
    context = tiny.context("dit", train_images=64)
    plan, model = snapfusion.select(context, draws=4, batch=4, rounds=2)
    assert context.trained_images == 32 and plan.notes["skip"] == 0.1
    assert not torch.equal(model.x_embedder.proj.weight, tiny.dense("dit").x_embedder.proj.weight)
    assert snapfusion.select(tiny.context("dit"), draws=4, batch=4).notes["skip"] == 0.0


@pytest.mark.parametrize("wrong", [{"quality": "clip"}, {"table": "phone"}])
def test_other_measures_are_refused(wrong):
    with pytest.raises(ValueError, match=r"quality '.*' is loss or output, table"):
        snapfusion.select(tiny.context("dit"), **wrong)
