"""Diff-Pruning and its Taylor baseline against the published arithmetic and torch-pruning's own."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch_pruning
from torch import nn

from prunebench.diffusion.objectives import FlowMatching, NoisePrediction
from prunebench.diffusion.sampling import Sampler
from prunebench.errors import CellError
from prunebench.evaluation.cost import count_macs
from prunebench.evaluation.metrics import Evidence, psnr, ssim
from prunebench.models import unet
from prunebench.models.units import Member, Width, parameter_count
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection import checks as selection
from prunebench.selection import scores
from prunebench.tracks import methods

BOTH = pytest.mark.parametrize("method", ["diff_pruning", "taylor"])
SHORT = {"timesteps": 4, "batch": 4}


def _select(method: str):
    return methods.load(tiny.found_methods()[method])


def _rows(count: int) -> torch.Tensor:
    return torch.arange(count).unsqueeze(1)


def _context(model, loss, widths=(), goal=None, side=1):
    """A context whose loss is loss(time), and whose plan is its scores and notes."""
    return SimpleNamespace(
        model=model,
        draws=lambda count, batch: [None],
        at_time=lambda batch, t: t,
        loss=lambda _, t: loss(t),
        data=SimpleNamespace(
            objective=goal or NoisePrediction(), images=torch.zeros(1, 1, side, side)
        ),
        widths=lambda: widths,
        plan_widths=lambda scores, **notes: SimpleNamespace(scores=scores, notes=notes),
    )


# Scores of a linear model.


def _linear(side: int = 1):
    """Rows w = (2, 1), y = (3, 0) and w = (1, 1), y = (0, 0) under L = |Xw - y|^2 / 2, X diagonal.

    Gradients (-1, 4) and (1, 4), so w G = (-2, 4) and (1, 4).
    """
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    unit = Width("rows", 2, (Member("0.weight", 0, _rows(2)),))
    return _context(
        model, lambda t: (model[0].weight * x - y).square().sum() / 2, [unit], side=side
    )


def test_taylor_terms_of_a_linear_model():
    context = _linear()
    assert scores.accumulate_gradients(context, 1, 1) == 1
    assert context.model[0].weight.grad.tolist() == [[-1, 4], [1, 4]]
    terms = scores.taylor_terms(scores.matrices(context.model))
    assert terms["0.weight"].tolist() == [[-2, 4], [1, 4]]


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("diff_pruning", {}, [6 / 5.5, 5 / 5.5]),  # |wG| summed: 6 and 5, divided by their mean
        ("taylor", {}, [2 / 3.5, 5 / 3.5]),  # |sum of wG|: 2 and 5
        ("diff_pruning", {"path": "a"}, [20, 17]),  # (wG)^2 summed, not normalised
        ("diff_pruning", {"path": "a", "loss": "sum"}, [20 * 16, 17 * 16]),  # 2x2 values per image
        ("diff_pruning", {"loss": "sum"}, [6 / 5.5, 5 / 5.5]),
    ],
)
def test_scores_of_a_linear_model(method, parameters, expected):
    plan = _select(method)(_linear(side=2), timesteps=1, batch=1, **parameters)
    assert plan.scores["rows"].tolist() == pytest.approx(expected)


def test_the_baseline_ranks_other_channels_lowest_than_diff_pruning():
    """In the first row -2 and 4 cancel in |sum| only."""
    lowest = [
        _select(method)(_linear(), timesteps=1, batch=1).scores["rows"].argmin().item()
        for method in ("diff_pruning", "taylor")
    ]
    assert lowest == [1, 0]


# The gate.


def _gated(function, threshold, stop="before", timesteps=1000, goal=None):
    """`accumulate_gradients` with a predictor function(x, p) on x0 = 0 and noise +-1."""
    model = nn.Module()
    model.p = nn.Parameter(torch.ones(()))
    goal, noise = goal or NoisePrediction(), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)

    def loss(t):
        noised, target = goal.noised(torch.zeros_like(noise), noise, t.expand(2))
        return (function(noised, model.p) - target).square().mean()

    context = _context(model, loss, goal=goal)
    used = scores.accumulate_gradients(context, timesteps, 2, threshold, stop)
    return used, model.p.grad


def _worked_gradient(count):
    """d/dp of (p sqrt(1 - abar) - 1)^2 at p = 1, summed over the first `count` times."""
    root = (1 - NoisePrediction().scheduler.alphas_cumprod.double()[:count]).sqrt()
    return (2 * (root - 1) * root).sum().item()


@pytest.mark.parametrize(
    ("threshold", "index"), [(0.01, 404), (0.02, 362), (0.05, 301), (0.1, 248), (0.0, 1000)]
)
@pytest.mark.parametrize("stop", ["before", "after"])
def test_the_gate_closes_where_worked_out(threshold, index, stop):
    """eps_hat = x_t on x0 = 0: L_t = (1 - sqrt(1 - abar_t))^2, from L_0 = 0.9801 downwards.

    Tested before the backward pass the closing time's gradient is left out, after it taken in.
    """
    used, gradient = _gated(lambda x, p: p * x, threshold, stop)
    assert used == min(1000, index + (stop == "after"))
    assert gradient.item() == pytest.approx(_worked_gradient(used), 1e-4)


@pytest.mark.parametrize("threshold", [0.05, 1.0])
@pytest.mark.parametrize("stop", ["before", "after"])
def test_a_constant_loss_never_closes_the_gate(threshold, stop):
    assert _gated(lambda x, p: 0 * p * x, threshold, stop)[0] == 1000


def test_the_gate_compares_with_the_largest_loss_so_far():
    """0.4 is below 5 % of the second loss, 10, though not of the first."""
    model, losses = nn.Linear(1, 1), iter([1.0, 10.0, 0.6, 0.4, 5.0])
    context = _context(model, lambda t: next(losses) + 0 * model.weight.sum())
    assert scores.accumulate_gradients(context, 5, 1, 0.05) == 3


@pytest.mark.parametrize(("goal", "closes"), [(NoisePrediction(), True), (FlowMatching(), False)])
def test_the_gate_closes_on_noise_prediction_and_not_on_velocities(goal, closes):
    """The least possible loss on x0 ~ N(0, 1/4), the scale of images: var(target | x_t)."""
    model = nn.Linear(1, 1)

    def loss(t):
        one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        (signal, from_image), (noise, from_noise) = (
            [float(part) for part in goal.noised(*pair, t.expand(1))]
            for pair in ((one, none), (none, one))
        )
        best = (signal * from_noise - noise * from_image) ** 2 / 4 / (signal**2 / 4 + noise**2)
        return best + 0 * model.weight.sum()

    used = scores.accumulate_gradients(_context(model, loss, goal=goal), 1000, 1, 0.05)
    assert (used < 1000) == closes


@pytest.mark.parametrize("instance", ["unet", "sit"])
def test_gradients_of_one_batch_add_up_over_ascending_times(instance):
    """Against autograd on the same images and noise at every time, without averaging."""
    context, again = tiny.context(instance), tiny.context(instance)
    assert scores.accumulate_gradients(context, 5, 6) == 5
    (batch,) = again.draws(6, 6)
    named = {n: p for n, p in again.model.named_parameters() if p.requires_grad}
    expected = dict.fromkeys(named, 0)
    for t in again.data.objective.grid(5):
        loss = again.loss(again.model, again.at_time(batch, t))
        found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        expected = {n: expected[n] + g for n, g in zip(named, found, strict=True)}
    for name, weight in scores.matrices(context.model).items():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_a_second_accumulation_starts_from_zero():
    context = _linear()
    for _ in range(2):
        scores.accumulate_gradients(context, 3, 1)
    assert context.model[0].weight.grad.tolist() == [[-3, 12], [3, 12]]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"stop": "during"}, "stop 'during' one of"),
        ({"threshold": 1.5}, r"threshold 1\.5 must be in \[0, 1\]"),
        ({"threshold": -0.1}, r"threshold -0\.1 must be in \[0, 1\]"),
        ({"path": "c"}, "path 'c' must be 'a' or 'b'"),
        ({"loss": "max"}, "loss 'max' 'mean' or 'sum'"),
    ],
)
def test_options_that_do_not_exist(parameters, message):
    with pytest.raises(CellError, match=message):
        _select("diff_pruning")(_linear(), timesteps=1, batch=1, **parameters)


def test_the_gate_is_on_record():
    plan = _select("diff_pruning")(_linear(), timesteps=7, batch=1)
    assert plan.notes == {
        "stopped_at": 7,
        "timesteps": 7,
        "summary": "gradients of 7 of 7 times",
    }


# Scores of whole groups, against torch-pruning's own.


class Small(nn.Module):
    """Two convolutions with a normalisation, then a matrix; gradients are given, not computed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)
        self.second, self.last = nn.Conv2d(4, 6, 1), nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))

    def units(self) -> list[Width]:
        def unit(name, size, *members):
            return Width(name, size, tuple(Member(t, axis, _rows(size)) for t, axis in members))

        norm = [("norm.weight", 0), ("norm.bias", 0), ("second.weight", 1)]
        return [
            unit("first", 4, ("first.weight", 0), ("first.bias", 0), *norm),
            unit("second", 6, ("second.weight", 0), ("second.bias", 0), ("last.weight", 1)),
        ]


