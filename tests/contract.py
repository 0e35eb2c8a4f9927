"""The contract of a method as one check with words for every way of breaking it.

`check` takes a tiny model through the whole chain: select, recover, save, load, sample. It selects
once more besides, and raises AssertionError, or the CellError that a run would record, when the
method breaks a rule.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from torch import nn

from prunebench import tracks
from prunebench.errors import UserError
from prunebench.models.units import Width
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection import checks as selection
from prunebench.tracks import methods
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

TRAIN_IMAGES = 64
RECOVERY_IMAGES = 160
DRAWN = 4


def sparsity(method: methods.Method) -> float:
    return method.sparsities[0] if method.sparsities else tiny.SPARSITY.get(method.kind, 0.25)


def select(
    method: methods.Method,
    instance: str,
    seed: int = 0,
    train_images: int | None = None,
    function: Callable | None = None,
    **changes,
) -> tuple[Plan, nn.Module]:
    """Run a method with the smoke track's parameters, which are small; None loads its file."""
    if train_images is None:
        train_images = TRAIN_IMAGES if method.trains else 0
    context = tiny.context(
        instance,
        sparsity=sparsity(method),
        seed=seed,
        method=method.name,
        train_images=train_images,
        **changes,
    )
    function = function or methods.load(method)
    return selection.select(context, function, method.kind, _parameters(method))


def _parameters(method: methods.Method) -> dict:
    cell = tracks.Cell("smoke", "dit", method.name, 0.25, "none", 0)
    try:
        return tiny.smoke().parameters(cell)
    except UserError:  # a method of a test, unknown to the track
        return {}


def check(method: methods.Method, instance: str, folder: Path) -> None:
    """Every rule of the contract, on one tiny instance; `folder` takes a saved model."""
    dense, meter, function = tiny.dense(instance), BudgetMeter(), methods.load(method)
    with counting(dense, tiny.INSTANCES[instance].module) as counts:
        plan, pruned = select(method, instance, function=function, model=dense, meter=meter)
    _check_meter(meter, counts)
    tiny.assert_same(dense.state_dict(), tiny.dense(instance).state_dict())
    assert not pruned.training and not pruned._forward_hooks
    _check_target(method, instance, plan, pruned)
    again = [select(method, instance, seed, function=function) for seed in (1, 0)][-1]
    _check_repeated(method, (plan, pruned), again)
    _check_untrained(method, instance, plan, pruned)
    if method.recovery != "never":
        _check_recovery(instance, plan, pruned)
    entry = tiny.INSTANCES[instance]
    surgery.save(folder, pruned, plan, entry.family, entry.config)
    _check_loaded(instance, again[0], pruned, folder)


@contextmanager
def counting(model: nn.Module, family):
    """Count rows through every forward and backward of a class, whichever copy they take."""
    counts, kind, forward, widths = Counter(), type(model), type(model).forward, family.widths

    def counted(self, x, t, y):
        counts["forward"] += len(x)
        return _Spy.apply(forward(self, x, t, y), counts, len(x))

    def untraced(model):
        """Finding widths may trace a forward pass on zeros, which is no pass of the method's."""
        before = dict(counts)
        units = widths(model)
        counts.clear()
        counts.update(before)
        return units

    kind.forward, family.widths = counted, untraced
    try:
        yield counts
    finally:
        kind.forward, family.widths = forward, widths


class _Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, counts, rows):
        ctx.counts, ctx.rows = counts, rows
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.counts["backward"] += ctx.rows
        return grad, None, None


def _check_meter(meter: BudgetMeter, counts: Counter) -> None:
    metered = meter.counts["student_forward"] + meter.counts["teacher_forward"]
    assert metered == counts["forward"], (
        f"{counts['forward'] - metered} of {counts['forward']} images went forward past the meter"
    )
    spent = meter.counts["student_backward"]
    assert spent == counts["backward"], (
        f"{counts['backward'] - spent} of {counts['backward']} images went backward past the meter"
    )


