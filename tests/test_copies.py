"""Plans that run layers once more: names, counts, order, saving, and what can't be copied."""

import pytest
import tiny
import torch
from accelerate import init_empty_weights

from prunebench import models
from prunebench.errors import CellError
from prunebench.models import repeats
from prunebench.models.units import GRANULARITIES, parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan


def _copyable(name: str, granularity: str = "whole") -> list:
    layers = tiny.INSTANCES[name].module.layers(tiny.dense(name), granularity)
    return [layer for layer in layers if layer.copyable]


def _applied(name: str, **plan) -> torch.nn.Module:
    return surgery.apply(tiny.dense(name), Plan(**plan), tiny.INSTANCES[name].module)


@pytest.mark.parametrize("instance", tiny.SHAPES)
def test_a_copy_adds_its_layers_parameters_and_loads_from_its_plan(instance, tmp_path):
    whole, entry = tiny.dense(instance), tiny.INSTANCES[instance]
    first, last = _copyable(instance)[0], _copyable(instance)[-1]
    plan = Plan(copies=(first.name, last.name, first.name))
    model = surgery.apply(tiny.dense(instance), plan, entry.module)
    added = 2 * first.parameters + last.parameters
    assert parameter_count(model) == parameter_count(whole) + added
    names = set(model.state_dict()) - set(whole.state_dict())
    assert {name.partition(f".{repeats.COPIES}.")[0] for name in names} == {first.name, last.name}
    out = tiny.output(model, instance)
    assert (out - tiny.output(whole, instance)).abs().max() > 1e-4
    surgery.save(tmp_path, model, plan, entry.family, entry.config)
    again, loaded = surgery.load(tmp_path)
    assert loaded.copies == plan.copies and torch.equal(tiny.output(again, instance), out)
    model(*tiny.inputs(instance)).square().mean().backward()
    assert all(model.get_parameter(name).grad is not None for name in names)
    listed = {layer.name: layer for layer in entry.module.layers(model, "whole")}
    assert set(listed) == {u.name for u in entry.module.layers(whole, "whole")}
    assert listed[first.name].parameters == 3 * first.parameters
    entry.module.remove_layer(model, first.name)
    left = parameter_count(whole) - first.parameters + last.parameters
    assert parameter_count(model) == left


def test_a_copy_runs_right_behind_its_block():
    """By an oracle that calls the block twice itself."""
    model = tiny.dense("dit")
    block = model.blocks[1]
    twice = type(block).forward

    class Twice(type(block)):
        def forward(self, x, c):
            return twice(self, twice(self, x, c), c)

    expected = tiny.dense("dit")
    expected.blocks[1].__class__ = Twice
    result = tiny.output(_applied("dit", copies=("blocks.1",)), "dit")
    assert torch.equal(result, tiny.output(expected, "dit"))


@pytest.mark.parametrize("instance", ["flux", "uvit"])
def test_copies_of_silent_blocks_change_nothing(instance):
    """Where a block adds 0, so does its copy: streams come out as they went in, in their places."""
    for layer in _copyable(instance):
        quiet, family = tiny.dense(instance), tiny.INSTANCES[instance].module
        for name, parameter in quiet.get_submodule(layer.name).named_parameters():
            if any(part in name for part in ("norm.linear", "norm1.linear", "norm1_context.linear",
                                             "attn.proj", "mlp.fc2")):  # fmt: skip
                parameter.data.zero_()
        before = tiny.output(quiet, instance)
        model = surgery.apply(quiet, Plan(copies=(layer.name,)), family)
        assert torch.equal(tiny.output(model, instance), before), layer.name


def test_removed_layers_and_shrunk_widths_go_together_with_copies(tmp_path):
    entry, name = tiny.INSTANCES["dit"], "dit"
    plan = Plan(
        layers=("blocks.0", "blocks.1.mlp"),
        copies=("blocks.1", "blocks.2"),
        kept={"blocks.2.mlp.neurons": (0, 5), "blocks.1.attn.heads": ()},
    )
    model = surgery.apply(tiny.dense(name), plan, entry.module)
    assert len(model.blocks[2].copies[0].mlp.fc1.weight) == 2
    assert model.blocks[1].copies[0].mlp is None
    surgery.save(tmp_path, model, plan, entry.family, entry.config)
    again, _ = surgery.load(tmp_path)
    assert torch.equal(tiny.output(again, name), tiny.output(model, name))


