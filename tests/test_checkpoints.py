"""Trainings that are interrupted end as if they had not been."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from torch import nn

from prunebench.errors import UserError
from prunebench.records import artefacts
from prunebench.records.artefacts import training_folder
from prunebench.selection import checks as selection
from prunebench.tracks import methods
from prunebench.training import loop, parallel
from prunebench.training.budget import BudgetMeter
from prunebench.training.checkpoints import STOPPED, Checkpoints, Part

ROOT = Path(__file__).parents[1]
STEPS = 12
TRAINING = sorted(name for name, method in tiny.found_methods().items() if method.trains)


class Interrupted(BaseException):
    """Like a kill: nothing in between may catch it."""


def interrupt_at(step: int, act=None):
    """A loss that is interrupted when it is asked for the `step`th time (from 0)."""
    calls = iter(range(10**6))

    def loss(model, batch):
        if next(calls) == step:
            act() if act else _raise()
        return loop.own_loss(model, batch)

    return loss


def _raise():
    raise Interrupted


def train(model, checkpoints=None, loss=loop.own_loss, name="dit", meter=None, **settings):
    settings = tiny.settings(**{"ema": 0.9, "muon_learning_rate": 5e-3, **settings})
    return loop.train(
        model,
        tiny.data(name),
        settings,
        images=STEPS * settings.batch,
        seed=3,
        muon_names=tiny.INSTANCES[name].module.weights(model),
        loss=loss,
        meter=meter,
        checkpoints=checkpoints,
    )


@pytest.mark.parametrize("trial", range(5))
def test_an_interrupted_training_ends_with_the_same_weights(core, trial, tmp_path):
    """At random steps, three times in a row, the last time by SIGTERM."""
    draw = random.Random(f"{core}{trial}")
    whole, whole_meter = tiny.dense(core), BudgetMeter()
    losses = train(whole_meter.watch(whole), name=core, meter=whole_meter, class_dropout=0.2)
    stop, taken = lambda: os.kill(os.getpid(), signal.SIGTERM), 0
    for act, error in ((None, Interrupted), (None, Interrupted), (stop, SystemExit)):
        step = draw.randrange(STEPS - 1 - taken)
        model, meter = tiny.dense(core), BudgetMeter()
        checkpoints = Checkpoints(tmp_path / "training", {"a": 1}, 0 if act is None else 1e9)
        with pytest.raises(error):
            loss = interrupt_at(step, act)
            train(meter.watch(model), checkpoints, loss, core, meter, class_dropout=0.2)
        taken += step + (act is not None)
    meter, checkpoints = BudgetMeter(), Checkpoints(tmp_path / "training", {"a": 1}, 1e9)
    model, calls = meter.watch(tiny.dense(core)), []
    counted = lambda m, b: calls.append(1) or loop.own_loss(m, b)  # noqa: E731
    resumed = train(model, checkpoints, counted, core, meter, class_dropout=0.2)
    assert len(calls) == STEPS - taken
    assert resumed == losses and checkpoints.resumed == (taken > 0)
    tiny.assert_same(model.state_dict(), whole.state_dict())
    assert meter.counts == whole_meter.counts


def test_sigterm_saves_and_ends_with_the_shells_status(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "training", None, 1e9)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train(tiny.dense("dit"), checkpoints,
              interrupt_at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))  # fmt: skip
    assert end.value.code == STOPPED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "the same command goes on from here" in caplog.text
    state = Checkpoints(tmp_path / "training").part(None, BudgetMeter())._read()
    assert len(state["run"]["losses"]) == 5


def test_sigterm_while_the_last_step_is_saved_is_not_lost(tmp_path, monkeypatch):
    save = Part.save

    def terminated(self):
        if len(self.run.losses) == STEPS and not self.stopping:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self)

    monkeypatch.setattr(Part, "save", terminated)
    with pytest.raises(SystemExit) as end:
        train(tiny.dense("dit"), Checkpoints(tmp_path, None, 0))
    assert end.value.code == STOPPED
    monkeypatch.undo()
    whole, model, again = tiny.dense("dit"), tiny.dense("dit"), Checkpoints(tmp_path, None, 1e9)
    assert train(model, again) == train(whole) and again.resumed
    tiny.assert_same(model.state_dict(), whole.state_dict())


def test_without_a_folder_sigterm_kills_as_ever():
    handlers = []
    look = lambda: handlers.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    train(tiny.dense("dit"), None, interrupt_at(1, look))
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("trainer", TRAINING)
@pytest.mark.parametrize("trial", range(2))
def test_a_method_that_trains_goes_on_too(trainer, trial, tmp_path, monkeypatch):
    """Killed in any of its trainings, a method chooses, trains and spends the same."""
    method = tiny.found_methods()[trainer]
    sparsity = method.sparsities[0] if method.sparsities else 0.25
    parameters = {**method.check, **tiny.smoke().settings.methods.parameters.get(trainer, {})}

    def run(checkpoints, step=None):
        meter = BudgetMeter()
        context = tiny.context("dit", method=trainer, sparsity=sparsity, meter=meter,
                               settings=tiny.settings(ema=0.9), train_images=STEPS * 8,
                               checkpoints=checkpoints)  # fmt: skip
        taken, real = [], loop._Run.step

        def counted(self):
            if len(taken) == step:
                raise Interrupted
            taken.append(1)
            real(self)

        monkeypatch.setattr(loop._Run, "step", counted)
        try:
            result = selection.select(context, methods.load(method), method.kind, parameters)
        finally:
            monkeypatch.undo()
        return (*result, selection.averaged(context, result[0]), meter.report(), len(taken))

    plan, model, average, spent, steps = run(None)
    if not steps:
        pytest.skip(f"{trainer} leaves its whole budget to the recovery")
    step = random.Random(f"{trainer}{trial}").randrange(steps)
    folder = tmp_path / "training"
    with pytest.raises(Interrupted):
        run(Checkpoints(folder, None, 0), step)
    again = run(Checkpoints(folder, None, 1e9))
    assert again[4] == steps - step
    assert again[0].to_json() == plan.to_json()
    tiny.assert_same(again[0].masks, plan.masks)
    tiny.assert_same(again[1].state_dict(), model.state_dict())
    tiny.assert_same(again[2], average)
    assert {**again[3], "wall_s": 0} == {**spent, "wall_s": 0}


def test_dropout_is_reproduced(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.drop = tiny.dense("dit"), nn.Dropout(0.3)

        def forward(self, x, t, y):
            return self.inner(self.drop(x), t, y)

    def weights(checkpoints=None, loss=loop.own_loss, noise=0):
        model = Dropping()
        torch.manual_seed(noise)  # whatever came before takes no part
        loop.train(model, tiny.data("dit"), tiny.settings(), images=64, seed=1, muon_names=[],
                   loss=loss, checkpoints=checkpoints)  # fmt: skip
        return model.state_dict()

    whole = weights()
    tiny.assert_same(weights(noise=1), whole)
    with pytest.raises(Interrupted):
        weights(Checkpoints(tmp_path / "training", None, 0), interrupt_at(5))
    tiny.assert_same(weights(Checkpoints(tmp_path / "training", None, 0)), whole)


def broken(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [broken, emptied, Path.unlink])
@pytest.mark.parametrize("which", ["*.pt", "*.json"])
def test_a_damaged_checkpoint_is_not_used(damage, which, tmp_path, caplog):
    whole, model = tiny.dense("dit"), tiny.dense("dit")
    losses = train(whole)
    with pytest.raises(Interrupted):
        train(tiny.dense("dit"), Checkpoints(tmp_path, None, 0), interrupt_at(6))
    (file,) = tmp_path.glob(which)
    damage(file)
    checkpoints = Checkpoints(tmp_path, None, 1e9)
    assert train(model, checkpoints) == losses
    assert not checkpoints.resumed
    assert ("done anew" in caplog.text) == (damage is not Path.unlink or which == "*.pt")
    tiny.assert_same(model.state_dict(), whole.state_dict())


def test_a_checkpoint_of_something_else_is_not_used(tmp_path):
    with pytest.raises(Interrupted):
        train(tiny.dense("dit"), Checkpoints(tmp_path, {"code": "old"}, 0), interrupt_at(6))
    checkpoints = Checkpoints(tmp_path, {"code": "new"}, 1e9)
    train(tiny.dense("dit"), checkpoints)
    assert not checkpoints.resumed


def _without_a_block(model: nn.Module) -> None:
    tiny.INSTANCES["dit"].module.remove_layer(model, "blocks.1")


@torch.no_grad()
def _with_other_channels(model: nn.Module) -> None:
    first = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    first.copy_(first.flip(0))


@pytest.mark.parametrize("change", [_without_a_block, _with_other_channels])
def test_a_checkpoint_that_began_with_another_model_is_not_used(change, tmp_path, caplog):
    """Scores on a GPU may differ in the last bits, and with them what was pruned."""
    with pytest.raises(Interrupted):
        train(tiny.dense("dit"), Checkpoints(tmp_path, None, 0), interrupt_at(6))
    whole, model, checkpoints = tiny.dense("dit"), tiny.dense("dit"), Checkpoints(tmp_path)
    change(whole), change(model)
    assert train(model, checkpoints) == train(whole)
    assert not checkpoints.resumed and "began with other weights or masks" in caplog.text
    tiny.assert_same(model.state_dict(), whole.state_dict())


def test_on_a_gpu_the_end_of_every_part_is_saved(tmp_path, monkeypatch):
    """Done again it would differ in its last bits, and the parts after it would not be known."""
    train(tiny.dense("dit"), Checkpoints(tmp_path / "cpu", None, 1e9))
    assert not (tmp_path / "cpu").exists()
    monkeypatch.setattr(parallel, "device", lambda: torch.device("cuda"))
    model = tiny.dense("dit")
    train(model, Checkpoints(tmp_path / "gpu", None, 1e9))
    again, checkpoints = tiny.dense("dit"), Checkpoints(tmp_path / "gpu", None, 1e9)
    train(again, checkpoints)
    assert checkpoints.resumed == 1
    tiny.assert_same(again.state_dict(), model.state_dict())


def test_a_checkpoint_that_goes_while_it_is_written_stops_nothing(tmp_path, monkeypatch, caplog):
    """A late twin of the job has written the record and removes the folder."""
    write = artefacts.write_atomically

    def gone(path, fill):
        write(path, fill)
        Path(path).unlink()

    monkeypatch.setattr(artefacts, "write_atomically", gone)
    assert train(tiny.dense("dit"), Checkpoints(tmp_path, None, 0)) == train(tiny.dense("dit"))
    assert "not saved" in caplog.text


def test_stages_of_one_folder_clean_up_beside_each_other(tmp_path, monkeypatch):
    """As the oracle's masks do, of which any two may end or begin at once."""
    records = [tmp_path / f"mask{i}.json" for i in range(2)]
    for record in records:
        training_folder(record).mkdir(parents=True)
    remove = shutil.rmtree

    def removes_and_begins(folder, **options):
        remove(folder, **options)
        monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))  # seen before the other began

    monkeypatch.setattr(shutil, "rmtree", removes_and_begins)
    artefacts.forget_training(records[0])
    assert training_folder(records[1]).is_dir()


