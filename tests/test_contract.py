"""Every shipped method, on every family it claims; a new file needs no edit here."""

import re

import pytest
import tiny
import torch

from prunebench import cli, models
from prunebench.pruning import surgery
from prunebench.selection import contract
from prunebench.tracks import methods

SHIPPED = tiny.found_methods()
VARIANTS = {method.name for found in SHIPPED.values() for method in found.variants}
AGAIN = ("dit_sigma", "unet_attention")  # other settings of families: the controls try them


def _networks(method: methods.Method) -> list[str]:
    """One of every family and objective and an SDXL; of a variant, whose code is another's, one."""
    found = [on for on in contract.instances(method) if method.control or on not in AGAIN]
    return found[:1] if method.name in VARIANTS else found


CASES = [(name, on) for name, method in SHIPPED.items() for on in _networks(method)]


def _select(method: str, instance: str, seed: int = 0):
    found = SHIPPED[method]
    return contract.Trial(found, methods.load(found), instance).select(seed=seed)


def test_every_family_has_a_tiny_instance():
    assert {i.family for i in tiny.INSTANCES.values()} == set(models.family_names())


def test_every_method_is_tested_on_some_family():
    assert {method for method, _ in CASES} == set(SHIPPED)


def test_every_family_has_what_methods_may_ask_for():
    for name in tiny.NAMES:
        family, model = tiny.INSTANCES[name].module, tiny.dense(name)
        assert family.widths(model) and family.weights(model)
        assert all(family.layers(model, granularity) for granularity in ("block", "branch"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "instance"), CASES)
def test_a_method_keeps_its_contract(method, instance):
    found = SHIPPED[method]
    findings = contract.examine(found, methods.load(found), [instance])
    assert not [f"{finding.rule}: {finding.problem}" for finding in findings if finding.problem]


@pytest.mark.parametrize("method", ["random_layers", "random_widths", "scratch"])
def test_random_controls_differ_between_seeds(method, core):
    plans = [_select(method, core, seed)[0] for seed in range(4)]
    assert len({str(plan.to_json()) for plan in plans}) > 1


def test_scratch_has_nothing_of_the_dense_model(core):
    plan, pruned = _select("scratch", core)
    kept = surgery.apply(tiny.dense(core), plan, tiny.INSTANCES[core].module)
    for weight in tiny.INSTANCES[core].module.weights(pruned):
        assert not (pruned.get_parameter(weight) == kept.get_parameter(weight)).all()


