"""TinyFusion: its groups, its sampling, its updates, and what it leaves of published networks."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn

from prunebench import models
from prunebench.models.units import parameter_count
from prunebench.selection import checks
from prunebench.tracks import methods

FOUND = tiny.found_methods()
select = methods.load(FOUND["tinyfusion"])
GLOBALS = select.__globals__
local_groups, Gates, one_hot, prepare = (
    GLOBALS[name] for name in ("local_groups", "Gates", "one_hot", "prepare")
)


def _gates(groups: list, **changes: object) -> nn.Module:
    return Gates(groups, changes.get("scale", 100.0), (4.0, 0.1), changes.get("decay", 0.999))


def _prepared(model: nn.Module, removed: int = 2, **changes: object) -> nn.Module:
    layers = tiny.INSTANCES["dit"].module.layers(model, "block")
    gates = _gates(local_groups(len(layers), removed, changes.get("merge", 1)))
    generator = torch.Generator().manual_seed(0)
    return prepare(model, layers, gates, 10, 4, 8.0, generator)


# Groups.


@pytest.mark.parametrize(
    ("count", "removed", "merge", "patterns"),
    [
        (28, 14, 1, [(1, 2)] * 14),
        (28, 14, 2, [(2, 4)] * 7),
        (28, 14, 7, [(7, 14)] * 2),
        (28, 7, 1, [(3, 4)] * 7),
        (28, 21, 1, [(1, 4)] * 7),
        (8, 2, 1, [(3, 4)] * 2),
        (28, 9, 1, None),
        (4, 4, 1, [(0, 4)]),
        (4, 0, 1, []),
    ],
)
def test_groups_are_local_and_keep_what_is_asked(count, removed, merge, patterns):
    groups = local_groups(count, removed, merge)
    if patterns is not None:
        assert [(g.kept, len(g.places)) for g in groups] == patterns
    places = [place for group in groups for place in group.places]
    assert places == list(range(count if removed else 0))
    assert sum(len(g.places) - g.kept for g in groups) == removed
    assert all(len(g.ways) == math.comb(len(g.places), g.kept) for g in groups)


def test_search_spaces_are_the_papers():
    sizes = {merge: [len(g.ways) for g in local_groups(28, 14, merge)] for merge in (1, 2, 7)}
    assert math.prod(sizes[1]) == 16_384 and math.prod(sizes[2]) == 279_936
    assert sum(sizes[7]) == 6_864


# Sampling.


def test_samples_are_one_hot_and_as_likely_as_the_logits_say():
    """The Gumbel maximum has the softmax's probabilities at every temperature."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0])
    for temperature in (4.0, 0.1):
        drawn = one_hot(logits.expand(20_000, -1), temperature)
        assert ((drawn == 0) | (drawn == 1)).all() and (drawn.sum(1) == 1).all()
        torch.testing.assert_close(drawn.mean(0), logits.softmax(0), atol=0.012, rtol=0)


def test_ways_are_uniform_at_first_and_masks_keep_n_of_every_group():
    torch.manual_seed(0)
    gates = _gates(local_groups(8, 4, 2))
    for logits in gates.average_logits():
        torch.testing.assert_close(logits.softmax(0), torch.full((6,), 1 / 6))
    gates.sample(500)
    masks = torch.stack([gates.masks[place] for place in range(8)], 1)
    assert (masks.unflatten(1, (2, 4)).sum(2) == 2).all()
    torch.testing.assert_close(masks.mean(0), torch.full((8,), 0.5), atol=0.08, rtol=0)


def test_the_temperature_falls_linearly():
    gates = _gates(local_groups(4, 2))
    gates.steps, seen = 5, []
    for _ in range(6):
        seen.append(gates.temperature())
        gates.advance()
    assert seen == pytest.approx([4.0, 3.025, 2.05, 1.075, 0.1, 0.1])


def test_the_average_decides():
    gates = _gates(local_groups(4, 2), decay=0.5)
    with torch.no_grad():
        gates.gate[0] += 1
    gates.advance()
    assert gates.average[0].item() == pytest.approx(0.02 + 0.5) and gates.average[1] == 0.02 * 1.0


# The network under masks.


def test_all_layers_kept_are_the_dense_network_to_the_bit():
    dense, model = tiny.dense("dit"), _prepared(tiny.dense("dit"))
    model.gates.sample = lambda count: model.gates.masks.update(
        dict.fromkeys(range(4), torch.ones(count))
    )
    assert torch.equal(tiny.output(model, "dit"), tiny.output(dense, "dit"))