def _importance(model: nn.Module, inputs: tuple, importance, ignored: nn.Module) -> dict:
    """torch-pruning's scores of its own groups, by the name of their root."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    groups = graph.get_all_groups(
        ignored_layers=[ignored], root_module_types=[nn.Conv2d, nn.Linear]
    )
    return {names[group[0].dep.target.module]: importance(group) for group in groups}


def _small_or_tiny(name: str):
    """(model with gradients, its widths, example inputs, output layer)."""
    if name == "small":
        model = Small()
        return model, model.units(), (torch.zeros(1, 2, 5, 5),), model.last
    context = tiny.context(name)
    scores.accumulate_gradients(context, 3, 4)
    model = selection.unmetered(context.model)
    for own, other in zip(model.parameters(), context.model.parameters(), strict=True):
        own.grad = other.grad
    index = torch.zeros(1, dtype=torch.long)
    inputs = (torch.zeros(1, *tiny.INSTANCES[name].shape), index, index)
    return model, context.widths(), inputs, model.conv_out


def _scores(method: str, model: nn.Module, units: list[Width], side: int = 1, **options) -> dict:
    """What a method scores with the gradients that `model` already has."""
    select = _select(method)
    select.__globals__["accumulate_gradients"] = lambda *_: 1
    return select(_context(model, None, units, side=side), **options).scores


def _once(unit: Width) -> bool:
    """Every layer of the group holds each channel once.

    A skip connection within a group gives a layer two columns per channel: |sum| then is one sum
    here and two in torch-pruning. Heads of a tiny UNet are many channels.
    """
    return all(member.index.shape[1] == 1 for member in unit.members)


MODELS = pytest.mark.parametrize("net", ["small", "unet", "unet_attention"])


def _compared(units, found, expected, least):
    """Compares every width that is a group of torch-pruning's, at least `least` of them."""
    common = [unit.name for unit in units if unit.name in expected]
    assert len(common) >= least, f"only {len(common)} groups to compare"
    for name in common:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


