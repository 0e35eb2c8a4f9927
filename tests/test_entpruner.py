"""EntPruner on networks that can be worked out by hand, and its stages."""

from math import log
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributions import Normal

from prunebench import models
from prunebench.models.units import Layer, parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import plan_layers
from prunebench.selection import checks as selection
from prunebench.selection import proxies
from prunebench.tracks import methods
from prunebench.training.budget import BudgetMeter
from prunebench.training.loop import Batch

BLOCK, TOTAL = 18912, 87684  # parameters of a block and of the whole tiny transformer
QUICK = {"draws": 20, "batch": 10, "proxy_batch": 4, "ntk_batches": 1, "share": 1.0}


def _entpruner():
    return methods.load(tiny.found_methods()["entpruner"])


# The ranking: conditional entropy deviation.


class Product(nn.Module):
    """A "network" that multiplies z by one factor per block that is present."""

    def __init__(self, factors: dict[str, float]):
        super().__init__()
        self.factors = dict(factors)

    def forward(self, z, y):
        shift = 10.0 * y.unsqueeze(1) if "shift" in self.factors else 0.0
        return z * torch.tensor(list(self.factors.values())).prod() + shift


class Toy:
    """A context around such a network; the block "shift" also moves the mean of every class."""

    train_images, settings = 0, SimpleNamespace(batch=1)
    family = SimpleNamespace(remove_layer=lambda model, name: model.factors.pop(name))
    log = SimpleNamespace(info=lambda *_: None)

    def __init__(self, factors: dict[str, float], dimensions: int = 1, classes: int = 1):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(200, dimensions, generator=generator)
        y = torch.arange(200) % classes
        self.batches = [
            SimpleNamespace(z=z[:120], y=y[:120]),
            SimpleNamespace(z=z[120:], y=y[120:]),
        ]
        self.model = Product(factors)

    def draws(self, count, batch):
        return self.batches

    def predict(self, model, batch):
        return model(batch.z, batch.y)

    def layers(self, granularity):
        return [Layer(name, 1) for name in self.model.factors]

    def plan_layers(self, order, **notes):
        return Plan(tuple(layer.name for layer in order), notes=notes)


def _rank(context, **parameters):
    plan, _ = _entpruner()(context, **parameters)
    return plan.layers, plan.notes


def test_ced_is_the_log_of_what_a_block_multiplies_by():
    order, notes = _rank(Toy({"double": 2.0, "same": 1.0, "half": 0.5, "ten": 10.0}))
    expected = {"double": -log(2), "same": 0.0, "half": log(2), "ten": -log(10)}
    assert notes["pi"] == pytest.approx(expected, abs=1e-6), "pi = log sigma_b - log sigma, signed"
    assert notes["ced"] == pytest.approx({k: abs(v) for k, v in expected.items()}, abs=1e-6)
    assert order[0] == "same" and order[-1] == "ten"


@pytest.mark.parametrize("classes", [1, 4])
def test_ced_summed_over_dimensions_is_d_times_the_pooled(classes):
    toy = Toy({"b": 2.0}, dimensions=7, classes=classes)
    (_, pooled), (_, summed) = _rank(toy), _rank(toy, per_dimension=True)
    assert pooled["ced"]["b"] == pytest.approx(log(2), abs=1e-6)
    assert summed["ced"]["b"] == pytest.approx(7 * log(2), abs=1e-5)
    assert summed["ced_pooled"] == pooled["ced"], "both rankings are on record either way"
    assert pooled["ced_per_dimension"] == summed["ced"]


@pytest.mark.parametrize("a", [0.25, 3.0])
def test_log_sigma_is_the_entropy_of_a_gaussian_up_to_its_constant(a):
    log_sigmas = _entpruner().__globals__["log_sigmas"]
    values = [log_sigmas(toy, toy.model, toy.batches)[0] for toy in (Toy({}), Toy({"b": a}))]
    sigma = torch.cat([batch.z for batch in Toy({}).batches]).double().std(correction=0)
    one, scaled = (Normal(0.0, scale).entropy().item() for scale in (sigma, a * sigma))
    assert one - values[0].item() == pytest.approx(1.41894, abs=1e-5)
    assert (values[1] - values[0]).item() == pytest.approx(scaled - one, abs=1e-6)
    assert scaled - one == pytest.approx(log(a))


def test_entropy_is_conditional_on_the_class():
    """A block that only moves the classes apart does not change any class's own entropy."""
    _, notes = _rank(Toy({"shift": 1.0, "b": 1.5}, classes=4))
    assert notes["ced"]["shift"] == pytest.approx(0, abs=1e-5)


