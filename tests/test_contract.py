"""Every method that is discovered, on every family it claims; a new file needs no edit here."""

from collections import Counter

import pytest
import tiny
import torch

from prunebench import methods, models, selection
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.pruning.units import Width
from prunebench.training.budget import BudgetMeter

CASES = [
    (method, name)
    for method, found in tiny.found_methods().items()
    for name in tiny.NAMES
    if not found.families or tiny.INSTANCES[name].family in found.families
]
TRAIN_IMAGES = 64
every_method = pytest.mark.parametrize(("method", "instance"), CASES)


def _sparsity(method: methods.Method) -> float:
    return method.sparsities[0] if method.sparsities else tiny.SPARSITY.get(method.kind, 0.25)


def _context(method: str, instance: str, seed: int = 0, **changes) -> selection.Context:
    found = tiny.found_methods()[method]
    return tiny.context(
        instance,
        sparsity=_sparsity(found),
        seed=seed,
        method=method,
        train_images=TRAIN_IMAGES if found.trains else 0,
        **changes,
    )


def _select(method: str, instance: str, seed: int = 0, **changes) -> tuple[Plan, torch.nn.Module]:
    found = tiny.found_methods()[method]
    context = _context(method, instance, seed, **changes)
    parameters = tiny.smoke().parameters(method)
    return selection.select(context, methods.load(found), found.kind, parameters)


def test_every_family_has_a_tiny_instance():
    missing = set(models.family_names()) - {i.family for i in tiny.INSTANCES.values()}
    assert not missing, f"add a tiny instance of {sorted(missing)} to INSTANCES in tests/tiny.py"


def test_every_method_is_tested_on_some_family():
    assert {method for method, _ in CASES} == set(tiny.found_methods())


def test_every_family_has_what_methods_may_ask_for():
    for name in tiny.NAMES:
        family, model = tiny.INSTANCES[name].module, tiny.dense(name)
        assert family.widths(model) and family.weights(model)
        assert all(family.layers(model, granularity) for granularity in ("block", "branch"))


@every_method
def test_a_method_keeps_its_contract(method, instance, tmp_path, counted, monkeypatch):
    """One run: dense weights untouched, target met, budget metered, saved and loaded to the bit."""
    dense, meter = tiny.dense(instance), BudgetMeter()
    counts = counted(dense)
    _leave_out_tracing(monkeypatch, tiny.INSTANCES[instance].module, counts)
    plan, pruned = _select(method, instance, model=dense, meter=meter)
    for key in ("forward", "backward"):
        assert meter.counts[f"student_{key}"] == counts[key]
    tiny.assert_same(dense.state_dict(), tiny.dense(instance).state_dict())
    assert not pruned.training and not pruned._forward_hooks
    _assert_target(method, instance, plan, pruned)
    found = tiny.found_methods()[method]
    if not found.trains and found.recovery != "required":  # one-shot: what stays is the dense model
        kept = surgery.apply(tiny.dense(instance), plan, tiny.INSTANCES[instance].module)
        tiny.assert_same(pruned.state_dict(), kept.state_dict())
    surgery.save(
        tmp_path, pruned, plan, tiny.INSTANCES[instance].family, tiny.INSTANCES[instance].config
    )
    again, loaded = surgery.load(tmp_path)
    tiny.assert_same(pruned.state_dict(), again.state_dict())
    tiny.assert_same(dict(plan.masks), dict(loaded.masks))
    output = tiny.output(pruned, instance)
    assert torch.equal(output, tiny.output(again, instance)) and output.isfinite().all()


def _leave_out_tracing(monkeypatch, family, counts: Counter) -> None:
    """Finding a UNet's widths traces a forward pass on zeros, which is no pass of the method's."""
    original = family.widths

    def widths(model):
        before = dict(counts)
        units = original(model)
        counts.clear()
        counts.update(before)
        return units

    monkeypatch.setattr(family, "widths", widths)


@pytest.mark.parametrize(("method", "instance"), [c for c in CASES if c[1] in tiny.CORE])
def test_the_same_seed_gives_the_same_plan(method, instance):
    (first, one), (second, two) = (_select(method, instance) for _ in range(2))
    assert first.to_json() == second.to_json()
    tiny.assert_same(dict(first.masks), dict(second.masks))
    tiny.assert_same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("method", ["random_layers", "random_widths", "scratch"])
def test_random_controls_differ_between_seeds(method, core):
    plans = [_select(method, core, seed)[0] for seed in range(4)]
    assert len({str(plan.to_json()) for plan in plans}) > 1


def test_scratch_has_nothing_of_the_dense_model(core):
    plan, pruned = _select("scratch", core)
    kept = surgery.apply(tiny.dense(core), plan, tiny.INSTANCES[core].module)
    for weight in tiny.INSTANCES[core].module.weights(pruned):
        assert not torch.equal(pruned.get_parameter(weight), kept.get_parameter(weight))


def _assert_target(method: str, instance: str, plan: Plan, pruned: torch.nn.Module) -> None:
    """The target within one unit, counted here from the tensors and not from what a plan says."""
    found, whole = tiny.found_methods()[method], tiny.dense(instance)
    before = sum(p.numel() for p in whole.parameters())
    gone = before - sum(p.numel() for p in pruned.parameters())
    masked = sum(int((~mask).sum()) for mask in plan.masks.values())
    family = tiny.INSTANCES[instance].module
    if plan.pattern not in (None, "unstructured"):
        targets.check_n_of_m(plan)
        assert gone == 0
        return
    units = {
        "none": lambda: [0],
        "steps": lambda: [0],
        "weights": lambda: [1],
        "layers": lambda: [layer.parameters for layer in family.layers(whole, "block")],
        "widths": lambda: [_one_round(whole, unit) for unit in family.widths(whole)],
    }
    expected = 0 if found.kind == "steps" else _sparsity(found) * before
    assert abs(gone + masked - expected) <= max(units[found.kind]()) + 1e-6
    if found.kind == "steps":
        assert plan.steps == pytest.approx(1 - _sparsity(found))


def _one_round(model: torch.nn.Module, unit: Width) -> int:
    """Parameters that one channel of every normalisation group takes with it."""
    shapes = [(m, model.get_parameter(m.tensor).shape) for m in unit.members]
    return sum(unit.groups * m.index.shape[1] * s.numel() // s[m.axis] for m, s in shapes)