# Methods with one fault each: the rule that it breaks, and what is said of it.
HEAD = '''"""A faulty method."""

import copy
import random
import sys

import torch

from prunebench.pruning.plan import Plan

'''
RETURNS, KIND, LEAVES, TARGET, FITS, METER, ALONE, SEED, KEEPS, RECOVERS, LOADS = (
    rule.text for rule in contract.RULES
)
LAYERS = 'KIND = "layers"\n\n\ndef select(context):\n'
TRAINS = 'KIND = "layers"\nTRAINS = True\n\n\ndef select(context):\n'
OWN = (
    "    plan, model = context.plan_layers(context.layers()), copy.deepcopy(context.model)\n"
    "    for name in plan.layers:\n        context.family.remove_layer(model, name)\n"
)
FAULTY = {
    "raises": (
        f"{LAYERS}    return context.no_such_thing()\n",
        RETURNS,
        "AttributeError: 'Context' object has no attribute 'no_such_thing'",
    ),
    "exits": (
        f"{LAYERS}    sys.exit(3)\n",
        RETURNS,
        "SystemExit: 3",
    ),
    "calls blocks one by one": (
        f"{LAYERS}    (batch,) = context.draws(8, 8)\n"
        "    context.model.blocks[0](torch.zeros(8, 16, 32), torch.zeros(8, 32))\n"
        "    return context.plan_layers(context.layers())\n",
        RETURNS,
        "a Block of the model was called past the meter: call the model itself",
    ),
    "returns no plan": (
        f"{LAYERS}    return [layer.name for layer in context.layers()][:1]\n",
        RETURNS,
        "select returned list, not a Plan",
    ),
    "is of another kind": (
        'KIND = "widths"\n\n\ndef select(context):\n'
        "    return context.plan_layers(context.layers())\n",
        KIND,
        "the method's KIND is 'widths' but its plan removes layers",
    ),
    "notes what is no number": (
        f"{LAYERS}    return context.plan_layers(context.layers(), score=float('nan'))\n",
        KIND,
        "the plan cannot be stored as JSON",
    ),
    "names units that do not exist": (
        f'{LAYERS}    return Plan(layers=("blocks.77",))\n',
        LEAVES,
        r"the plan names a layer that does not exist: blocks\.77; the model has",
    ),
    "misses its target": (
        f"{LAYERS}    return Plan(layers=tuple(layer.name for layer in context.layers()[:-1]))\n",
        TARGET,
        r"the plan removes 0\.\d+ of the parameters; the target is 0\.25 and one unit is",
    ),
    "trains outside the context": (
        f"{TRAINS}{OWN}    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)\n"
        "    (batch,) = context.draws(8, 8)\n    context.loss(model, batch).backward()\n"
        "    optimizer.step()\n    return plan, model\n",
        FITS,
        "the returned model was trained, but not by context.train: its budget is unknown",
    ),
    "changes the weights it keeps": (
        f"{LAYERS}{OWN}    with torch.no_grad():\n        next(model.parameters()).mul_(1.1)\n"
        "    return plan, model\n",
        FITS,
        "the returned model was trained, but not by context.train",
    ),
    "returns a model that its plan does not leave": (
        f"{LAYERS}    return context.plan_layers(context.layers()), context.model\n",
        FITS,
        "the returned model does not fit its plan: blocks",
    ),
    "spends more than its budget": (
        f"{TRAINS}    context.train(copy.deepcopy(context.model), context.train_images + 8)\n",
        RETURNS,
        "wants to train on 40 more images; 0 of its budget of 32 are spent",
    ),
    "scores outside the meter": (
        f"{LAYERS}    model = copy.deepcopy(context.model)\n"
        "    model._forward_hooks.clear()\n    (batch,) = context.draws(8, 8)\n"
        "    context.predict(model, batch)\n    return context.plan_layers(context.layers())\n",
        METER,
        "8 of 8 images went forward past the meter",
    ),
    "changes the dense model": (
        f"{LAYERS}    with torch.no_grad():\n"
        "        next(context._dense.parameters()).mul_(1.1)\n"
        "    return context.plan_layers(context.layers())\n",
        ALONE,
        "the dense model was changed: work on a copy of context.model",
    ),
    "draws from torch's global generator": (
        f"{LAYERS}    layers = context.layers()\n"
        "    return context.plan_layers(layers, drawn=torch.rand(8).tolist())\n",
        ALONE,
        "it changed torch's global generator of the process",
    ),
    "switches gradients off": (
        f"{LAYERS}    torch.set_grad_enabled(False)\n"
        "    return context.plan_layers(context.layers())\n",
        ALONE,
        "it changed whether gradients are on of the process",
    ),
    "draws from a generator of its own": (
        f"{LAYERS}    noise = random.SystemRandom().random()\n"
        "    return context.plan_layers(context.layers(), noise=noise)\n",
        SEED,
        "draws from a generator that is not context",
    ),
    "keeps state between seeds": (
        'KIND = "layers"\nCALLS = []\n\n\ndef select(context):\n'
        "    CALLS.append(context.seed)\n    layers = context.layers()\n"
        "    shift = len(CALLS) % len(layers)\n"
        "    return context.plan_layers(layers[shift:] + layers[:shift])\n",
        SEED,
        "faulty gave two plans for one seed: it keeps state between calls",
    ),
    "trains without a budget": (
        f"{TRAINS}{OWN}    if context.train_images:\n"
        "        context.train(model, context.train_images)\n        return plan, model\n"
        "    fresh = context.fresh(plan)\n    return plan, fresh\n",
        KEEPS,
        "weights that it did not train are not the dense model's",
    ),
}


@pytest.fixture
def process():
    """What faulty methods leave behind."""
    yield
    torch.set_grad_enabled(True)


def _findings(tmp_path, body: str) -> dict[str, str]:
    file = tmp_path / "faulty.py"
    file.write_text(HEAD + body)
    method = methods.read(file)
    found = contract.examine(method, methods.load(method), ["dit"])
    return {finding.rule: finding.problem for finding in found}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_method_is_told_which_rule_it_breaks_and_how(fault, tmp_path, process):
    body, rule, message = FAULTY[fault]
    problems = _findings(tmp_path, body)
    assert [text for text, problem in problems.items() if problem] == [rule], problems
    assert re.search(message, problems[rule])


def test_check_prints_a_line_per_rule_for_files_anywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_prepare", lambda: None)  # of a process of its own
    good, bad, broken = tmp_path / "good.py", tmp_path / "bad.py", tmp_path / "broken.py"
    good.write_text(
        f'{HEAD}FAMILIES = ("uvit",)\n{LAYERS}    return context.plan_layers(context.layers())\n'
    )
    bad.write_text(f'{HEAD}FAMILIES = ("uvit",)\n{FAULTY["misses its target"][0]}')
    broken.write_text("def select(")
    assert cli.main(["check", str(good)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{good}: 1 tiny networks of uvit"
    assert [line.split(maxsplit=1) for line in lines[2:]] == [
        ["ok", rule.text] for rule in contract.RULES
    ]
    assert cli.main(["check", str(bad), str(broken)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "wrong" in line]
    assert re.match(f"  wrong +{TARGET} on uvit: the plan removes .* one unit is", wrong[0])
    assert "not valid Python" in wrong[1] and len(wrong) == 2
