"""Methods whose plans remove several kinds at once: what they say, and the target of every part."""

import pytest
import tiny
import torch

from prunebench.errors import CellError, UserError
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection import checks, contract
from prunebench.tracks import methods

HEAD = '''"""An idea."""

import torch

from prunebench.pruning import targets
from prunebench.pruning.plan import Plan

'''
BODY = "\n\n\ndef select(context):\n"
HALF = "    half = context.plan_layers(context.layers(), sparsity=0.15)\n"
MIXED = {
    "steps": (
        'KIND = ("steps", "layers")\nSTEPS = 0.5',
        "    return context.plan_layers(context.layers()).joined(Plan(steps=0.5))\n",
    ),
    "widths": (
        'KIND = ("layers", "widths")',
        f"{HALF}    small = context.pruned(half)\n"
        "    left = context.sparsity - targets.reached(context.model, small, half)\n"
        "    units = context.family.widths(small)\n"
        "    scores = {u.name: torch.rand(u.size, generator=context.generator()) for u in units}\n"
        "    rest = targets.plan_widths(small, units, scores, left)\n"
        "    return half.joined(rest)\n",
    ),
    "weights": (
        'KIND = ("layers", "weights")',
        f"{HALF}    small, whole = context.pruned(half), context.model\n"
        "    scores = {n: small.get_parameter(n).abs() for n in context.family.weights(small)}\n"
        "    total = sum(p.numel() for p in whole.parameters())\n"
        "    left = context.sparsity * total - sum(u.parameters for u in context.layers()"
        " if u.name in half.layers)\n"
        "    here = sum(p.numel() for p in small.parameters())\n"
        "    return half.joined(targets.plan_weights(small, scores, left / here))\n",
    ),
    "2:4": (
        'KIND = ("layers", "weights")',
        "    plan = context.plan_layers(context.layers())\n    small = context.pruned(plan)\n"
        "    scores = {n: small.get_parameter(n).abs() for n in context.family.weights(small)}\n"
        "    return plan.joined(targets.plan_n_of_m(scores, 2, 4))\n",
    ),
}


def _read(tmp_path, constants: str, body: str) -> methods.Method:
    file = tmp_path / "mixed.py"
    file.write_text(f"{HEAD}{constants}{BODY}{body}")
    return methods.read(file)


@pytest.mark.parametrize("case", MIXED)
def test_parts_together_keep_the_contract(case, tmp_path):
    method = _read(tmp_path, *MIXED[case])
    findings = contract.examine(method, methods.load(method), ["dit"])
    assert not [f"{finding.rule}: {finding.problem}" for finding in findings if finding.problem]


def test_a_kind_is_one_or_several_in_one_order(tmp_path):
    read = _read(tmp_path, 'KIND = ("steps", "layers")\nSTEPS = 0.5', "    return None\n")
    assert (read.kind, read.steps) == ("layers+steps", 0.5)
    assert _read(tmp_path, 'KIND = ("layers",)', "    return None\n").kind == "layers"


WRONG = {
    'KIND = ("layers", "none")': r"KIND is \('layers', 'none'\); known: none, layers",
    'KIND = ("layers", "layers")': "a tuple of different ones of layers, widths",
    "KIND = ()": "what removes nothing is of the kind 'none'",
    "KIND = 3": "KIND must be a literal str or tuple",
    'KIND = ("layers", "steps")': r"kind 'layers\+steps' needs STEPS",
    'KIND = "steps"\nSTEPS = 0.5': "of methods that remove steps and more",
    'KIND = ("layers", "steps")\nSTEPS = 2.0': r"STEPS is 2\.0; it is a number between 0 and 1",
}


@pytest.mark.parametrize("constants", WRONG)
def test_kinds_that_cannot_be(constants, tmp_path):
    with pytest.raises(UserError, match=WRONG[constants]):
        _read(tmp_path, constants, "    return None\n")


def test_several_kinds_may_leave_one_alone_but_nothing_else_goes():
    layers, steps = Plan(layers=("blocks.0",)), Plan(steps=0.5)
    for plan in (layers, steps, layers.joined(steps)):
        checks.check_kind(plan, "layers+steps")
    for plan, kind in ((Plan(), "layers+steps"), (layers.joined(steps), "layers"),
                       (layers, "widths+steps")):  # fmt: skip
        with pytest.raises(CellError, match="its plan removes"):
            checks.check_kind(plan, kind)


def _checked(plan: Plan, sparsity: float, steps: float | None = None) -> None:
    whole, family = tiny.dense("dit"), tiny.INSTANCES["dit"].module
    pruned = surgery.apply(tiny.dense("dit"), plan, family)
    layers = targets.layers_of(whole, family, plan)
    unit = targets.tolerance(whole, layers, family.widths(whole), plan)
    maskable = {n: pruned.get_parameter(n).shape for n in family.weights(pruned)}
    checks.check_target(whole, pruned, plan, sparsity, unit, (), maskable, steps)


def test_every_part_has_a_target_and_a_tolerance():
    whole = tiny.dense("dit")
    block = parameter_count(whole.blocks[0]) / parameter_count(whole)
    one = Plan(layers=("blocks.0",))
    _checked(one.joined(Plan(steps=0.5)), block, 0.5)
    with pytest.raises(CellError, match=r"leaves out 0\.5000 of the .* target is 0\.75"):
        _checked(one.joined(Plan(steps=0.5)), block, 0.25)
    with pytest.raises(CellError, match="the plan removes"):
        _checked(one.joined(Plan(steps=0.5)), block * 2.1, 0.5)
    with pytest.raises(CellError, match="the plan removes"):  # steps do for no parameters
        _checked(Plan(steps=0.5), block, 0.5)
    with pytest.raises(CellError, match=r"leaves out 0\.0000 of the"):  # nor layers for steps
        _checked(one, block, 0.5)
    _checked(Plan(layers=("blocks.0", "blocks.1"), copies=("blocks.2",)), block)
    small = surgery.apply(tiny.dense("dit"), one, tiny.INSTANCES["dit"].module)
    scores = {n: small.get_parameter(n).detach().abs() for n in
              tiny.INSTANCES["dit"].module.weights(small)}  # fmt: skip
    halved = one.joined(targets.plan_n_of_m(scores, 2, 4))
    _checked(halved, block)  # the pattern fixes its own share
    with pytest.raises(CellError, match="the plan removes"):
        _checked(halved, block * 2.1)
    masks = dict(halved.masks)
    del masks["blocks.1.mlp.fc1.weight"]
    with pytest.raises(CellError, match="is not masked"):
        _checked(Plan(layers=("blocks.0",), masks=masks, pattern="2:4"), block)


def test_joined_plans_say_what_they_cannot():
    kept, mask = Plan(kept={"a": (0,)}), {"w": torch.ones(1).bool()}
    for left, right in ((kept, kept), (Plan(steps=0.5), Plan(steps=0.5)),
                        (Plan(masks=mask), Plan(masks=mask))):  # fmt: skip
        with pytest.raises(CellError, match="can't be joined"):
            left.joined(right)
    both = Plan(layers=("b",), notes={"x": 1}).joined(Plan(layers=("a", "b"), notes={"y": 2}))
    assert both.layers == ("a", "b") and both.notes == {"x": 1, "y": 2}