def test_names_of_copies_lead_to_their_originals():
    assert repeats.original("blocks.2.copies.1.mlp.fc1.weight") == "blocks.2.mlp.fc1.weight"
    assert repeats.original("blocks.2.copies.1") == "blocks.2"
    assert repeats.original("blocks.2.mlp") == "blocks.2.mlp"


def test_plans_without_copies_load_as_they_were():
    content = Plan(layers=("blocks.0",)).to_json()
    assert content.pop("copies") == []
    assert Plan.from_json(content) == Plan(layers=("blocks.0",))


WRONG = {
    "changes the width": ("unet", Plan(copies=("up_blocks.0.resnets.0",)), "can't run twice"),
    "a branch": ("dit", Plan(copies=("blocks.0.mlp",)), r"'blocks\.0\.mlp', which can't run twice"),
    "removed": ("dit", Plan(layers=("blocks.0",), copies=("blocks.0",)), "all of which it removes"),
    "unknown": ("dit", Plan(copies=("blocks.9",)), "names a layer that does not exist"),
    "masked": (
        "dit",
        Plan(
            copies=("blocks.0",),
            masks={"blocks.0.mlp.fc1.weight": torch.ones(128, 32).bool()},
            pattern="unstructured",
        ),
        "a plan that copies layers can't mask weights",
    ),
    "masks of a removed layer": (
        "dit",
        Plan(
            layers=("blocks.0",),
            masks={"blocks.0.mlp.fc1.weight": torch.ones(128, 32).bool()},
            pattern="unstructured",
        ),
        "which goes with a layer that it removes",
    ),
    "masks of the shape before the cut": (
        "dit",
        Plan(
            kept={"blocks.0.mlp.neurons": (0, 1)},
            masks={"blocks.0.mlp.fc1.weight": torch.ones(128, 32).bool()},
            pattern="unstructured",
        ),
        r"not bool \(2, 32\)",
    ),
    "uniform and layers": (
        "dit",
        Plan(kept={"blocks.0.mlp.neurons": (0,)}, layers=("blocks.1",), pattern="uniform"),
        "removes widths and nothing else",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_plans_that_copy_or_combine_what_cannot_be(case):
    name, plan, message = WRONG[case]
    model = tiny.dense(name)
    with pytest.raises(CellError, match=message):
        surgery.apply(model, plan, tiny.INSTANCES[name].module)
    tiny.assert_same(model.state_dict(), tiny.dense(name).state_dict())


def test_stable_diffusion_has_snapfusions_blocks():
    """arXiv 2306.00980, table 3: 22 ResNet blocks and 16 transformers; sizes by arithmetic."""
    family = models.family("conditional_unet")
    config = models.published("conditional_unet")["sd15"].config
    with init_empty_weights(include_buffers=False):
        model = family.build(config)
    assert parameter_count(model) == 859_520_964
    layers = {layer.name: layer for layer in family.layers(model, "whole")}
    assert sum(".resnets." in name for name in layers) == 22
    assert sum(".attentions." in name for name in layers) == 16 == len(layers) - 22
    sizes = {
        "down_blocks.0.attentions.1": 2_546_240,
        "down_blocks.1.attentions.0": 9_188_480,
        "up_blocks.1.attentions.2": 34_760_960,
        "mid_block.resnets.0": 31_138_560,
        "down_blocks.0.resnets.1": 2_255_040,
    }
    for name, size in sizes.items():
        assert layers[name].parameters == size and layers[name].copyable, name
        before = parameter_count(model)
        family.copy_layer(model, name)
        assert parameter_count(model) == before + size
    changing = [n for n, layer in layers.items() if not layer.copyable]
    assert len(changing) == 14  # two of the way down, and all twelve that take a skip connection
    assert {layer.name for g in GRANULARITIES for layer in family.layers(model, g)} >= set(layers)