def test_a_checkpoint_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    whole, model = tiny.dense("dit"), tiny.dense("dit")
    assert train(model, Checkpoints(tmp_path / "file" / "training", None, 0)) == train(whole)
    assert "not saved: cannot write" in caplog.text
    tiny.assert_same(model.state_dict(), whole.state_dict())


def test_files_are_few_and_go_with_the_record(tmp_path):
    record = tmp_path / "seed0" / "recover.json"
    checkpoints = Checkpoints(training_folder(record), None, 0)
    for _ in range(2):  # a training in two parts
        train(tiny.dense("dit"), checkpoints)
        assert len(list(training_folder(record).iterdir())) == 2 * checkpoints._parts
    artefacts.forget_training(record)
    assert not list(record.parent.iterdir())
    artefacts.forget_training(record)  # nothing there is no error


class Small(nn.Module):
    """A model on a device with memory for `most` images."""

    def __init__(self, most: int, error: Exception | None = None):
        super().__init__()
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.inner, self.most, self.sizes = tiny.dense("dit"), most, []

    def forward(self, x, t, y):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.inner(x, t, y)


def test_short_memory_halves_the_micro_batch_at_the_same_batch():
    whole, model = tiny.dense("dit"), Small(3)
    meter, progress = BudgetMeter(), loop.Progress(STEPS)
    losses = train(whole)
    settings = tiny.settings(ema=0.9, muon_learning_rate=5e-3)
    names = [f"inner.{name}" for name in tiny.INSTANCES["dit"].module.weights(whole)]
    again = loop.train(meter.watch(model), tiny.data("dit"), settings, images=STEPS * 8, seed=3,
                       muon_names=names, meter=meter, progress=progress)  # fmt: skip
    assert model.sizes == [8, 4] + [2] * 4 * STEPS  # found once, kept
    assert progress.micro_batch == 2
    assert meter.counts["student_forward"] == meter.counts["student_backward"] == STEPS * 8
    assert again == pytest.approx(losses, rel=1e-3)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.inner.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


