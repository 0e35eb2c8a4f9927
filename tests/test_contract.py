"""Every method that is discovered, on every family it claims; a new file needs no edit here."""

import contract
import pytest
import tiny
import yaml

from prunebench import models
from prunebench.errors import CellError
from prunebench.pruning import surgery
from prunebench.tracks import methods

TEXT_TO_IMAGE = yaml.safe_load((tiny.ROOT / "config" / "text2image.yaml").read_text())
CASES = [
    (method, name)
    for method, found in tiny.found_methods().items()
    for name in tiny.NAMES
    if not found.families or tiny.INSTANCES[name].family in found.families
    # EntPruner ranks within classes, which prompts have none of.
    if name not in tiny.PROMPTED or method not in TEXT_TO_IMAGE["methods"]["exclude"]
]


def _select(method: str, instance: str, seed: int = 0, **changes):
    return contract.select(tiny.found_methods()[method], instance, seed, **changes)


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


@pytest.mark.parametrize(("method", "instance"), CASES)
def test_a_method_keeps_its_contract(method, instance, tmp_path):
    contract.check(tiny.found_methods()[method], instance, tmp_path)


@pytest.mark.parametrize(
    "method",
    [name for name, m in tiny.found_methods().items() if m.trains and m.recovery != "required"],
)
def test_a_method_that_trains_has_a_one_shot_limit(method, core):
    plan, pruned = _select(method, core, train_images=0)
    kept = surgery.apply(tiny.dense(core), plan, tiny.INSTANCES[core].module)
    tiny.assert_same(pruned.state_dict(), kept.state_dict())


@pytest.mark.parametrize("method", ["random_layers", "random_widths", "scratch"])
def test_random_controls_differ_between_seeds(method, core):
    plans = [_select(method, core, seed)[0] for seed in range(4)]
    assert len({str(plan.to_json()) for plan in plans}) > 1


def test_scratch_has_nothing_of_the_dense_model(core):
    plan, pruned = _select("scratch", core)
    kept = surgery.apply(tiny.dense(core), plan, tiny.INSTANCES[core].module)
    for weight in tiny.INSTANCES[core].module.weights(pruned):
        assert not torch_equal(pruned, kept, weight)


def torch_equal(one, other, name: str) -> bool:
    return bool((one.get_parameter(name) == other.get_parameter(name)).all())


# Methods with one fault each, and what the contract says of it.
HEAD = '''"""A faulty method."""

import copy

import torch

from prunebench.pruning.plan import Plan

'''
FAULTY = {
    "misses its target": (
        'KIND = "layers"\n\n\ndef select(context):\n'
        "    return Plan(layers=tuple(layer.name for layer in context.layers()[:-1]))\n",
        CellError,
        r"the plan removes 0\.\d+ of the parameters; the target is 0\.25 and one unit is",
    ),
    "keeps state between seeds": (
        'KIND = "layers"\nCALLS = []\n\n\ndef select(context):\n'
        "    CALLS.append(context.seed)\n    layers = context.layers()\n"
        "    shift = len(CALLS) % len(layers)\n"
        "    return context.plan_layers(layers[shift:] + layers[:shift])\n",
        AssertionError,
        "faulty gave two plans for one seed: it keeps state between calls",
    ),
    "draws from the global generator": (
        'KIND = "layers"\n\n\ndef select(context):\n    layers = context.layers()\n'
        "    return context.plan_layers(layers, drawn=torch.rand(8).tolist())\n",
        AssertionError,
        "faulty gave two plans for one seed: .*a generator that is not context",
    ),
    "scores outside the meter": (
        'KIND = "layers"\n\n\ndef select(context):\n    model = copy.deepcopy(context.model)\n'
        "    model._forward_hooks.clear()\n    (batch,) = context.draws(8, 8)\n"
        "    context.predict(model, batch)\n    return context.plan_layers(context.layers())\n",
        AssertionError,
        "8 of 8 images went forward past the meter",
    ),
    "trains outside the meter": (
        'KIND = "layers"\nTRAINS = True\n\n\ndef select(context):\n'
        "    plan, model = context.plan_layers(context.layers()), copy.deepcopy(context.model)\n"
        "    for name in plan.layers:\n        context.family.remove_layer(model, name)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)\n"
        "    (batch,) = context.draws(8, 8)\n    context.loss(model, batch).backward()\n"
        "    optimizer.step()\n    return plan, model\n",
        CellError,
        "the returned model was trained, but not by context.train: its budget is unknown",
    ),
    "spends more than its budget": (
        'KIND = "layers"\nTRAINS = True\n\n\ndef select(context):\n'
        "    context.train(copy.deepcopy(context.model), context.train_images + 8)\n",
        CellError,
        "wants to train on 72 more images; 0 of its budget of 64 are spent",
    ),
    "names units that do not exist": (
        'KIND = "layers"\n\n\ndef select(context):\n    return Plan(layers=("blocks.77",))\n',
        CellError,
        r"the plan names a layer that does not exist: blocks\.77; the model has",
    ),
    "changes the weights it keeps": (
        'KIND = "layers"\n\n\ndef select(context):\n'
        "    plan, model = context.plan_layers(context.layers()), copy.deepcopy(context.model)\n"
        "    for name in plan.layers:\n        context.family.remove_layer(model, name)\n"
        "    with torch.no_grad():\n        next(model.parameters()).mul_(1.1)\n"
        "    return plan, model\n",
        CellError,
        "the returned model was trained, but not by context.train",
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_method_is_caught_with_the_reason(fault, tmp_path):
    body, error, message = FAULTY[fault]
    file = tmp_path / "faulty.py"
    file.write_text(HEAD + body)
    with pytest.raises(error, match=message):
        contract.check(methods.read(file), "dit", tmp_path / "saved")
