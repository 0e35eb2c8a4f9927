"""Widths that lost all their channels: the module gives its reader's bias."""

import pytest
import tiny
import torch

from prunebench.models.units import parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import Sizes

KINDS = ("heads", "neurons")


def _emptied(name: str, kind: str) -> tuple[Plan, list]:
    units = tiny.INSTANCES[name].module.widths(tiny.dense(name))
    gone = [unit for unit in units if unit.may_be_empty and unit.name.endswith(f".{kind}")]
    return Plan(kept={unit.name: () for unit in gone}), gone


CASES = [(name, kind) for name in tiny.SHAPES for kind in KINDS if _emptied(name, kind)[1]]


def _masked(name: str, units: list) -> torch.nn.Module:
    """The dense network with everything that the readers take from these widths set to 0."""
    model = tiny.dense(name)
    for unit in units:
        for member in unit.members:
            if member.axis == 1:  # a reader's
                columns = member.index.flatten()
                model.get_parameter(member.tensor).data.index_fill_(1, columns, 0)
    return model


def test_every_transformer_can_lose_heads_and_neurons():
    families = {(tiny.INSTANCES[name].family, kind) for name, kind in CASES}
    both = {(family, kind) for family in ("dit", "uvit", "conditional_unet", "flux")
            for kind in KINDS}  # fmt: skip
    assert families == both | {("unet", "heads")}


@pytest.mark.parametrize(("instance", "kind"), CASES)
def test_an_emptied_width_is_a_masked_one(instance, kind, tmp_path):
    plan, gone = _emptied(instance, kind)
    entry, whole = tiny.INSTANCES[instance], tiny.dense(instance)
    expected = tiny.output(_masked(instance, gone), instance)
    assert (expected - tiny.output(whole, instance)).abs().max() > 1e-4
    model = surgery.apply(tiny.dense(instance), plan, entry.module)
    torch.testing.assert_close(tiny.output(model, instance), expected, rtol=1e-5, atol=1e-5)
    lost = Sizes(whole, gone).removed({unit.name: unit.size for unit in gone})
    assert parameter_count(model) == parameter_count(whole) - lost
    left = {unit.name for unit in entry.module.widths(model)}
    assert not left & set(plan.kept)
    assert all(model.get_parameter(name).numel() for name in entry.module.weights(model))
    surgery.save(tmp_path, model, plan, entry.family, entry.config)
    again, loaded = surgery.load(tmp_path)
    assert loaded.to_json() == plan.to_json()
    assert torch.equal(tiny.output(again, instance), tiny.output(model, instance))


@pytest.mark.parametrize(("instance", "kind"), CASES)
def test_an_emptied_network_trains_and_runs_without_memory(instance, kind):
    plan, gone = _emptied(instance, kind)
    model = surgery.apply(tiny.dense(instance), plan, tiny.INSTANCES[instance].module)
    model(*tiny.inputs(instance)).square().mean().backward()
    readers = [m.tensor for u in gone for m in u.members if m.axis == 1]
    named = dict(model.named_parameters())
    biases = [named[n] for n in (r.replace("weight", "bias") for r in readers) if n in named]
    assert sum(float(bias.grad.abs().max()) for bias in biases) > 0
    x, t, y = tiny.inputs(instance)
    y = {n: v.to("meta") for n, v in y.items()} if isinstance(y, dict) else y.to("meta")
    out = model.to("meta")(x.to("meta"), t.to("meta"), y)
    assert out.shape == tiny.output(tiny.dense(instance), instance).shape
