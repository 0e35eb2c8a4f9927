"""Recoveries of several phases, with parameters, and what they leave besides weights."""

import copy
import dataclasses

import pytest
import tiny
import torch
from test_checkpoints import Interrupted

from prunebench.errors import UserError
from prunebench.pruning import surgery
from prunebench.records import artefacts, sealed
from prunebench.recovery import step_kd
from prunebench.recovery.guidance import sometimes
from prunebench.stages.inputs import sampler_for, student_of, training_data
from prunebench.tracks import phases
from prunebench.tracks.checks import check
from prunebench.tracks.settings import parse
from prunebench.tracks.settings_benchmark import BenchmarkSettings, Phase
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter
from prunebench.training.checkpoints import Checkpoints

OWN = {
    "quarter": [{"module": "step_kd", "parameters": {"fold": 4}}],
    "twice": [{"module": "step_kd"}, {"module": "step_kd"}],
    "mixed": [
        {"module": "output_kd", "share": 0.25},
        {"module": "velocity", "share": 0.25},
        {"module": "step_kd", "share": 0.5, "parameters": {"gamma": 0.2}},
    ],
}


def _content(model: str = "sit", own=None, recoveries=("step_kd-low",), **sampling) -> dict:
    """The smoke track with one model and a division of recoveries."""
    content = tiny.plain(tiny.smoke())
    content["models"] = {model: content["models"][model]}
    if model == "dit":
        content["models"]["dit"]["sampling"] = {"sampler": "ddim", "steps": 4}
    content["models"][model]["sampling"] |= sampling
    content["recoveries"] = own or {}
    content["divisions"] = {"steps": {"compares": "recoveries", "methods": ["random_layers"],
                                      "recoveries": ["none", *recoveries]}}  # fmt: skip
    del content["oracle"]
    return content


def _track(*given, **more):
    return tiny.track("smoke", _content(*given, **more), tiny.found_methods())


# Planning.


def test_the_dense_model_has_a_row_for_every_recovery_that_leaves_fewer_steps():
    track = _track(own=OWN, recoveries=("finetune-low", "step_kd-low", "twice-low"))
    rows = {(cell.method, cell.recovery) for cell in track.cells("steps")}
    assert {row for row in rows if row[0] == "dense"} == {
        ("dense", "none"), ("dense", "step_kd-low"), ("dense", "twice-low")
    }  # fmt: skip
    assert ("random_layers", "finetune-low") in rows and ("fewer_steps", "step_kd-low") not in rows


def test_only_the_cost_of_fewer_steps_is_measured_anew():
    track = _track(own=OWN, recoveries=("finetune-low", "quarter-low"))
    cell = track.cell("sit", "random_layers", 0.25, "quarter-low", 0)
    plain = dataclasses.replace(cell, recovery="finetune-low")
    ours, theirs = (tiny.tracks.Paths(track, one) for one in (cell, plain))
    assert ours.select == theirs.select and ours.cost != theirs.cost
    assert "/selection-quarter-low/" in ours.cost
    names = {"model": "sit", "method": "random_layers", "sparsity": "0.25", "seed": "0",
             "dense_seed": "", "precision": "", "sampling": "",
             "selection": "selection-quarter-low"}  # fmt: skip
    assert tiny.tracks.Layout(track).names_of(names)["recovery"] == "quarter-low"
    assert track.fold("random_layers", "quarter-low") == 4
    assert track.fold("random_layers", "finetune-low") == track.fold("dense", "none") == 1


def test_shares_are_of_all_steps_and_add_up():
    given = [Phase(module="finetune", share=share) for share in (0.25, 0.25, 0.5)]
    for steps in range(30):
        found = phases.steps_of(tuple(given), steps)
        assert sum(found) == steps and max(abs(found[0] - steps / 4), 0) <= 1
    assert phases.steps_of((Phase(module="finetune", share=1.0),), 7) == [7]


def test_editing_a_recovery_of_the_tracks_own_trains_its_cells_again():
    edited = copy.deepcopy(OWN)
    edited["twice"][0]["parameters"] = {"gamma": 0.1}
    before, after = (_track(own=own, recoveries=("twice-low",)) for own in (OWN, edited))
    slower = _track(own=OWN, recoveries=("twice-low",), steps=8)

    def fingerprint(track, name):
        return track.fingerprint("recover", model="sit", dense_seed=0, method="dense",
                                 recovery=f"{name}-low")  # fmt: skip

    assert fingerprint(before, "twice") != fingerprint(after, "twice")
    assert fingerprint(before, "quarter") == fingerprint(after, "quarter")
    assert fingerprint(before, "twice") != fingerprint(slower, "twice")
    assert fingerprint(before, "finetune") == fingerprint(slower, "finetune")