def test_ties_keep_the_order_of_the_network():
    order, _ = _rank(Toy({"c": 1.0, "a": 1.0, "b": 1.0}))
    assert order == ("c", "a", "b")


def test_a_class_drawn_once_has_no_sigma_per_dimension():
    toy = Toy({"b": 2.0}, dimensions=3)
    toy.batches[0].y[0] = 1
    _, notes = _rank(toy, per_dimension=True)
    assert notes["ced"]["b"] == pytest.approx(3 * log(2), abs=1e-5)


def test_constant_outputs_are_refused():
    with pytest.raises(ValueError, match="the entropy without b is not finite: constant outputs"):
        _rank(Toy({"b": 0.0}))


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_a_block_that_does_nothing_goes_first_and_is_not_missed(granularity):
    model = tiny.dense("dit")
    for index in (1, 3):
        for parameter in model.blocks[index].adaLN_modulation[1].parameters():
            parameter.data.zero_()
    context = tiny.context("dit", model, sparsity=2 * BLOCK / TOTAL)
    plan, pruned = _entpruner()(context, draws=20, batch=10, granularity=granularity)
    assert {name[: len("blocks.0")] for name in plan.layers} == {"blocks.1", "blocks.3"}
    for name, value in plan.notes["ced"].items():
        assert (value == 0.0) == name.startswith(("blocks.1", "blocks.3")), name
    assert torch.equal(tiny.output(pruned, "dit"), tiny.output(model, "dit"))


# The proxies.


def _batch(x):
    x = torch.tensor(x)
    return Batch(x, torch.zeros(len(x)), *[x] * 5, objective=None)


def _linear(*weights):
    model = nn.Linear(len(weights), 1)
    model.weight.data = torch.tensor([weights])
    return model


def _predict(model, batch):
    return model(batch.noised)


def test_condition_number_of_a_linear_model():
    """Inputs (1, 0) and (0, 2): the kernel is diag(1, 4); the bias does not take part."""
    model, batch = _linear(0.3, -0.7), _batch([[1.0, 0.0], [0.0, 2.0]])
    kernel = proxies.tangent_kernel((model(row).sum() for row in batch.noised), [model.weight])
    assert torch.equal(kernel, torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    assert proxies.ntk_condition(model, [batch], _predict) == pytest.approx(4)


def test_condition_number_is_the_geometric_mean_over_batches():
    """An arithmetic one would be the largest batch's: the number varies by factors."""
    batches = [_batch([[1.0, 0.0], [0.0, 2.0]]), _batch([[1.0, 0.0], [0.0, 4.0]])]
    assert proxies.ntk_condition(_linear(1.0, 1.0), batches, _predict) == pytest.approx(8)


def test_condition_number_does_not_depend_on_the_scale_of_the_outputs():
    batch = _batch([[1.0, 0.5], [0.2, 2.0]])
    kappas = [
        proxies.ntk_condition(_linear(1.0, 1.0), [batch], lambda m, b, c=c: c * _predict(m, b))
        for c in (1.0, 1000.0)
    ]
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-6)


def test_singular_kernels_have_the_worst_condition_number():
    worst = 1 / (2 * torch.finfo(torch.float64).eps)
    for inputs in ([[1.0, 2.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]):
        found = proxies.ntk_condition(_linear(1.0, 1.0), [_batch(inputs)], _predict)
        assert found == pytest.approx(worst)


def test_samples_pass_one_at_a_time_and_are_metered_once():
    meter = BudgetMeter()
    context = tiny.context("dit", meter=meter)
    kappa = proxies.ntk_condition(context.model, context.draws(5, 5), context.predict)
    assert 1 < kappa < 1e12
    assert meter.counts == {"student_forward": 5, "student_backward": 5}
    assert all(parameter.grad is None for parameter in context.model.parameters())


def test_zico_by_hand():
    """Gradients {1, 3} and {3, 5} of two weights over two batches: log(2/1 + 4/1)."""
    batches = [_batch([[1.0, 3.0]]), _batch([[3.0, 5.0]])]

    def loss(model, batch):
        return _predict(model, batch).sum()

    assert proxies.zico(_linear(1.0, 1.0), batches, loss) == pytest.approx(1.79176, abs=1e-5)
    scaled = proxies.zico(_linear(1.0, 1.0), batches, lambda *given: 50 * loss(*given))
    assert scaled == pytest.approx(1.79176, abs=1e-5)


def test_zico_leaves_out_what_does_not_vary():
    varying, constant = torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.0])
    mixed = [[torch.cat([varying + d, constant]), constant] for d in (0.0, 2.0)]
    assert proxies.inverse_variation(mixed) == pytest.approx(log(6))
    assert proxies.inverse_variation([[constant], [constant]]) == 0.0


