"""Recoveries: what each loss is, what passes through the teacher, and features that compare."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import mse_loss

from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import objective
from prunebench.pruning import surgery
from prunebench.records import sealed
from prunebench.recovery import Sampling, Teaching, entry, recovery, recovery_names
from prunebench.recovery.distillation import captured, predict, surviving
from prunebench.recovery.normalised_kd import relative_error
from prunebench.stages import recover
from prunebench.training import loop
from prunebench.training.budget import KEYS, BudgetMeter

SHIPPED = {
    **{"feature_kd": True, "finetune": False, "normalised_kd": True, "output_kd": True},
    **{"cfg_kd": True, "masked_kd": True, "jacobian_kd": True, "step_kd": True},
    **{"cfg_step_kd": True, "velocity": False},
}
# Their loss is the model's own and what teacher and student differ by.
ADDING = ("cfg_kd", "feature_kd", "jacobian_kd", "normalised_kd", "output_kd")
every_recovery = pytest.mark.parametrize("named", recovery_names())
_plan = functools.cache(tiny.plan)  # a UNet's plan of widths takes a trace
every_plan = pytest.mark.parametrize("kind", ["block", "branch", "widths", "2:4"])


def _teaching(name: str, kind: str = "none", meter: BudgetMeter | None = None) -> Teaching:
    """What the recover stage hands a recovery, for a plan of a kind."""
    teacher, instance = tiny.dense(name), tiny.INSTANCES[name]
    found = recover._teaching(teacher, _plan(name, kind), instance.module, meter or BudgetMeter())
    goal = objective(instance.objective)
    sampler = "euler" if goal.name == "flow" else "ddim"
    options = samplers.checked(sampler, 4, {}, goal.name, goal.train_steps)
    sampling = Sampling(sampler, 4, options)
    return replace(found, conditions=instance.conditions, objective=goal, sampling=sampling)


def _suits(named: str, name: str) -> bool:
    """Whether an instance has what a recovery asks of models; see tracks/phases.py."""
    known, takes = entry(named), tiny.models.takes(*_network(name))
    asks_nothing = takes.no_class or takes.text is not None
    return asks_nothing or not known.guides


def _network(name: str) -> tuple[str, dict]:
    return tiny.INSTANCES[name].family, tiny.INSTANCES[name].config


def _drawn(loss: loop.Loss, batch: loop.Batch) -> loop.Batch:
    return loop._redrawn(batch, loss, torch.Generator().manual_seed(5))


def _student(name: str, kind: str) -> nn.Module:
    return surgery.apply(tiny.dense(name), _plan(name, kind), tiny.INSTANCES[name].module)


def _batch(name: str, count: int = 4) -> loop.Batch:
    generator = torch.Generator().manual_seed(0)
    return tiny.data(name).draw(count, generator, torch.device("cpu"))


def test_the_recoveries_are_the_modules_of_the_package():
    found = {name: recovery(name).TEACHER for name in recovery_names()}
    assert found.items() >= SHIPPED.items()


def test_the_names_of_recoveries_need_no_torch():
    """Tracks name recoveries, and the Snakefile reads tracks every time it is parsed."""
    code = "import sys, prunebench.tracks.benchmark; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The normalised feature loss.


def _features(seed: int) -> torch.Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_the_normalised_loss_is_a_relative_error():
    teacher, student = _features(0), _features(1)
    rows = [
        (t - s).square().sum() / t.square().sum() for t, s in zip(teacher, student, strict=True)
    ]
    assert relative_error(teacher, student).item() == pytest.approx(sum(rows).item() / 5, rel=1e-5)
    assert relative_error(teacher, teacher) == 0
    assert relative_error(teacher, torch.zeros_like(teacher)).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("factor", [-3.0, 1e-3, 1e3])
def test_only_the_plain_loss_depends_on_the_scale_of_features(factor):
    teacher, student = _features(0), _features(1)
    error = relative_error(teacher, student).item()
    assert relative_error(factor * teacher, factor * student).item() == pytest.approx(error)
    plain = mse_loss(factor * teacher, factor * student).item()
    assert plain == pytest.approx(factor**2 * mse_loss(teacher, student).item())


def test_the_normaliser_is_detached_and_never_zero():
    teacher, student = _features(0).requires_grad_(), _features(1).requires_grad_()
    relative_error(teacher, student).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert relative_error(torch.zeros(2, 3), torch.ones(2, 3)).isfinite()


class _Scales(nn.Module):
    """One feature point per scale: the input times the scale times 1 + error."""

    def __init__(self, scales: tuple[float, ...], error: float):
        super().__init__()
        self.points = nn.ModuleList(nn.Conv2d(1, 1, 1, bias=False) for _ in scales)
        for point, scale in zip(self.points, scales, strict=True):
            nn.init.constant_(point.weight, scale * (1 + error))

    def forward(self, x, t, y):
        return x + 0 * sum(point(x) for point in self.points)


def test_the_normalised_sum_gives_every_point_the_same_share():
    """At equal relative errors; in the plain sum the shares are those of the squared norms."""
    scales, batch = (1.0, 10.0, 100.0), _batch("dit")
    teacher, student = _Scales(scales, 0.0).requires_grad_(False), _Scales(scales, 0.1)
    for named, expected in (("normalised_kd", [1, 1, 1]), ("feature_kd", [1, 100, 10_000])):
        without = recovery(named).loss(Teaching(teacher, {}))(student, batch)
        parts = [
            recovery(named).loss(Teaching(teacher, {f"points.{k}": None}))(student, batch) - without
            for k in range(3)
        ]
        shares = (torch.stack(parts) / parts[0]).tolist()
        assert shares == pytest.approx(expected, rel=1e-2), named
        whole = {f"points.{k}": None for k in range(3)}
        total = recovery(named).loss(Teaching(teacher, whole))(student, batch)
        assert total.item() == pytest.approx((sum(parts) + without).item(), rel=1e-5)
    normalised = recovery("normalised_kd").loss(Teaching(teacher, whole))(student, batch)
    plain = recovery("output_kd").loss(Teaching(teacher, whole))(student, batch)
    assert (normalised - plain).item() == pytest.approx(3 * 0.1**2, rel=1e-3)


# What each loss is.


def test_losses_are_sums_with_unit_weights(core):
    teaching, student, batch = _teaching(core, "block"), _student(core, "block"), _batch(core)
    with torch.no_grad():
        with captured(teaching.teacher, teaching.kept) as taught:
            lesson = predict(teaching.teacher, batch)
        with captured(student, teaching.kept) as learnt:
            prediction = predict(student, batch)
        named = ("finetune", "output_kd", "feature_kd", "normalised_kd")
        losses = {n: recovery(n).loss(teaching)(student, batch).item() for n in named}
    task = (prediction - batch.target).square().mean()
    output = task + (prediction - lesson).square().mean()
    features = [(taught[n] - learnt[n]).square().mean() for n in teaching.kept]
    relative = [relative_error(taught[n], learnt[n]) for n in teaching.kept]
    expected = {"finetune": task, "output_kd": output}
    expected |= {"feature_kd": output + sum(features), "normalised_kd": output + sum(relative)}
    assert losses == pytest.approx({name: value.item() for name, value in expected.items()})
    assert len(features) > 1 and min(features) >= 0 and max(features) > 0


@pytest.mark.parametrize("named", ADDING)
def test_a_student_like_its_teacher_has_the_task_loss_and_its_gradient(name, named):
    if not _suits(named, name):
        pytest.skip("it has nothing to ask for")
    teaching = _teaching(name)
    guided = {"p": 1.0} if named == "cfg_kd" else {}
    distilling, gradients = recovery(named).loss(teaching, **guided), []
    batch = _drawn(distilling, _batch(name))
    for loss in (distilling, loop.own_loss):
        student = tiny.dense(name).train()
        value = loss(student, batch)
        value.backward()
        gradients.append({"loss": value, **{n: p.grad for n, p in student.named_parameters()}})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], rtol=1e-4, atol=1e-7)


@every_recovery
@pytest.mark.parametrize(
    ("instance", "kind"),
    [("dit", "block"), ("sit", "branch"), ("unet", "widths"), ("unet", "2:4")],
)
def test_every_recovery_trains_every_kind_of_selection(instance, kind, named):
    """Its loss falls, and what is masked stays so."""
    if not _suits(named, instance) or entry(named).folds:
        pytest.skip("see tests/test_step_distillation.py")
    plan, student = _plan(instance, kind), _student(instance, kind)
    losses = loop.train(
        student,
        tiny.data(instance),
        tiny.settings(learning_rate=5e-3),
        images=8 * 20,
        seed=0,
        muon_names=[],
        masks=plan.masks,
        loss=recovery(named).loss(_teaching(instance, kind)),
    )
    # Nine tenths of masked_kd's are small from the start, and cfg_kd's jumps from batch to batch.
    least = 1.0 if named in ("masked_kd", "cfg_kd") else 0.8
    assert sum(losses[-5:]) < least * sum(losses[:5])
    assert all(not student.get_parameter(n)[~mask].any() for n, mask in plan.masks.items())


# The teacher.


# Student's forwards and backwards, teacher's forwards and gradients by its input.
PASSES = {
    **dict.fromkeys(("finetune", "velocity"), (1, 1, 0, 0)),
    "cfg_kd": (2, 2, 2, 0),
    "jacobian_kd": (1, 2, 1, 1),
    "step_kd": (1, 1, 2, 0),
    "cfg_step_kd": (2, 2, 4, 0),
}


@every_recovery
def test_the_teacher_is_metered_as_such_and_stays_as_it_is(core, named):
    if not _suits(named, core):
        pytest.skip("it has nothing to ask for")
    meter = BudgetMeter()
    teaching = _teaching(core, "block", meter)
    assert not any(parameter.requires_grad for parameter in teaching.teacher.parameters())
    teaching.teacher.requires_grad_(True)  # nor does the loss reach one that is not frozen
    student, batch = meter.watch(_student(core, "block")), _batch(core, 5)
    loss = recovery(named).loss(teaching, **({"p": 1.0} if entry(named).guides else {}))
    loss(student, _drawn(loss, batch)).backward()
    assert tuple(meter.counts[key] // 5 for key in KEYS) == PASSES.get(named, (1, 1, 1, 0))
    assert sum(meter.counts.values()) % 5 == 0
    assert all(parameter.grad is None for parameter in teaching.teacher.parameters())
    tiny.assert_same(teaching.teacher.state_dict(), tiny.dense(core).state_dict())
    modules = [*student.modules(), *teaching.teacher.modules()]
    left = sum(len(module._forward_hooks) for module in modules)
    assert left == 2, "hooks of the meter only: one on the student and one on the teacher"


# Features.


@every_plan
def test_features_have_the_same_shape_in_student_and_teacher(name, kind):
    teaching, student, batch = _teaching(name, kind), _student(name, kind), _batch(name, 2)
    assert len(teaching.kept) > 1
    with torch.no_grad():
        with captured(teaching.teacher, teaching.kept) as taught:
            predict(teaching.teacher, batch)
        with captured(student, teaching.kept) as learnt:
            predict(student, batch)
    for point, kept in teaching.kept.items():
        assert surviving(taught[point], kept).shape == learnt[point].shape, point


def test_hooks_are_gone_even_after_a_failure():
    model = tiny.dense("dit")
    with pytest.raises(RuntimeError), captured(model, ["blocks.0"]):
        raise RuntimeError
    assert not model.blocks[0]._forward_hooks


def test_of_a_tuple_the_first_element_is_the_feature():
    model, batch = tiny.dense("unet"), _batch("unet", 2)
    returned = {}
    handle = model.down_blocks[0].register_forward_hook(lambda *a: returned.update(out=a[2]))
    with captured(model, ["down_blocks.0"]) as features:
        predict(model, batch)
    handle.remove()
    assert isinstance(returned["out"], tuple) and features["down_blocks.0"] is returned["out"][0]


def test_unets_compare_every_down_and_up_block_and_not_the_middle():
    assert list(tiny.INSTANCES["unet"].module.features(tiny.dense("unet"))) == [
        *("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1")
    ]


@pytest.mark.parametrize("instance", ["unet", "unet_attention"])
def test_kept_channels_are_those_whose_weights_stayed(instance):
    """The rows a plan leaves of a feature's parameter, and of the bias beside it, in order."""
    family, plan = tiny.INSTANCES[instance].module, _plan(instance, "widths")
    teacher, student = tiny.dense(instance), _student(instance, "widths")
    kept, shrunk = surgery.kept_rows(teacher, plan, family), 0
    for point, parameter in family.features(teacher).items():
        bias = parameter.removesuffix("weight") + "bias"
        before, after = teacher.get_parameter(bias), student.get_parameter(bias)
        assert torch.equal(surviving(before.unsqueeze(0), kept[point])[0], after), point
        shrunk += len(after) < len(before)
    assert shrunk > 1


def test_plans_without_widths_keep_every_channel(name):
    for kind in ("none", "block", "2:4"):
        assert set(_teaching(name, kind).kept.values()) == {None}


# The stage.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The smoke track's UNet, trained and pruned in width, as the stages leave it."""
    track, runs = tiny.smoke(), tmp_path_factory.mktemp("runs")
    tiny.run("dense", track, runs, model="unet")
    tiny.run("select", track, runs, track.cell("unet", "random_widths", 0.25, "none", 0))
    return runs


@pytest.mark.parametrize(("named", "passes"), [("finetune", 0), ("feature_kd", 64)])
def test_the_recover_stage_runs_a_recovery_on_narrowed_models(trained, named, passes):
    cell = tiny.smoke().cell("unet", "random_widths", 0.25, f"{named}-low", 0)
    record = sealed.read(tiny.run("recover", tiny.smoke(), trained, cell))
    assert record.status == "ok" and record.loss.last > 0
    spent = {key: getattr(record.budget, key) for key in ("student_forward", "teacher_forward")}
    assert spent == {"student_forward": 64, "teacher_forward": passes}