@MODELS
def test_path_b_is_torch_prunings_taylor_importance(net):
    model, units, inputs, ignored = _small_or_tiny(net)
    importance = torch_pruning.importance.GroupTaylorImportance(multivariable=False)
    expected = _importance(model, inputs, importance, ignored)
    _compared(units, _scores("diff_pruning", model, units), expected, least=len(units) // 2)


@MODELS
def test_taylor_is_torch_prunings_multivariable_importance(net):
    model, units, inputs, ignored = _small_or_tiny(net)
    importance = torch_pruning.importance.GroupTaylorImportance(multivariable=True)
    expected = _importance(model, inputs, importance, ignored)
    single = [unit for unit in units if _once(unit)]
    _compared(single, _scores("taylor", model, units), expected, least=2)


@MODELS
def test_path_a_is_torch_prunings_importance_of_squares(net):
    """Squared weights and gradients turn its sum of |w G| into the sum of (w G)^2; norms stay."""
    model, units, inputs, ignored = _small_or_tiny(net)
    found = _scores("diff_pruning", model, units, path="a")
    for weight in scores.matrices(model).values():
        weight.data, weight.grad = weight.data**2, weight.grad**2
    importance = torch_pruning.importance.GroupTaylorImportance(
        group_reduction="sum", normalizer=None, target_types=[nn.Conv2d, nn.Linear, nn.GroupNorm]
    )
    expected = _importance(model, inputs, importance, ignored)
    _compared([unit for unit in units if _once(unit)], found, expected, least=2)


def _cut_in_turn(model, units, inputs, importance, ignored, ratio) -> dict:
    """What torch-pruning keeps where it scores and slices one group after the other, by root."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    units, kept = {unit.name: unit for unit in units}, {}
    roots = graph.get_all_groups(ignored_layers=[ignored], root_module_types=[nn.Conv2d, nn.Linear])
    for group in roots:
        name, place = names[group[0].dep.target.module], group[0].dep
        if name not in units:  # of an attention, whose heads are cut whole
            continue
        unit = units[name]
        order = importance(group).view(unit.groups, -1).argsort(1)
        each = targets.uniform_count(unit, ratio) // unit.groups
        start = torch.arange(unit.groups)[:, None] * (unit.size // unit.groups)
        gone = (order[:, :each] + start).flatten().tolist()
        if gone:
            graph.get_pruning_group(place.target.module, place.handler, gone).prune()
            kept[name] = tuple(sorted(set(range(unit.size)) - set(gone)))
    return kept


@pytest.mark.parametrize("net", ["small", "unet"])
@pytest.mark.parametrize(
    ("method", "importance"),
    [
        ("magnitude_widths", torch_pruning.importance.GroupMagnitudeImportance(p=2)),
        ("diff_pruning", torch_pruning.importance.GroupTaylorImportance()),
    ],
)
def test_sequential_cuts_what_torch_pruning_cuts_group_by_group(net, method, importance):
    model, units, inputs, ignored = _small_or_tiny(net)
    context = _context(model, None, units)
    context.sparsity = 0.5
    context.plan_uniform = lambda scores, **notes: targets.plan_uniform(units, scores, 0.5)
    select = _select(method)
    select.__globals__["accumulate_gradients"] = lambda *_: 1
    ours = select(context, uniform=True, sequential=True).kept
    at_once = select(context, uniform=True).kept
    theirs = _cut_in_turn(model, units, inputs, importance, ignored, 0.5)
    assert theirs and {name: ours[name] for name in theirs} == theirs
    if net == "unet":  # where the order matters
        assert ours != at_once


@pytest.mark.parametrize(("loss", "scale"), [("mean", 1), ("sum", 9)])
def test_path_a_weighs_normalisations_by_the_scale_of_the_loss(loss, scale):
    """With 3x3 values per image the gradients of the sum are 9 times those of the mean."""
    model = Small()
    unit = model.units()[0]
    found = _scores("diff_pruning", model, [unit], side=3, path="a", loss=loss)
    parts = ((model.first, (1, 2, 3)), (model.second, (0, 2, 3)))
    squares = sum((m.weight * m.weight.grad).square().sum(axes) for m, axes in parts)
    norms = (model.norm.weight * model.norm.weight.grad).abs()
    torch.testing.assert_close(found["first"], (scale**2 * squares + scale * norms).detach())


def test_path_a_leaves_out_layers_that_hold_a_channel_more_often_than_the_first():
    """The skip connection of the deepest level: its first up block has two columns a channel."""
    model, units, *_ = _small_or_tiny("unet")
    unit = next(u for u in units if u.members[0].index.shape[1] == 1 and not _once(u))
    twice = {m.tensor for m in unit.members if m.index.shape[1] == 2}
    assert "up_blocks.0.resnets.0.conv1.weight" in twice
    before = {path: _scores("diff_pruning", model, [unit], path=path) for path in "ab"}
    for tensor in twice:
        model.get_parameter(tensor).grad *= 100
    after = {path: _scores("diff_pruning", model, [unit], path=path) for path in "ab"}
    tiny.assert_same(before["a"], after["a"])
    assert not torch.allclose(before["b"][unit.name], after["b"][unit.name])


@BOTH
def test_biases_and_embeddings_have_no_say(method):
    model, units, *_ = _small_or_tiny("unet")
    before = _scores(method, model, units)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.startswith("class_embedding"):
            parameter.grad *= 100
    tiny.assert_same(before, _scores(method, model, units))


# The paper's networks at 30 % (on the meta device: shapes, no weights).

# size, channels per level, level with attention; dense M and GMAC, pruned M and GMAC (paper).
NETWORKS = {
    "cifar10": (32, (1, 2, 2, 2), 1, (35.75, 6.05), (19.8, 3.4)),
    "celeba": (64, (1, 2, 2, 2, 4), 2, (78.70, 23.88), (43.7, 13.3)),
    "lsun": (256, (1, 1, 2, 2, 4, 4), 4, (113.67, 248.2), (63.2, 138.8)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """(name, DDPM UNet with heads of 8 channels, its widths)."""
    _, levels, attention, *_ = NETWORKS[request.param]
    kinds = ["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(len(levels))]
    with torch.device("meta"):
        model = unet.build(
            {
                # Groups do not depend on the resolution, so they are traced at the smallest.
                "sample_size": 2 ** len(levels),
                "in_channels": 3,
                "out_channels": 3,
                "layers_per_block": 2,
                "block_out_channels": [128 * level for level in levels],
                "down_block_types": kinds,
                "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
                "norm_num_groups": 32,
                "attention_head_dim": 8,
            }
        )
    return request.param, model.eval(), unet.widths(model)


def _left(model, units, ratio=0.3) -> int:
    sizes = targets.Sizes(model, units)
    return sizes.total - sizes.removed({u.name: targets.uniform_count(u, ratio) for u in units})


def _regrouped(units: list[Width], channels: int) -> list[Width]:
    """The same widths with `channels` per attention head (0: one head of all)."""

    def heads(unit):
        rows = unit.members[0].index.view(-1, channels or unit.members[0].index.numel())
        return Width(
            unit.name, len(rows), tuple(Member(m.tensor, m.axis, rows) for m in unit.members)
        )

    return [heads(unit) if unit.name.endswith(".heads") else unit for unit in units]


def test_parameters_of_the_papers_networks(network):
    """Inner attention channels one by one as in the paper, in heads of 8, and in a single head."""
    name, model, units = network
    *_, (dense, _), (pruned, _) = NETWORKS[name]
    assert parameter_count(model) / 1e6 == pytest.approx(dense, abs=0.005)
    assert _left(model, _regrouped(units, 1)) / 1e6 == pytest.approx(pruned, rel=0.003)
    assert _left(model, units) / 1e6 == pytest.approx(pruned, rel=0.003)
    # A single head cannot go: 1.3 to 2.3 % more than published stay.
    assert 1.012 < _left(model, _regrouped(units, 0)) / 1e6 / pruned < 1.024


def test_multiply_accumulates_and_widths_of_the_papers_networks(network):
    name, model, units = network
    size, *_, (_, dense), (_, pruned) = NETWORKS[name]
    index = torch.zeros(1, dtype=torch.long, device="meta")
    inputs = (torch.zeros(1, 3, size, size, device="meta"), index, index)
    macs = count_macs(model, *inputs)["macs_without_attention_products"]
    assert macs / 1e9 == pytest.approx(dense, rel=1e-3)
    model = copy.deepcopy(model)
    scored = {unit.name: torch.arange(unit.size) for unit in units}
    plan = targets.plan_uniform(units, scored, 0.3)
    surgery.shrink(model, [(unit, plan.kept[unit.name]) for unit in units])
    unet.refresh(model)
    macs = count_macs(model, *inputs)["macs_without_attention_products"]
    assert macs / 1e9 == pytest.approx(pruned, rel=0.01)
    assert model(*inputs).shape == inputs[0].shape
    kept = {(unit.size, unit.groups): len(plan.kept[unit.name]) for unit in units}
    published = {(128, 32): 96, (256, 32): 192, (512, 32): 384, (512, 1): 358}
    assert published.items() <= {**published, **kept}.items() and kept[512, 1] == 358
    norms = [m.num_channels for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert all(channels % 32 == 0 for channels in norms)


@pytest.mark.parametrize(
    ("channels", "groups", "ratio", "kept"),
    [
        (128, 32, 0.3, 96), (256, 32, 0.3, 192), (512, 32, 0.3, 384),
        (512, 1, 0.3, 358), (256, 1, 0.3, 179),
        (128, 32, 0.4, 96), (256, 32, 0.4, 160), (512, 32, 0.4, 320),
        (128, 32, 0.5, 64), (256, 32, 0.5, 128), (512, 32, 0.5, 256), (512, 32, 0.0, 512),
    ],
)  # fmt: skip
def test_kept_channels_of_the_uniform_ratio(channels, groups, ratio, kept):
    unit = Width("w", channels, (), groups)
    plan = targets.plan_uniform([unit], {"w": torch.arange(channels).flip(0)}, ratio)
    assert len(plan.kept.get("w", range(channels))) == kept
    per_group = torch.tensor(plan.kept.get("w", range(channels))) // (channels // groups)
    assert per_group.unique(return_counts=True)[1].unique().numel() == 1


# What pruning must not change.


def test_a_model_agrees_with_itself():
    settings = {"sampler": "ddim", "steps": 3, "lanes": 4}
    images = []
    for _ in range(2):
        sampler = Sampler(tiny.dense("unet"), NoisePrediction(), (1, 8, 8), 10, settings)
        images.append(torch.cat(list(sampler.images(seed=5, start=0, stop=8, batch=4))))
    same = Evidence(generated={}, reference={}, images=images[0], dense_images=images[1])
    assert ssim.compute(same) == pytest.approx(1, abs=1e-6)
    assert "infinite" in psnr.compute(same).reason  # a squared error of exactly 0


@pytest.mark.parametrize(
    ("method", "options"), [("taylor", {}), ("diff_pruning", {}), ("diff_pruning", {"path": "a"})]
)
def test_a_dead_channel_of_a_group_without_norm_goes_first_and_changes_nothing(method, options):
    """A neuron of the time MLP without weights in or out and without bias: its score is 0."""
    model, dead = tiny.dense("unet"), 7
    first, second = model.time_embedding.linear_1, model.time_embedding.linear_2
    for tensor in (first.weight[dead], first.bias[dead : dead + 1], second.weight[:, dead]):
        tensor.data.zero_()
    expected = tiny.output(model, "unet")
    context = tiny.context("unet", model, sparsity=0.04)
    plan, _ = selection.select(context, _select(method), "widths", SHORT | options)
    name = "time_embedding.linear_1"
    assert dead not in plan.kept[name]
    unit = next(u for u in unet.widths(model) if u.name == name)
    assert unit.groups == 1
    only = tuple(i for i in range(unit.size) if i != dead)
    surgery.apply(model, Plan(kept={name: only}), unet)
    assert model.time_embedding.linear_1.out_features == unit.size - 1
    torch.testing.assert_close(tiny.output(model, "unet"), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_the_score_of_a_dead_channel_is_zero(method):
    model, dead = tiny.dense("unet"), 7
    model.time_embedding.linear_1.weight[dead].data.zero_()
    model.time_embedding.linear_2.weight[:, dead].data.zero_()
    context = tiny.context("unet", model)
    context.plan_widths = lambda scores, **notes: scores
    found = _select(method)(context, **SHORT)["time_embedding.linear_1"]
    assert found[dead] == 0 and found.count_nonzero() == len(found) - 1


@BOTH
def test_a_ratio_of_zero_leaves_the_network_alone(method):
    context = tiny.context("unet", sparsity=0.0)
    plan = _select(method)(context, uniform=True, **SHORT)
    assert not plan.kept
    tiny.assert_same(
        surgery.apply(tiny.dense("unet"), plan, unet).state_dict(), tiny.dense("unet").state_dict()
    )


@BOTH
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_output_channels_survive_any_ratio(method, ratio):
    context = tiny.context("unet", sparsity=ratio)
    plan = _select(method)(context, uniform=True, **SHORT)
    pruned = surgery.apply(tiny.dense("unet"), plan, unet)
    assert pruned.conv_out.out_channels == 1 and pruned.conv_in.in_channels == 1
    assert tiny.output(pruned, "unet").isfinite().all()


# Every family, with every option.

OPTIONS = {
    "taylor": [{"uniform": True}],
    "diff_pruning": [
        {"uniform": True, "stop": "after"},
        {"path": "a", "loss": "sum"},
    ],
}
CASES = [(method, options) for method in OPTIONS for options in OPTIONS[method]]


@pytest.mark.parametrize("instance", tiny.NAMES)
@pytest.mark.parametrize(("method", "options"), CASES)
def test_every_option_meets_its_target_on_every_family(method, options, instance):
    context = tiny.context(instance, sparsity=0.3, method=method)
    plan, pruned = selection.select(context, _select(method), "widths", SHORT | options)
    assert plan.pattern == (targets.UNIFORM if options.get("uniform") else None)
    assert tiny.output(pruned, instance).isfinite().all()