def test_zico_adds_up_over_layers():
    layer = torch.tensor([1.0, 3.0])
    two = [[layer + d, layer + d] for d in (0.0, 2.0)]
    assert proxies.inverse_variation(two) == pytest.approx(2 * log(6))


# The vote.


def test_a_tie_goes_to_the_smaller_network():
    winner, ballot = proxies.vote(kappa=[10, 20], zico=[1, 2])
    assert ballot["ranks"] == {"kappa": [1, 2], "zico": [2, 1]}
    assert ballot["total"] == [1.5, 1.5] and winner == 1


def test_both_proxies_can_outvote_pruning():
    assert proxies.vote(kappa=[10, 20], zico=[2, 1])[0] == 0


def test_the_size_counts_as_much_as_both_proxies():
    winner, ballot = proxies.vote(kappa=[10, 20, 30], zico=[3, 2, 1], size=[300, 200, 100])
    assert ballot["ranks"]["size"] == [3, 2, 1]
    assert ballot["total"] == [4, 4, 4] and winner == 2
    assert proxies.vote(kappa=[10, 20, 30], zico=[3, 2, 1])[0] == 0


def test_equal_values_share_a_rank():
    assert proxies.ranks([2.0, 1.0, 1.0 + 1e-7, 1.0]) == [4, 1, 1, 1]
    assert proxies.ranks([3.0, -1.0, 2.0]) == [3, 1, 2]


# The stages. Scripted proxies say which candidate wins by how many blocks are left.


def _scripted(monkeypatch, *goals):
    """A `select` whose stages want these numbers of layers gone in total."""
    select, wanted = _entpruner(), list(goals)

    def kappa(network, batches, predict):
        gone = round((TOTAL - parameter_count(network)) / BLOCK)
        return 1.0 if gone == wanted[0] else 2.0

    def vote(kappas, zico, size):
        wanted.pop(0)
        return proxies.vote(kappas, [1.0] * len(kappas), size)

    monkeypatch.setitem(select.__globals__, "ntk_condition", kappa)
    monkeypatch.setitem(select.__globals__, "vote", vote)
    return select


def _context(blocks=3, train_images=64):
    """64 images in four stages of 16, to remove some of four blocks."""
    return tiny.context("dit", sparsity=blocks * BLOCK / TOTAL, train_images=train_images)


@pytest.mark.parametrize(
    ("goals", "removed", "trained"),
    [
        ((1, 1, 2), [1, 0, 1, 1], 48),
        ((0, 0, 0), [0, 0, 0, 3], 48),
        ((0, 2, 3), [0, 2, 1, 0], 32),
        ((1, 2, 3), [1, 1, 1, 0], 32),
        ((1,), [1, 0, 0, 0], 0),
    ],
)
def test_the_vote_decides_when_and_how_much(monkeypatch, goals, removed, trained):
    """Not which: that is the one-shot order. What follows the target is left to recovery."""
    context = _context(sum(removed))
    plan, model = _scripted(monkeypatch, *goals)(context, **QUICK)
    votes, ced = plan.notes["votes"], plan.notes["ced"]
    assert [len(v["removed"]) for v in votes] + [0] * (4 - len(votes)) == removed
    told = [f"{n} at step {2 * stage}" for stage, n in enumerate(removed) if n]
    assert plan.notes["summary"] == f"layers removed: {', '.join(told)} of 8"
    assert context.progress.held == trained // 8, "the rate is held until the last removal"
    assert not selection.averaged(context, plan), "and the average begins after it"
    assert context.trained_images == trained
    gone = [name for v in votes for name in v["removed"]]
    assert gone == sorted(ced, key=ced.get)[: sum(removed)]
    one_shot, _ = _entpruner()(_context(sum(removed), 0), **QUICK)
    assert plan.layers == one_shot.layers == tuple(sorted(gone))
    untouched = surgery.apply(tiny.dense("dit"), plan, tiny.INSTANCES["dit"].module)
    same = torch.equal(tiny.output(model, "dit"), tiny.output(untouched, "dit"))
    assert same == (trained == 0), "the returned model is the one that was trained"


def test_every_vote_is_on_record(monkeypatch):
    plan, _ = _scripted(monkeypatch, 1, 1, 2)(_context(), **QUICK)
    first, second, third, last = plan.notes["votes"]
    assert [v["candidates"] for v in (first, second, third, last)] == [
        [0, 1],
        [1, 2],
        [1, 2, 3],
        [3],
    ]
    assert third["kappa"] == [2.0, 1.0, 2.0] and len(third["zico"]) == 3
    assert third["ranks"] == {"kappa": [2, 1, 2], "zico": [1, 1, 1]}
    assert third["total"] == [1.5, 1.0, 1.5] and len(third["removed"]) == 1
    assert "kappa" not in last, "the last stage is forced to the target"