def test_memory_for_not_even_one_image_is_said():
    with pytest.raises(UserError, match="one image does not fit into memory"):
        loop.train(Small(0), tiny.data("dit"), tiny.settings(), images=8, seed=0, muon_names=[])


SCRIPT = """
import sys
import tiny, torch
from prunebench.training import loop, parallel
from prunebench.training.budget import BudgetMeter
torch.set_num_threads(1)
parallel.start()
model, meter = tiny.dense("dit"), BudgetMeter()
settings = tiny.settings(ema=0.9, muon_learning_rate=5e-3)
losses = loop.train(meter.watch(model), tiny.data("dit"), settings, images=96, seed=3, meter=meter,
                    muon_names=tiny.INSTANCES["dit"].module.weights(model))
out = {"model": model.state_dict(), "losses": losses, "counts": dict(meter.counts)}
torch.save(out, f"{sys.argv[1]}/rank{parallel.rank()}.pt")
"""


def run_twice_over(text: str, folder: Path) -> None:
    """Run a script in two processes under torchrun, with `folder` as its argument."""
    script = folder / "script.py"
    script.write_text(text)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script), str(folder)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=300)


def test_two_processes_train_as_one(tmp_path):
    run_twice_over(SCRIPT, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    tiny.assert_same(ranks[0]["model"], ranks[1]["model"])
    whole, meter = tiny.dense("dit"), BudgetMeter()
    losses = train(meter.watch(whole), meter=meter)
    assert ranks[0]["losses"] == pytest.approx(losses, rel=1e-3)
    assert ranks[0]["counts"] == ranks[1]["counts"] == dict(meter.counts)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(ranks[0]["model"][name], tensor, rtol=1e-2, atol=1e-3)


APART = """
import os, sys
from pathlib import Path
import tiny, torch
from prunebench.errors import UserError
from prunebench.training import loop, parallel
from prunebench.training.checkpoints import Checkpoints
torch.set_num_threads(1)
parallel.start()
folder = Path(sys.argv[1])

def train(loss=loop.own_loss, checkpoints=None):
    model = tiny.dense("dit")
    return loop.train(model, tiny.data("dit"), tiny.settings(), images=96, seed=3, muon_names=[],
                      loss=loss, checkpoints=checkpoints)

checkpoints = Checkpoints(folder / f"rank{parallel.rank()}", None, 1e9)
losses = train(checkpoints=checkpoints)
torch.save([losses, checkpoints.resumed], folder / f"apart{parallel.rank()}.pt")

calls = iter(range(100))
def lose_one(model, batch):
    if next(calls) == 3 and parallel.rank():
        os._exit(0)
    return loop.own_loss(model, batch)

try:
    train(lose_one)
except UserError as error:
    (folder / "lost").write_text(str(error))
"""


def test_processes_that_read_different_files_train_anew_and_a_lost_one_is_no_cells_fault(tmp_path):
    def run(**extra):
        options = {"images": 96, "seed": 3, "muon_names": []}
        return loop.train(tiny.dense("dit"), tiny.data("dit"), tiny.settings(), **options, **extra)

    whole = run()
    with pytest.raises(Interrupted):
        run(loss=interrupt_at(6), checkpoints=Checkpoints(tmp_path / "rank0", None, 0))
    assert list((tmp_path / "rank0").glob("*.pt"))  # which rank 1 does not see
    run_twice_over(APART, tmp_path)
    for rank in range(2):
        losses, resumed = torch.load(tmp_path / f"apart{rank}.pt", weights_only=True)
        assert losses == pytest.approx(whole, rel=1e-3) and resumed == 0
    assert "another process of this training is gone" in (tmp_path / "lost").read_text()


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="a batch of 8 can't be shared by 3 processes"):
        parallel.share(8)