def test_masked_layers_are_bypassed_image_by_image():
    """Every image under its own mask is what the network without these layers makes of it."""
    torch.manual_seed(1)
    model, family = _prepared(tiny.dense("dit")), tiny.INSTANCES["dit"].module
    output = tiny.output(model, "dit")
    masks = torch.stack([model.gates.masks[place] for place in range(4)], 1)
    assert len({tuple(row.tolist()) for row in masks}) > 1
    for image, row in enumerate(masks):
        alone = tiny.dense("dit")
        for place in (row == 0).nonzero().flatten().tolist():
            family.remove_layer(alone, f"blocks.{place}")
        expected = tiny.output(alone, "dit")[image]
        torch.testing.assert_close(output[image], expected, rtol=1e-5, atol=1e-5)


def test_gates_of_masked_layers_have_gradients_and_dense_weights_none():
    torch.manual_seed(0)
    model = _prepared(tiny.dense("dit"))
    x, t, y = tiny.inputs("dit")
    model(x, t, y).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "gates.gate" in trained and (model.gates.gate.grad.abs() > 0).all()
    kinds = {name.rpartition(".")[2] for name in trained}
    assert kinds == {"gate", "a", "b"} and not any("original" in name for name in trained)


def test_updates_are_small_and_begin_at_nothing():
    """Rank 8 on every matrix of DiT-XL/2: 6.0 M, 0.9 % of its parameters, as the paper says."""
    with torch.device("meta"):
        model = models.family("dit").build(models.published("dit")["dit_xl_2_256"].config)
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    added = sum(parameter_count(GLOBALS["LowRank"](weight, 8, 16.0)) for weight in linear)
    assert round(added / 1e6, 1) == 6.0 and round(added / 675_129_632, 3) == 0.009
    weight = torch.randn(6, 4)
    update = GLOBALS["LowRank"](weight, 2, 16.0)
    nn.init.ones_(update.a)
    assert torch.equal(update(weight), weight)
    nn.init.ones_(update.b)
    torch.testing.assert_close(update(weight), weight + 8.0 * 2)


# Whole selections.


def test_the_layer_that_writes_nothing_is_dropped():
    """Blocks 0 and 2 put out what goes in; the others can't be spared."""
    model = tiny.dense("dit")
    for place in (0, 2):
        for part in (model.blocks[place].attn.proj, model.blocks[place].mlp.fc2):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
    for place in (1, 3):
        model.blocks[place].mlp.fc2.weight.data.mul_(30)
    with torch.no_grad():
        target = copy.deepcopy(model)
    context = tiny.context("dit", model, sparsity=0.42, train_images=192)
    context.data = _taught(context.data, target)
    plan = select(context, share=1.0, scale=1000.0, decay=0.5)
    assert plan.layers == ("blocks.0", "blocks.2") and plan.notes["steps"] == 24


def _taught(data: object, teacher: nn.Module) -> object:
    """The data with what a network predicts as target, so that no training is needed first."""

    class Taught(type(data)):
        def noised(self, x0, y, t, noise):
            batch = super().noised(x0, y, t, noise)
            with torch.no_grad():
                batch.target.copy_(teacher(batch.noised, batch.network_time, y))
            return batch

    return Taught(**{f: getattr(data, f) for f in data.__dataclass_fields__})


def test_training_is_charged_and_leaves_the_dense_weights():
    context = tiny.context("dit", sparsity=0.42, train_images=32)
    plan, pruned = checks.select(context, select, "layers", {"share": 0.5})
    counts = context._meter.counts
    assert context.trained_images == counts["student_forward"] == counts["student_backward"] == 16
    dense = tiny.dense("dit")
    for name in plan.layers:
        context.family.remove_layer(dense, name)
    tiny.assert_same(pruned.state_dict(), dense.state_dict())
    tiny.assert_same(checks.averaged(context, plan), dict(dense.named_parameters()))


def test_without_a_budget_every_group_draws():
    plans = {select(tiny.context("dit", seed=seed, sparsity=0.42)).layers for seed in range(8)}
    assert len(plans) > 1
    assert all(sorted(int(name[-1]) // 2 for name in layers) == [0, 1] for layers in plans)


@pytest.mark.parametrize(
    ("removed", "parameters"), [(9, 459_983_264), (14, 340_457_504), (21, 173_121_440)]
)
def test_published_networks_have_the_papers_sizes(removed, parameters):
    """DiT-XL/2 with 19, 14 and 7 of 28 layers on the meta device: the first way of every group."""
    family = models.family("dit")
    with torch.device("meta"):
        model = family.build(models.published("dit")["dit_xl_2_256"].config)
    layers = family.layers(model, "block")
    kept = {place for group in local_groups(28, removed) for place in group.ways[0]}
    for place in set(range(28)) - kept:
        family.remove_layer(model, layers[place].name)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