@pytest.mark.parametrize(
    ("removed", "target", "stage", "expected"),
    [
        (0, 14, 1, [0, 4]),
        (4, 14, 2, [4, 7]),
        (0, 14, 3, [0, 4, 7, 11]),
        (4, 14, 4, [14]),
        (0, 2, 1, [0, 1]),
        (1, 2, 2, [1]),
        (1, 2, 3, [1, 2]),
        (0, 1, 1, [0, 1]),
    ],
)
def test_candidates_follow_an_even_schedule(removed, target, stage, expected):
    """None ahead of stage / stages of the target, all that was put off, and the target at last."""
    assert _entpruner().__globals__["candidates"](removed, target, stage, 4) == expected


def test_time_rank_prunes_what_the_proxies_would_keep(monkeypatch):
    """The proxies want nothing gone until the last stage; the cheapest candidate always wins."""
    plan, _ = _scripted(monkeypatch, 0, 1, 2)(_context(), **QUICK, time_rank=True)
    assert plan.notes["votes"][0]["ranks"]["size"] == [2, 1]
    assert [len(vote["removed"]) for vote in plan.notes["votes"]] == [1, 1, 1]


def test_without_training_it_is_the_one_shot_ranking(monkeypatch):
    """Also where a stage would be shorter than one step; no proxy is computed then."""
    select = _entpruner()
    for name in ("ntk_condition", "zico"):
        monkeypatch.setitem(select.__globals__, name, None)
    for images in (0, 31):
        context = _context(2, images)
        plan, model = select(context, **QUICK)
        ced = plan.notes["ced"]
        assert plan.layers == tuple(sorted(sorted(ced, key=ced.get)[:2]))
        assert plan.notes["summary"] == "one-shot: no training between stages"
        expected = surgery.apply(tiny.dense("dit"), plan, tiny.INSTANCES["dit"].module)
        tiny.assert_same(model.state_dict(), expected.state_dict())
        assert context.trained_images == 0


def test_survivors_are_ranked_again(monkeypatch):
    """The first ranking says 0, 1, 2, 3; what is left is ranked the other way round."""
    select, seen = _scripted(monkeypatch, 1, 1, 2), []

    def ranked(context, model, layers, batches, per_dimension):
        seen.append([layer.name for layer in layers])
        return (list(reversed(layers)) if len(seen) == 2 else layers), {"ced": {}}

    monkeypatch.setitem(select.__globals__, "ranked", ranked)
    plan, _ = select(_context(), **QUICK, rerank=True)
    assert seen[1] == ["blocks.1", "blocks.2", "blocks.3"]
    assert [v["removed"] for v in plan.notes["votes"]] == [
        ["blocks.0"],
        [],
        ["blocks.3"],
        ["blocks.2"],
    ]
    assert plan.layers == ("blocks.0", "blocks.2", "blocks.3")


@pytest.mark.parametrize(("instance", "images"), [("dit", 64), ("unet", 64), ("unet", 0)])
def test_ranking_again_meets_the_target_where_layers_differ(instance, images):
    context = tiny.context(instance, sparsity=0.4, train_images=images, method="entpruner")
    parameters = {**QUICK, "draws": 10, "rerank": True, "granularity": "branch"}
    plan, _ = selection.select(context, _entpruner(), "layers", parameters)
    assert all("ced" in vote for vote in plan.notes["votes"][1:])


@pytest.mark.parametrize(("sparsity", "kept", "millions"), [(0.3, 20, 483.9), (0.5, 14, 340.5)])
def test_blocks_that_the_published_ratios_leave_of_dit_xl_2(sparsity, kept, millions):
    family = models.family("dit")
    with init_empty_weights(include_buffers=False):
        model = family.build(
            {"resolution": 32, "channels": 4, "patch": 2, "width": 1152, "depth": 28, "heads": 16}
            | {"classes": 1000, "learn_sigma": True}
        )
    layers = family.layers(model, "block")
    assert {layer.parameters for layer in layers} == {18 * 1152**2 + 15 * 1152} == {23_905_152}
    plan = plan_layers(model, layers, sparsity)
    assert 28 - len(plan.layers) == kept
    for name in plan.layers:
        family.remove_layer(model, name)
    positions = model.pos_embed.numel()  # a buffer here, a parameter in the paper's release
    assert (parameter_count(model) + positions) / 1e6 == pytest.approx(millions, abs=0.05)
