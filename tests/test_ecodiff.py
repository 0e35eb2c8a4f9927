"""EcoDiff: the authors' numbers of its masks, exact gates, and plans of the published networks."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import init_empty_weights

from prunebench import models
from prunebench.errors import CellError
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection.soft_masks import gated, hard, masked, readers
from prunebench.tracks import methods

FOUND = tiny.found_methods()["ecodiff"]
NAMESPACE = methods.load(FOUND).__globals__
select, hard_concrete, regularised = (
    NAMESPACE[name] for name in ("select", "hard_concrete", "regularised")
)
BLOCKS = ("dit", "uvit", "ldm", "sdxl", "flux")


def _prunable(name: str, model) -> list:
    units = tiny.INSTANCES[name].module.widths(model)
    return [unit for unit in units if NAMESPACE["kind"](unit.name) in ("heads", "neurons")]


# The relaxed mask.


def _drawn(score: float, u: float | None = None, delta: float = 0.5, count: int = 1):
    """Masks of equal scores, at one value of the noise or at `count` even ones."""
    levels = torch.full((1,), u) if u is not None else (torch.arange(count) + 0.5) / count
    scores = torch.full((len(levels),), score, dtype=torch.float64)
    uniform = SimpleNamespace(rand=lambda *_, **__: levels.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NAMESPACE["torch"], "rand", uniform.rand)
        return hard_concrete(scores, None, delta)


@pytest.mark.parametrize(("delta", "bound"), [(0.5, 3.0889), (0.1, 4.3881)])
def test_bounded_noise_leaves_high_scores_whole_and_low_ones_nothing(delta, bound):
    exact = math.log(1 + 1 / delta) + 0.83 * math.log(11)
    assert exact == pytest.approx(bound, abs=5e-5)
    assert (_drawn(exact + 1e-6, delta=delta, count=4001) == 1).all()
    assert (_drawn(-exact - 1e-6, delta=delta, count=4001) == 0).all()
    assert _drawn(exact - 0.01, u=0.0, delta=delta) < 1


@pytest.mark.parametrize(("score", "mask"), [(0.0, 0.5), (1.0, 0.8233), (1.9904, 1.0), (-2.0, 0.0)])
def test_a_mask_at_the_median_of_the_noise(score, mask):
    assert _drawn(score, u=0.5).item() == pytest.approx(mask, abs=5e-5)


@pytest.mark.parametrize(("delta", "whole", "mean"), [(0.5, 0.966, 0.9998), (0.1, 0.780, 0.978)])
def test_most_masks_begin_as_one(delta, whole, mean):
    masks = _drawn(3.0, delta=delta, count=100_000)
    assert (masks == 1).double().mean().item() == pytest.approx(whole, abs=5e-4)
    assert masks.mean().item() == pytest.approx(mean, abs=5e-4)
    assert _drawn(0.0, delta=delta, count=100_000).mean().item() == pytest.approx(0.5, abs=1e-6)


# The regulariser.


def test_the_regularisers_by_hand():
    """Two layers of heads (2 and 4 scores) and one of neurons; a mean of means for each kind."""
    scores = {"a.heads": [1.0, -3.0], "b.heads": [0.0, 0.0, 0.0, 4.0], "a.neurons": [5.0]}
    scores = {name: torch.tensor(values) for name, values in scores.items()}
    assert regularised(scores, "l1", False).item() == pytest.approx((2 + 1) / 2 + 5)
    alone = {"a.neurons": torch.tensor([1.0])}
    assert regularised(alone, "l1", True).item() == pytest.approx(1 / (1 + math.exp(-1.4)))
    # Without bounds on the noise, the share of masks that are not 0 is what it says.
    share = (_drawn(0.3, delta=0.0, count=100_000) > 0).double().mean().item()
    some = {"a.heads": torch.tensor([0.3])}
    assert regularised(some, "l0", False).item() == pytest.approx(share, abs=1e-4)


# Gates.


@pytest.mark.parametrize("name_", BLOCKS)
def test_masks_of_one_are_the_model_itself_and_give_no_gradient(name_):
    """Bit-equal latents, so zero loss, whose gradient is zero too."""
    context = tiny.context(name_)
    context.model.requires_grad_(False)
    units = _prunable(name_, context.model)
    y, seeds = context.asked(2), context.seeds(2)
    with torch.no_grad():
        latents = context.sampler(context.teacher()).latents(y, seeds)
    masks = {unit.name: torch.ones(unit.size, requires_grad=True) for unit in units}
    with gated(context.model, units) as put:
        put(masks)
        drawn = context.sampler().latents(y, seeds)
        assert torch.equal(drawn, latents)
        torch.nn.functional.mse_loss(drawn, latents).backward()
    assert all(mask.grad is not None and not mask.grad.any() for mask in masks.values())
    assert torch.equal(tiny.output(context.model, name_), tiny.output(tiny.dense(name_), name_))


@pytest.mark.parametrize("name_", BLOCKS)
def test_masked_is_pruned(name_):
    """On every kind of block; one width of each kind is emptied."""
    model, family = tiny.dense(name_), tiny.INSTANCES[name_].module
    units, generator = _prunable(name_, model), torch.Generator().manual_seed(3)
    kept = {
        u.name: tuple(
            torch.randperm(u.size, generator=generator)[: u.size // 2].sort().values.tolist()
        )
        for u in units
    }
    for of in ("heads", "neurons"):
        kept[next(name for name in kept if name.endswith(of))] = ()
    plan = Plan(kept=kept)
    masks = hard(plan, {unit.name: torch.ones(unit.size) for unit in units})
    with gated(model, units) as put:
        put(masks)
        expected = tiny.output(model, name_)
    with masked(model, [readers(unit, model) for unit in units], masks):
        assert torch.allclose(tiny.output(model, name_), expected, atol=1e-5)
    before = tiny.output(model, name_)
    sizes = targets.Sizes(model, units)
    gone = sizes.removed({unit.name: unit.size - len(kept[unit.name]) for unit in units})
    pruned = surgery.apply(model, plan, family)
    assert torch.allclose(tiny.output(pruned, name_), expected, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2
    assert sizes.total - parameter_count(pruned) == gone


def test_gates_hold_while_blocks_are_computed_again():
    """With activation checkpointing the gradients of the scores stay what they are."""

    def gradients(checkpointed: bool) -> torch.Tensor:
        context = tiny.context("dit", settings=tiny.settings(activation_checkpointing=checkpointed))
        units, generator = _prunable("dit", context.model), torch.Generator().manual_seed(0)
        lessons = NAMESPACE["taught"](context, 2, 2, "one")
        settings = _settings(epochs=1)
        scores = {u.name: torch.zeros(u.size, requires_grad=True) for u in units}
        with gated(context.model, units) as put:

            def draw():
                put({n: hard_concrete(s, generator, 0.5) for n, s in scores.items()})
                return NAMESPACE["nullcontext"]()

            sampler = context.sampler(around=draw, generators=[generator])
            NAMESPACE["accumulated"](sampler, scores, lessons, settings)
        return torch.cat([score.grad for score in scores.values()])

    assert torch.allclose(gradients(True), gradients(False), rtol=1e-4, atol=1e-9)
    assert gradients(True).abs().max() > 1e-4


def _settings(**changes):
    return NAMESPACE["Settings"](
        **{**NAMESPACE["SDXL"], "beta": 0.0, "regulariser": "l1", "squashed": False, "epochs": 4,
           "accumulate": 4, "redraw": False, **changes}
    )  # fmt: skip


# Selection.


def test_it_finds_what_does_nothing():
    """Neurons whose columns are zero cost nothing to mask; the others resist the regulariser."""
    model = tiny.dense("dit")
    for block in model.blocks:
        block.mlp.fc2.weight.data.mul_(10)
        block.mlp.fc2.weight.data[:, ::2] = 0
    context = tiny.context("dit", model=model, sparsity=0.1)
    few = {"prompts": 4, "epochs": 25, "batch": 4, "beta": 0.01, "neurons_rate": 0.3}
    plan = select(context, **few, heads_rate=0.0)
    idle, busy = 0, 0
    for unit in context.widths():
        if unit.name.endswith("neurons"):
            gone = set(range(unit.size)) - set(plan.kept.get(unit.name, range(unit.size)))
            idle += sum(index % 2 == 0 for index in gone)
            busy += sum(index % 2 == 1 for index in gone)
    assert idle > 2 * busy


@pytest.mark.parametrize("scope", targets.SCOPES)
def test_notes_say_the_share_of_the_masks(scope):
    context = tiny.context("flux", sparsity=0.2)
    units = _prunable("flux", context.model)
    notes = select(context, **FOUND.check, scope=scope).notes
    plan = select(tiny.context("flux", sparsity=0.2), **FOUND.check, scope=scope)
    gone = sum(u.size - len(plan.kept.get(u.name, range(u.size))) for u in units)
    assert notes["mask_fraction"]["all"] == gone / sum(unit.size for unit in units)
    assert notes["summary"] == f"{notes['mask_fraction']['all']:.0%} of the masks"


def test_weights_of_the_samples_are_counted():
    """4 prompts and 1 epoch of 2 steps: the teacher draws once, the student passes twice."""
    context = tiny.context("dit")
    select(context, prompts=4, epochs=3, accumulate=2, batch=2)
    assert context._meter.counts == {
        "teacher_forward": 4 * 2,
        "student_forward": 3 * 4 * 2 * 2,
        "student_backward": 3 * 4 * 2,
    }


def test_updates_take_as_many_conditions_as_asked():
    lessons = [(None, [0] * 2, None)] * 5
    found = list(NAMESPACE["lots"](lessons, _settings(epochs=2, accumulate=4), torch.Generator()))
    assert [len(lot) for lot in found] == [2, 2, 2, 2, 2]
    assert len(list(NAMESPACE["lots"](lessons[:3], _settings(epochs=1), torch.Generator()))) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"regulariser": "l3"}, "regulariser is 'l3'; known: l1, l0"),
        ({"noise": "none"}, "noise is 'none'; known: one, each"),
        ({"scope": "layers"}, "scope is 'layers'; known: global, kinds, local"),
    ],
)
def test_unknown_choices_are_refused(wrong, said):
    with pytest.raises(CellError, match=said):
        select(tiny.context("dit"), **{**FOUND.check, **wrong})


# The published networks, without memory.


def _network(family_name: str, name: str):
    family, entry = models.family(family_name), models.published(family_name)[name]
    with init_empty_weights(include_buffers=False):
        return family, family.build(entry.config)


def _flux_fifth() -> int:
    """What FLUX.1-dev keeps, by hand: 4 of 24 heads and 2,457 of 12,288 neurons go everywhere."""
    width, size = 3072, 128
    double_head = 6 * size * (width + 1) + 2 * size * width  # both streams' q, k, v and outputs
    single_head = 3 * size * (width + 1) + size * width
    neuron = width + 1 + width
    double, single = 4 * double_head + 2 * 2457 * neuron, 4 * single_head + 2457 * neuron
    return 11_901_408_320 - 19 * double - 38 * single


@pytest.mark.parametrize(
    ("family_", "name_", "whole", "left"),
    [
        ("conditional_unet", "sdxl_base", 2_567_463_684, 2_130_533_124),  # the paper's 2.1 B
        ("conditional_unet", "sd21_base", 865_910_724, 816_173_508),
        ("flux", "flux_dev", 11_901_408_320, _flux_fifth()),
    ],
)
def test_a_uniform_fifth_of_the_masks_at_full_size(family_, name_, whole, left):
    """The first four fifths of every attention's heads and feed-forward's neurons stay."""
    family, network = _network(family_, name_)
    units = [u for u in family.widths(network) if NAMESPACE["kind"](u.name) in ("heads", "neurons")]
    assert parameter_count(network) == whole
    kept = {u.name: tuple(range(u.size - u.size // 5)) for u in units}
    pruned = surgery.apply(network, Plan(kept=kept), family, units)
    assert parameter_count(pruned) == left


def test_a_ranked_fifth_of_sdxl():
    """A fifth of the parameters takes more than a fifth of the masks; the notes say how much."""
    family, network = _network("conditional_unet", "sdxl_base")
    units = [u for u in family.widths(network) if NAMESPACE["kind"](u.name) in ("heads", "neurons")]
    generator = torch.Generator().manual_seed(0)
    scores = {u.name: torch.rand(u.size, generator=generator) for u in units}
    plan = targets.plan_ranked(network, units, scores, 0.2, "kinds")
    notes = NAMESPACE["record"](units, plan, [1.0, 2.0])
    assert 0.22 < notes["mask_fraction"]["all"] < 0.26
    pruned = surgery.apply(network, plan, family, units)
    assert parameter_count(pruned) / 2_567_463_684 == pytest.approx(0.8, abs=1e-4)