REFUSED = {
    "cfg_kd": ("cfg_kd-low", {}, "training.class_dropout: it never learns what nothing asked is"),
    "steps": ("quarter-low", {"steps": 6}, "sampling.steps: 6 steps can't be folded 4 at a time"),
    "heun": ("step_kd-low", {"sampler": "heun"}, "the steps of 'heun' can't be folded; use euler"),
    "velocity": ("mixed-low", {}, "objective: it does not predict noise, so that 'velocity'"),
}


@pytest.mark.parametrize(("named", "sampling", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_model_cannot_have_is_refused_by_name(tmp_path, named, sampling, said):
    content = _content(own=OWN, recoveries=(named,), **sampling)
    with pytest.raises(UserError) as error:
        check(tmp_path / "t.yaml", parse(BenchmarkSettings, content, "t"))
    assert "divisions.steps.recoveries" in str(error.value) and said in str(error.value)
    assert "can't recover model 'sit'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "named", "said"),
    [
        ("unet", "cfg_kd", "config: nothing stands for 'no class'"),
        ("dit", "step_kd", "put the phase 'velocity' before it"),
    ],
)
def test_models_that_have_no_classes_or_predict_noise_are_told(tmp_path, model, named, said):
    content = _content(model, recoveries=(f"{named}-low",))
    if model == "unet":
        del content["models"]["unet"]["config"]["classes"]
    with pytest.raises(UserError, match=said):
        check(tmp_path / "t.yaml", parse(BenchmarkSettings, content, "t"))


WRONG = {
    "recoveries.a.0.module: unknown recovery 'step_ks'; did you mean 'step_kd'": [
        {"module": "step_ks"}
    ],
    "recoveries.a.0.parameters.folds: ": [{"module": "step_kd", "parameters": {"folds": 2}}],
    "recoveries.a.0.parameters.fold: take at least 2": [
        {"module": "step_kd", "parameters": {"fold": 1}}
    ],
    "recoveries.a.0.parameters.gamma is 'x'": [{"module": "step_kd", "parameters": {"gamma": "x"}}],
    "recoveries.a.1.module: 'output_kd' would undo 'step_kd'; put it before": [
        {"module": "step_kd"}, {"module": "output_kd"}
    ],
    "recoveries.a: give every phase a 'share', 1 in all": [
        {"module": "finetune", "share": 0.5}, {"module": "output_kd", "share": 0.4}
    ],
}  # fmt: skip


@pytest.mark.parametrize(("said", "own"), WRONG.items())
def test_wrong_phases_are_refused_with_their_key(tmp_path, said, own):
    with pytest.raises(UserError) as error:
        check(tmp_path / "t.yaml", parse(BenchmarkSettings, _content(own={"a": own}), "t.yaml"))
    assert said in str(error.value)


def test_a_name_of_the_tracks_own_is_none_of_a_module(tmp_path):
    content = _content(own={"finetune": [{"module": "output_kd"}]})
    with pytest.raises(UserError, match=r"recoveries\.finetune: the name is taken"):
        check(tmp_path / "t.yaml", parse(BenchmarkSettings, content, "t"))


# Training.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Dense models of the smoke track, and one selection of each."""
    runs = tmp_path_factory.mktemp("runs")
    for model in ("sit", "dit"):
        track = _track(model)
        tiny.run("dense", track, runs, model=model)
        for method, sparsity in (("dense", 0.0), ("random_layers", 0.25)):
            tiny.run("select", track, runs, track.cell(model, method, sparsity, "none", 0))
    return runs


def test_a_student_of_three_phases_is_recorded_sampled_and_timed_as_it_was_taught(trained):
    track = _track("dit", own=OWN, recoveries=("mixed-low",))
    cell = track.cell("dit", "random_layers", 0.25, "mixed-low", 0)
    record = sealed.read(tiny.run("recover", track, trained, cell))
    assert (record.student.steps, record.student.prediction) == (2, "velocity")
    assert [(p.module, p.images) for p in record.phases] == [
        ("output_kd", 16), ("velocity", 16), ("step_kd", 32)
    ]  # fmt: skip
    assert record.phases[2].parameters == {"fold": 2, "gamma": 0.2}
    assert record.trained_images == 64 == record.budget.student_backward
    assert record.budget.teacher_forward == 16 + 2 * 32  # one pass, none, and two
    cost = sealed.read(tiny.run("cost", track, trained, cell))
    assert cost.inputs["recover/model.safetensors"] == record.files["model.safetensors"]
    sample = sealed.read(tiny.run("sample", track, trained, cell))
    assert sample.sampling.steps == 2
    assert _passes(track, cell, trained) == 2


def _passes(track, cell, runs) -> int:
    """Of the network, where the sampler of the recovered model draws."""
    job = tiny.job("sample", track, runs, cell)
    network, plan = surgery.load(job.path("recover").parent)
    sampler = sampler_for(job, network, plan, student=student_of(job))
    meter = BudgetMeter()
    sampler.model = meter.watch(network)
    drawn = torch.cat(list(sampler.images(cell.seed, 0, 20, 20)))
    stored = artefacts.read_tensors(job.path("sample").with_name("images.safetensors"))["images"]
    assert torch.equal(drawn, stored[:20])  # what was saved is loaded as it was
    return meter.counts["student_forward"] // 20


def test_in_a_second_halving_the_student_is_its_own_teacher(trained, monkeypatch):
    track = _track("sit", own=OWN, recoveries=("twice-low",))
    cell = track.cell("sit", "dense", 0.0, "twice-low", 0)
    seen, loss = [], step_kd.loss

    def watched(teaching, **parameters):
        state = {n: v.clone() for n, v in teaching.teacher.state_dict().items()}
        seen.append((teaching.sampling.steps, state))
        return loss(teaching, **parameters)

    monkeypatch.setattr(step_kd, "loss", watched)
    record = sealed.read(tiny.run("recover", track, trained, cell))
    assert record.student.steps == 1 and [steps for steps, _ in seen] == [4, 2]
    dense, _ = surgery.load(tiny.job("dense", track, trained, model="sit").record.parent)
    tiny.assert_same(seen[0][1], dense.state_dict())
    assert any(not torch.equal(value, seen[1][1][name]) for name, value in seen[0][1].items())
    assert record.budget.teacher_forward == 2 * 64 and record.trained_images == 64


def test_the_teaching_of_one_phase_is_that_of_the_stage_before_there_were_any(trained):
    """A plain recovery draws, trains and saves what `loop.train` alone would."""
    track = _track("sit", recoveries=("finetune-low",))
    cell = track.cell("sit", "random_layers", 0.25, "finetune-low", 0)
    tiny.run("recover", track, trained, cell)
    job = tiny.job("recover", track, trained, cell)
    found, _ = surgery.load(job.record.parent)
    model, _ = surgery.load(job.path("select").parent)
    loop.train(model, training_data(job), job.settings.recovery, images=64, seed=0,
               muon_names=job.family.weights(model))  # fmt: skip
    tiny.assert_same(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("step", [0, 3, 7])
def test_what_a_loss_draws_is_drawn_again_where_a_training_goes_on(tmp_path, step):
    """To the bit; else the branches and directions after an interruption would be others."""
    drawn: list = []

    def training(checkpoints=None, until=None):
        calls = iter(range(100))

        def loss(model, batch):
            if next(calls) == until:
                raise Interrupted
            scale = batch.drawn.get("guidance")
            drawn.append(None if scale is None else scale[0].item())
            return loop.own_loss(model, batch) * (1 if scale is None else scale.mean())

        model = tiny.dense("dit")
        redraw = sometimes(0.5, 2.0, 14.0)
        losses = loop.train(model, tiny.data("dit"), tiny.settings(ema=0.9), images=80, seed=3,
                            muon_names=[], loss=loop.Drawing(loss, redraw),
                            checkpoints=checkpoints)  # fmt: skip
        return losses, model

    losses, whole = training()
    expected, drawn[:] = list(drawn), []
    with pytest.raises(Interrupted):
        training(Checkpoints(tmp_path, {}, 0), step)
    again, model = training(Checkpoints(tmp_path, {}, 1e9))
    assert again == losses and drawn == expected
    assert None in expected and len(set(expected)) > 2
    tiny.assert_same(model.state_dict(), whole.state_dict())
