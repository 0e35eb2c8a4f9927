"""The plan as a value: immutable, plain, and the same after a round trip through JSON."""

import dataclasses
import json

import pytest
import tiny
import torch

from prunebench.pruning.plan import Plan


def test_a_plan_cannot_be_changed():
    kept = {"w": (0, 1)}
    plan = Plan(kept=kept, masks={"m": torch.ones(2, dtype=torch.bool)})
    kept["other"] = (0,)
    assert dict(plan.kept) == {"w": (0, 1)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps = 0.5
    for mapping in (plan.kept, plan.masks, plan.notes):
        with pytest.raises(TypeError):
            mapping["x"] = 1


def test_an_empty_plan_removes_nothing():
    plan = Plan()
    assert (plan.layers, dict(plan.kept), dict(plan.masks)) == ((), {}, {})
    assert (plan.pattern, plan.steps) == (None, 1.0)


@pytest.mark.parametrize("kind", tiny.PLAN_KINDS)
def test_json_round_trip(core, kind):
    plan = dataclasses.replace(tiny.plan(core, kind), notes={"score": 0.1 + 0.2, "list": [1, 2]})
    content = json.loads(json.dumps(plan.to_json()))
    assert "masks" not in content
    again = Plan.from_json(content, plan.masks)
    for name in ("layers", "kept", "pattern", "steps", "notes"):
        assert getattr(again, name) == getattr(plan, name)
    tiny.assert_same(dict(again.masks), dict(plan.masks))