def _check_repeated(method: methods.Method, first: tuple, second: tuple) -> None:
    """What a seed gives does not depend on what ran before it, another seed included."""
    (plan, pruned), (again, model) = first, second
    same = plan.to_json() == again.to_json() and all(
        torch.equal(mask, again.masks[name]) for name, mask in plan.masks.items()
    )
    assert same, (
        f"{method.name} gave two plans for one seed: it keeps state between calls, or draws from "
        "a generator that is not context.generator()"
    )
    tiny.assert_same(pruned.state_dict(), model.state_dict())


def _check_target(method: methods.Method, instance: str, plan: Plan, pruned: nn.Module) -> None:
    """The target within one unit, counted here from the tensors and not from what a plan says."""
    whole, family = tiny.dense(instance), tiny.INSTANCES[instance].module
    before = sum(p.numel() for p in whole.parameters())
    gone = before - sum(p.numel() for p in pruned.parameters())
    masked = sum(int((~mask).sum()) for mask in plan.masks.values())
    if plan.pattern == targets.UNIFORM:
        targets.check_uniform(plan, family.widths(whole), sparsity(method))
        return
    if plan.pattern not in (None, "unstructured"):
        targets.check_n_of_m(plan, {n: whole.get_parameter(n).shape for n in family.weights(whole)})
        assert gone == 0
        return
    units = {
        "none": lambda: [0],
        "steps": lambda: [0],
        "weights": lambda: [1],
        "layers": lambda: [layer.parameters for layer in family.layers(whole, "block")],
        "widths": lambda: [_one_round(whole, unit) for unit in family.widths(whole)],
    }
    expected = 0 if method.kind == "steps" else sparsity(method) * before
    assert abs(gone + masked - expected) <= max(units[method.kind]()) + 1e-6
    if method.kind == "steps":
        assert abs(plan.steps - (1 - sparsity(method))) < 1e-9


def _one_round(model: nn.Module, unit: Width) -> int:
    """Parameters that one channel of every normalisation group takes with it."""
    shapes = [(m, model.get_parameter(m.tensor).shape) for m in unit.members]
    return sum(unit.groups * m.index.shape[1] * s.numel() // s[m.axis] for m, s in shapes)


def _check_untrained(method: methods.Method, instance: str, plan: Plan, pruned: nn.Module) -> None:
    """What a method that does not train leaves is the dense model, to the bit."""
    if method.trains or method.recovery == "required":
        return
    kept = surgery.apply(tiny.dense(instance), plan, tiny.INSTANCES[instance].module)
    tiny.assert_same(pruned.state_dict(), kept.state_dict())


def _check_recovery(instance: str, plan: Plan, pruned: nn.Module) -> None:
    """Recovery lowers the model's own loss."""
    data = tiny.data(instance)
    batch = data.draw(64, torch.Generator().manual_seed(5), torch.device("cpu"))
    with torch.no_grad():
        before = loop.own_loss(pruned, batch).item()
    family = tiny.INSTANCES[instance].module
    loop.train(
        pruned,
        data,
        tiny.settings(),
        images=RECOVERY_IMAGES,
        seed=0,
        muon_names=family.weights(pruned),
        masks=plan.masks,
    )
    with torch.no_grad():
        after = loop.own_loss(pruned, batch).item()
    assert after < before, f"recovery raised the loss from {before:.4f} to {after:.4f}"


def _check_loaded(instance: str, plan: Plan, pruned: nn.Module, folder: Path) -> None:
    """Saved and loaded to the bit, without the method: `plan` as selected, and equal images.

    Args:
        plan: the plan selected again, which nothing after selection has touched.
        pruned: the model that was saved in `folder`.
    """
    again, loaded = surgery.load(folder)
    tiny.assert_same(pruned.state_dict(), again.state_dict())
    assert loaded.to_json() == json.loads(json.dumps(plan.to_json()))
    tiny.assert_same(dict(plan.masks), dict(loaded.masks))
    for name, mask in plan.masks.items():
        assert not again.get_parameter(name)[~mask].any(), f"'{name}' came back where masked"
    assert torch.equal(tiny.output(pruned, instance), tiny.output(again, instance))
    drawn, redrawn = (
        next(tiny.sampler(instance, model, plan.steps).images(0, 0, DRAWN, DRAWN))
        for model in (pruned, again)
    )
    assert len({image.numpy().tobytes() for image in drawn}) == DRAWN
    assert torch.equal(drawn, redrawn)
