"""SparseDM: pattern, gradient, loss scaling, distillation, ladder, what it spends and returns."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection import checks as selection
from prunebench.tracks import methods
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

FOUND = tiny.found_methods()["sparsedm"]
SELECT = methods.load(FOUND)
SPARSEDM = SimpleNamespace(**SELECT.__globals__)
DECAY = 2e-4
BUDGET = 64


def _context(name: str, images: int = BUDGET, settings: dict | None = None) -> selection.Context:
    return tiny.context(
        name,
        sparsity=0.5,
        method="sparsedm",
        meter=BudgetMeter(),
        train_images=images,
        settings=tiny.settings(**(settings or {})),
    )


def _select(context: selection.Context, **parameters) -> tuple[Plan, nn.Module]:
    return selection.select(context, SELECT, FOUND.kind, parameters)


def _sparse(name: str, n: int = 2, m: int = 4) -> nn.Module:
    """A tiny model that runs under n:m masks wherever m divides the inputs."""
    model = tiny.dense(name)
    SPARSEDM.sparsify(model, _fitting(name, m))
    SPARSEDM.set_pattern(model, n, m)
    return model


def _fitting(name: str, m: int = 4) -> list[str]:
    model, family = tiny.dense(name), tiny.INSTANCES[name].module
    return [n for n in family.weights(model) if model.get_parameter(n).shape[1] % m == 0]


def _latent(model: nn.Module, name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path).parametrizations[leaf].original


def _layer(weight: list[float]) -> tuple[nn.Linear, nn.Parameter]:
    """A layer of one output under 2:4, and the dense weight behind it."""
    layer = nn.Linear(len(weight), 1, bias=False)
    layer.weight.data = torch.tensor([weight])
    SPARSEDM.sparsify(layer, ["weight"])
    SPARSEDM.set_pattern(layer, 2, 4)
    return layer, layer.parametrizations.weight.original


def _groups(weight: torch.Tensor) -> torch.Tensor:
    """[groups, 4] along the inputs, one kernel tap at a time, by slicing and nothing cleverer."""
    taps = weight.unsqueeze(-1) if weight.dim() == 2 else weight.flatten(2)
    return torch.cat(
        [
            taps[:, first : first + 4, tap]
            for tap in range(taps.shape[2])
            for first in range(0, taps.shape[1], 4)
        ]
    )


# The pattern.


@pytest.mark.parametrize("shape", [(3, 8), (64, 12), (4, 8, 3, 3), (2, 4, 1, 1)])
def test_every_group_keeps_its_two_largest(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sparse = SPARSEDM.Sparse()
    sparse.n, sparse.m = 2, 4
    before, after = _groups(weight), _groups(sparse(weight))
    for dense, masked in zip(before.tolist(), after.tolist(), strict=True):
        kept = sorted(dense, key=abs)[2:]
        assert masked == [value if value in kept else 0 for value in dense]


def test_the_returned_model_has_two_of_every_four(name):
    """Every masked weight exactly; the rest dense, trained and on record; no tensor added."""
    plan, model = _select(_context(name, 16, settings={"ema": 0.5}))
    dense = tiny.dense(name)
    assert list(plan.masks) == _fitting(name)
    for weight, mask in plan.masks.items():
        assert (_groups(model.get_parameter(weight)) != 0).sum(1).eq(2).all(), weight
        assert torch.equal(model.get_parameter(weight) != 0, mask)
    family = tiny.INSTANCES[name].module
    assert plan.notes["stay_dense"] == sorted(set(family.weights(dense)) - set(_fitting(name)))
    for weight in plan.notes["stay_dense"]:
        assert model.get_parameter(weight).all(), f"{weight} should have stayed dense"
        assert not torch.equal(model.get_parameter(weight), dense.get_parameter(weight))
    assert model.state_dict().keys() == dense.state_dict().keys()  # no new bias
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in model.modules())


def test_the_mask_follows_the_weights():
    """Derived at every forward, in training and in evaluation."""
    layer, latent = _layer([0.1, -0.4, 0.3, 0.2])
    assert (layer.weight[0] != 0).tolist() == [False, True, True, False]
    latent.data[0, 0] = 0.5
    for module in (layer.train(), layer.eval()):
        assert (module.weight[0] != 0).tolist() == [True, True, False, False]


# Idempotence and identity.


def test_masking_twice_is_masking_once(name):
    model = _sparse(name)
    for sparse, weight in SPARSEDM.latent(model):
        mask = sparse.mask(weight)
        assert torch.equal(sparse.mask(mask * weight), mask)
        assert not mask.all()


def test_four_of_four_is_the_dense_model(name):
    assert torch.equal(tiny.output(_sparse(name, 4, 4), name), tiny.output(tiny.dense(name), name))
    assert not torch.equal(tiny.output(_sparse(name), name), tiny.output(tiny.dense(name), name))


# The gradient.


def test_the_decay_of_four_weights():
    layer, latent = _layer([0.1, -0.4, 0.3, 0.2])
    layer(torch.zeros(1, 4)).sum().backward()
    SPARSEDM.decay_pruned(layer, DECAY)
    assert latent.grad[0].tolist() == pytest.approx([2e-5, 0, 0, 4e-5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_is_straight_through_plus_the_decay(core, precision):
    """g is the gradient of a plain model that holds m(W) * W; pruned entries receive it too."""
    model, plain = _sparse(core), tiny.dense(core)
    for weight in _fitting(core):
        plain.get_parameter(weight).data = _at(model, weight).detach().clone()
    for network in (model, plain):
        _backward(network, core, precision)
    straight = {n: _latent(model, n).grad.clone() for n in _fitting(core)}
    SPARSEDM.decay_pruned(model, DECAY)
    for weight in _fitting(core):
        latent, pruned = _latent(model, weight), _at(model, weight) == 0
        torch.testing.assert_close(straight[weight], plain.get_parameter(weight).grad)
        assert latent.grad.dtype == torch.float32
        expected = torch.where(pruned, straight[weight] + DECAY * latent, straight[weight])
        torch.testing.assert_close(latent.grad, expected, rtol=1e-6, atol=0)
        assert torch.equal(latent.grad[~pruned], straight[weight][~pruned])
    assert any(straight[n][_at(model, n) == 0].any() for n in straight), "pruned entries get no g"


def _at(model: nn.Module, name: str) -> torch.Tensor:
    """The weight as the layer runs with it."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _backward(model: nn.Module, name: str, precision: str) -> None:
    batch = tiny.data(name).draw(4, torch.Generator().manual_seed(1), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loop.own_loss(model, batch)
    value.backward()


# Loss scaling.


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
def test_the_decay_does_not_depend_on_the_loss_scale(scale):
    gradients = []
    for factor in (1.0, scale):
        layer, latent = _layer([0.1, -0.4, 0.3, 0.2, 0.05, 0.7, -0.6, 0.01])
        optimizer = torch.optim.SGD(layer.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        scaler.scale(layer(torch.linspace(0, 1e-4, 8).unsqueeze(0)).sum()).backward()
        scaler.unscale_(optimizer)
        SPARSEDM.decay_pruned(layer, DECAY)
        gradients.append(latent.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)


def test_the_loop_adds_the_decay_before_it_clips():
    """A decay far above the gradient leaves the pruned entries alone in the clipped gradient."""
    context, seen = _context("dit", 24), []

    def look(model, images, loss, adjust):
        def adjusted(network):
            adjust(network)
            seen.append([(w, w.grad.clone(), s.mask(w)) for s, w in SPARSEDM.latent(network)])

        return selection.Context.train(context, model, images, loss=loss, adjust=adjusted)

    context.train = look
    _select(context, decay=1e6)
    assert len(seen) == 3, "once for each step"
    for weight, gradient, mask in itertools.chain(*seen):
        assert gradient[~mask].abs().mean() > 100 * gradient[mask].abs().mean()
        assert (gradient * weight)[~mask].ge(0).all(), "the decay should pull towards zero"


def test_decay_shrinks_the_pruned_weights():
    sizes = []
    for decay in (0.0, 100.0):
        context = _context("dit")
        latent = _watched(context, lambda model: {w: s.mask(w) for s, w in SPARSEDM.latent(model)})
        _select(context, decay=decay)
        sizes.append(torch.cat([w[~mask].abs() for w, mask in latent[-1].items()]).mean())
    assert sizes[1] < 0.97 * sizes[0]


def _watched(context: selection.Context, look) -> list:
    """What `look` sees of the model after every stage of training."""
    seen, train = [], context.train

    def watched(model, images, **options):
        losses = train(model, images, **options)
        found = look(model)
        seen.append({w.detach().clone(): v for w, v in found.items()})
        return losses

    context.train = watched
    return seen


# Distillation.


def test_distillation_adds_nothing_to_a_student_that_is_dense(core):
    values, gradients = [], []
    for weight in (0.0, 0.1):
        model = _sparse(core, 4, 4)
        value = _distilled(core, model, weight)
        value.backward()
        values.append(value.item())
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert values[0] == values[1]
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=0, atol=0)


def test_distillation_pulls_a_masked_student_to_the_dense_output(core):
    plain, distilled = (_distilled(core, _sparse(core), weight).item() for weight in (0.0, 0.1))
    batch, context = _batch(core), _context(core)
    with torch.no_grad():
        student = context.predict(_sparse(core), batch)
        teacher = context.predict(tiny.dense(core), batch)
    expected = 0.1 * (student - teacher).square().mean().item()
    assert expected > 0
    assert distilled - plain == pytest.approx(expected, rel=1e-3)


def _batch(name: str) -> loop.Batch:
    return tiny.data(name).draw(4, torch.Generator().manual_seed(1), torch.device("cpu"))


def _distilled(name: str, model: nn.Module, weight: float) -> torch.Tensor:
    return _context(name).distilled(weight)(model, _batch(name))


def test_only_distillation_asks_the_teacher():
    for kd, images in ((0.0, 0), (0.1, 16)):
        context = _context("dit", 16)
        _select(context, kd=kd)
        assert context._meter.counts["teacher_forward"] == images
        assert context._meter.counts["student_backward"] == 16
    assert FOUND.recipe["parameters"] == {"kd": 0.1}
    assert FOUND.parameters["kd"] == 0.0, "the matched division trains with the model's own loss"


# The whole training.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("muon", [0.0, 5e-3])
def test_trains_in_either_precision_and_with_either_optimiser(core, precision, muon):
    settings = {"precision": precision, "muon_learning_rate": muon}
    context = _context(core, 16, settings)
    plan, model = _select(context)
    dense = tiny.dense(core)
    for weight, mask in plan.masks.items():
        value = model.get_parameter(weight)
        assert value.dtype == torch.float32 and value.isfinite().all()
        moved = value[mask] != dense.get_parameter(weight)[mask]
        assert moved.float().mean() > 0.9, f"{weight} was not trained"


def test_the_mask_is_that_of_the_averaged_dense_weights():
    """As in the release (utils.ema): the average is of W, and the mask is derived from it."""
    seen = []
    for ema in (0.0, 0.9):
        context = _context("dit", settings={"ema": ema})
        latent = _watched(context, lambda model: {w: None for _, w in SPARSEDM.latent(model)})
        plan, model = _select(context)
        weights = list(latent[-1])
        for (name, mask), weight in zip(plan.masks.items(), weights, strict=True):
            assert weight.all(), "the average is of the dense weights"
            assert torch.equal(mask, targets.n_of_m_mask(weight.abs(), 2, 4))
            assert torch.equal(model.get_parameter(name), weight * mask)
        seen.append(weights)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_without_a_budget_it_is_magnitude(name):
    plan, model = _select(_context(name, images=0))
    magnitude = methods.load(tiny.found_methods()["magnitude_2_4"])
    expected = magnitude(_context(name))
    tiny.assert_same(dict(plan.masks), dict(expected.masks))
    masked = surgery.apply(tiny.dense(name), expected, tiny.INSTANCES[name].module)
    tiny.assert_same(model.state_dict(), masked.state_dict())
    assert plan.notes["kept_new"] == 0
    assert f"{len(plan.masks)} of " in plan.notes["summary"]


def test_the_notes_say_how_far_the_mask_moved():
    context = _context("unet", 16, settings={"learning_rate": 3e-2})
    plan, _ = _select(context)
    first, _ = _select(_context("unet", images=0))
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    new = sum(int((mask & ~first.masks[name]).sum()) for name, mask in plan.masks.items())
    assert 0 < new < kept
    assert plan.notes["kept_new"] == pytest.approx(new / kept)
    assert f"{new / kept:.1%} of kept are new" in plan.notes["summary"]


@pytest.mark.parametrize(
    ("share", "images", "spent"), [(1.0, 64, 64), (0.5, 64, 32), (0.7, 64, 40), (0.7, 10, 0)]
)
def test_what_is_not_spent_is_left_for_recovery(share, images, spent):
    """In whole steps of 8 images; a recovery with nothing left does nothing."""
    context = _context("dit", images)
    plan, model = _select(context, share=share)
    assert context.trained_images == context._meter.counts["student_forward"] == spent
    before = copy.deepcopy(model.state_dict())
    left = images - spent
    names = tiny.INSTANCES["dit"].module.weights(model)
    losses = loop.train(
        model,
        context.data,
        tiny.settings(ema=0.5),
        images=left,
        seed=0,
        muon_names=names,
        masks=plan.masks,
    )
    assert len(losses) == left // 8
    if not losses:
        tiny.assert_same(model.state_dict(), before)
    for name, mask in plan.masks.items():
        assert not model.get_parameter(name)[~mask].any()


# The progressive ablation.


def test_the_ladder_shares_the_budget_in_whole_steps():
    context = _context("dit")
    stages = SPARSEDM.stages(context, (2, 4), True, 1.0)
    assert [pattern for pattern, _ in stages] == [(31, 32), (15, 16), (7, 8), (3, 4), (2, 4)]
    assert [images for _, images in stages] == [8, 16, 8, 16, 16]
    assert SPARSEDM.stages(context, (2, 4), False, 1.0) == [((2, 4), 64)]
    assert [p for p, _ in SPARSEDM.stages(context, (7, 8), True, 1.0)] == [
        (31, 32),
        (15, 16),
        (7, 8),
    ]


@pytest.mark.parametrize("instance", ["dit", "unet"])
def test_every_rung_holds_where_it_divides_the_inputs(instance):
    """31:32 leaves 8, 16 and 24 inputs as they are: dense at first, later at their last rung."""
    context, names = _context(instance, 40), _fitting(instance)
    seen = _watched(
        context,
        lambda model: {_latent(model, n): (n, int((_at(model, n) != 0).sum())) for n in names},
    )
    plan, _ = _select(context, progressive=True)
    rungs = [(31, 32), (15, 16), (7, 8), (3, 4), (2, 4)]
    assert len(seen) == len(rungs)
    for count, stage in enumerate(seen, 1):
        for weight, (layer, nonzero) in stage.items():
            held = [(n, m) for n, m in rungs[:count] if weight.shape[1] % m == 0]
            n, m = held[-1] if held else (1, 1)
            assert nonzero == weight.numel() * n // m, f"{layer} at rung {count}"
    assert plan.pattern == "2:4" and list(plan.masks) == names


def test_other_patterns_are_a_parameter():
    plan, model = _select(_context("dit", images=8), n=1, m=8)
    assert plan.pattern == "1:8"
    for weight in plan.masks:
        value = model.get_parameter(weight)
        assert int((value != 0).sum()) == value.numel() // 8