@pytest.mark.slow
def test_a_stage_killed_five_times_writes_the_same_weights(tmp_path):
    """The real command, killed with SIGKILL at random moments of its training."""
    content = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    content |= {"models": {"dit": content["models"]["dit"]}, "checkpoint_seconds": 0}
    content["models"]["dit"]["training"]["images"] = (
        160 * content["models"]["dit"]["training"]["batch"]
    )
    content["methods"]["folders"] = [str(ROOT / "methods")]
    content.pop("oracle")
    (tmp_path / "track.yaml").write_text(yaml.safe_dump(content))

    def start(runs: str) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-m", "prunebench", "dense", "--model", "dit",
                   "--track", "track.yaml", "--runs", runs]  # fmt: skip
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        return process, tmp_path / runs / "track" / "dit" / "dense"

    process, whole = start("whole")
    assert process.wait(120) == 0
    draw = random.Random(0)
    for _ in range(5):
        process, folder = start("killed")
        known = {file.name for file in folder.glob("training/dense/*.pt")}
        deadline = time.monotonic() + 120
        while {f.name for f in folder.glob("training/dense/*.pt")} <= known:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert not (folder / "dense.json").exists()
    process, folder = start("killed")
    _, output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    first = int(re.search(r"train (\d+)/160", output).group(1))
    assert first > 0  # not from the start
    records = [json.loads((place / "dense.json").read_text()) for place in (whole, folder)]
    assert records[0]["files"] == records[1]["files"]
    assert records[0]["loss"] == records[1]["loss"]
    counts = [{**record["budget"], "wall_s": 0} for record in records]
    assert counts[0] == counts[1]
    assert [record["training"]["resumed"] for record in records] == [0, 1]
    assert not (folder / "training").exists()
