"""Sampling in shards: the same file whatever their number, and nothing stale among them."""

import dataclasses
import json
from pathlib import Path

import examples
import pytest
import tiny
import torch
import yaml

from prunebench import errors, models, tracks
from prunebench.cli import main
from prunebench.errors import UserError
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts, schema, sealed
from prunebench.stages import inputs, select, shard, work
from prunebench.stages import sample as stage
from prunebench.stages.sample import IMAGES
from prunebench.stages.work import guarded
from prunebench.tracks import methods

SMOKE = tiny.smoke()
CELL = SMOKE.cell("dit", "dense", 0.0, "none", 3)


def _track(shards: int, **sampling) -> tracks.Track:
    content = tiny.plain(SMOKE)
    content["sampling"] |= {"count": 34, "lanes": 8, "shards": shards, **sampling}
    return tiny.track(SMOKE.name, content, SMOKE.methods)


def _paths(track: tracks.Track, runs: Path) -> tracks.Paths:
    return tracks.Paths(track, CELL, runs)


def _save(runs: Path, change: float = 0.0) -> None:
    """Write the cell's checkpoint, random weights moved by `change`."""
    settings = SMOKE.model("dit")
    model = models.family("dit").build(settings.config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # DiT's own output layer starts at zero
            parameter.normal_(0.0, 0.1, generator=generator).add_(change)
    paths = _paths(_track(1), runs)
    files = surgery.save(Path(paths.checkpoint).parent, model, Plan(), "dit", settings.config)
    examples.write(tiny.job("select", _track(1), runs, CELL), files)


@pytest.fixture
def runs(tmp_path) -> Path:
    _save(tmp_path)
    return tmp_path


def _draw(track: tracks.Track, runs: Path, indices: tuple[int, ...], batch: int = 20) -> None:
    for index in indices:
        tiny.run("shard", track, runs, CELL, shard=index, batch=batch)


def _record(runs: Path) -> schema.Sample | schema.Failed:
    return sealed.read(_paths(_track(1), runs).sample)


def _comparable(record: schema.Sample) -> dict:
    changing = {"wall_s", "provenance", "shards", "checksum", "fingerprint"}
    return record.model_dump(exclude=changing)


def _shard_files(runs: Path) -> set[str]:
    return {file.name for file in runs.rglob("shard*of*")}


def test_any_number_of_shards_gives_the_same_bytes(runs):
    tiny.run("sample", _track(1), runs, CELL)
    whole = _record(runs)
    assert whole.shards == 1 and not _shard_files(runs)
    drawn = artefacts.read_tensors(Path(_paths(_track(1), runs).sample).parent / IMAGES)
    assert drawn["images"].shape == (34, 1, 16, 16)
    assert len({image.numpy().tobytes() for image in drawn["images"]}) == 34
    assert drawn["labels"].tolist() == [i % 10 for i in range(34)]
    for shards, batch in ((2, 20), (3, 7), (5, 1)):  # the last of five has two images
        track = _track(shards)
        _draw(track, runs, tuple(reversed(range(shards))), batch)
        parts = [sealed.read(record) for record, _ in _paths(track, runs).shards]
        tiny.run("sample", track, runs, CELL)
        gathered = _record(runs)
        assert _comparable(gathered) == _comparable(whole)  # the file's sha256 among it
        assert gathered.shards == shards
        assert gathered.wall_s > sum(part.wall_s for part in parts)


def test_a_missing_or_corrupt_shard_is_named_and_redone_alone(runs):
    track = _track(3)
    paths = _paths(track, runs)
    _draw(track, runs, (0, 2))
    with pytest.raises(UserError, match=r"shard1of3\.json does not exist"):
        tiny.run("sample", track, runs, CELL)
    _draw(track, runs, (1,))
    images = Path(paths.shards[2][1])
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard2of3\.safetensors is corrupt"):
        tiny.run("sample", track, runs, CELL)
    assert not Path(paths.sample).exists()
    _draw(track, runs, (2,))
    tiny.run("sample", track, runs, CELL)
    tiny.run("sample", track, runs, CELL)  # as after a kill before the shards were removed
    assert _record(runs).status == "ok"


@pytest.mark.parametrize("change", ["checkpoint", "track", "code"])
def test_a_stale_shard_is_not_gathered(runs, change, monkeypatch):
    track = _track(2)
    _draw(track, runs, (0,))
    if change == "checkpoint":
        _save(runs, change=0.5)
    elif change == "track":
        content = tiny.plain(track)
        content["models"]["dit"]["sampling"]["steps"] += 1
        track = tiny.track(track.name, content, track.methods)
    else:
        for module in ("records.provenance", "stages.sample"):
            monkeypatch.setattr(f"prunebench.{module}.code_hash", lambda _: "other")
    _draw(track, runs, (1,))
    paths = _paths(track, runs)
    with pytest.raises(
        UserError, match=r"shard0of2\.json was drawn from another .* it was removed"
    ):
        tiny.run("sample", track, runs, CELL)
    assert _shard_files(runs) == {"shard0of2.safetensors", *map(_name, paths.shards[1])}
    _draw(track, runs, (0,))
    tiny.run("sample", track, runs, CELL)
    assert _record(runs).status == "ok"


def test_all_stale_shards_go_at_once(runs):
    track = _track(3)
    _draw(track, runs, (0, 1, 2))
    _save(runs, change=0.5)
    with pytest.raises(UserError, match=r"shard0of3\.json, .*shard1of3\.json, .*shard2of3\.json"):
        tiny.run("sample", track, runs, CELL)
    assert not list(runs.rglob("shard*.json"))


def _name(file: str) -> str:
    return Path(file).name


def test_shards_of_another_number_are_left_out_and_removed(runs):
    _draw(_track(3), runs, (0, 1))
    track = _track(2)
    _draw(track, runs, (0, 1))
    tiny.run("sample", track, runs, CELL)
    assert _shard_files(runs) == {_name(f) for files in _paths(track, runs).shards for f in files}
    tiny.run("sample", _track(1), runs, CELL)
    assert not _shard_files(runs)


def test_a_failed_shard_fails_the_cell_with_its_reason(runs):
    _save(runs, change=float("nan"))
    track = _track(2)
    for index in range(2):
        job = tiny.job("shard", track, runs, CELL, shard=index)
        assert not guarded(shard.shard, dataclasses.replace(job, log=f"shard{index}.log"))
    assert not guarded(stage.sample, tiny.job("sample", track, runs, CELL))
    failure = _record(runs).failure
    assert failure.stage == "shard" and failure.log == "shard0.log"
    assert "not finite" in failure.error


@pytest.mark.parametrize(
    ("shards", "arguments", "message"),
    [
        (3, ["--shard", "3"], "--shard 3: track mine draws a cell in 3 shards, counted from 0"),
        (3, ["--shard", "-1"], "--shard -1: "),
        (1, ["--shard", "0"], "--shard 0: track mine draws a cell in one piece"),
        (3, ["--batch", "7"], "--batch: track mine draws a cell in 3 shards"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    tmp_path, monkeypatch, capsys, shards, arguments, message
):
    monkeypatch.chdir(tiny.ROOT)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tiny.plain(_track(shards))))
    cell = ["--model", "dit", "--method", "dense", "--sparsity", "0", "--seed", "3"]
    command = "shard" if "--shard" in arguments else "sample"
    assert main([command, "--track", str(file), *cell, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_draws_one_shard(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunebench.cli._prepare", lambda: None)
    file = tmp_path / "config" / f"{SMOKE.name}.yaml"  # goes before the one that is shipped
    file.parent.mkdir()
    track = _track(3)
    file.write_text(yaml.safe_dump(tiny.plain(track)))
    cell = ["--model", "dit", "--method", "dense", "--sparsity", "0", "--seed", "3"]
    options = ["--track", str(file), "--runs", str(runs), *cell]
    assert main(["shard", *options, "--shard", "1", "--batch", "3"]) == 0
    assert _shard_files(runs) == {"shard1of3.json", "shard1of3.safetensors"}
    assert main(["sample", *options]) == 2  # the others are missing
    _draw(track, runs, (0, 2))
    assert main(["sample", *options]) == 0
    assert _record(runs).shards == 3


def test_drawing_needs_no_data_set(runs, monkeypatch):
    monkeypatch.setattr(inputs.assets, "locate", lambda *_: pytest.fail("looked for a file"))
    tiny.run("sample", _track(1), runs, CELL)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: 9 bytes"), True),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_the_machines_faults_are_not_the_cells(error, fault, tmp_path):
    assert errors.machine_fault(error) == fault

    def stage(job):
        raise error

    job = tiny.job("select", tiny.smoke(), tmp_path, tiny.smoke().cells()[0])
    if fault:
        with pytest.raises(type(error)):
            guarded(stage, job)
    else:
        assert not guarded(stage, job)
    assert job.record.exists() != fault


def test_a_method_that_is_edited_while_it_runs_leaves_no_record(tmp_path):
    """The record would be newer than the edit and taken for the new method's."""
    file = tmp_path / "mine.py"
    file.write_text("KIND = 'layers'")
    with select._unedited(file):
        pass
    with pytest.raises(UserError, match=r"mine\.py was edited while it ran"):  # noqa: SIM117
        with select._unedited(file):
            file.write_text("KIND = 'widths'")
            raise errors.CellError("its failure would be recorded otherwise")


BROKEN = {
    "exits": ("sys.exit(3)", "SystemExit: 3"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "wants_too_much": ("raise MemoryError('9 EiB')", "MemoryError: 9 EiB"),
    "leaves": ("os._exit(0)", "it ended the process with status 0"),
    "crashes": ("faulthandler.disable(); os.abort()", "it was ended by SIGABRT"),
    "is_killed": ("os.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL, twice"),
    "sleeps": ("time.sleep(60)", "it had not ended after 0.05 minutes; needs.select.runtime"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_method_that_does_not_come_back_fails_its_own_cell(kind, tmp_path, monkeypatch):
    action, reason = BROKEN[kind]
    file = tmp_path / f"{kind}.py"
    file.write_text(f'"""A."""\nimport faulthandler, os, signal, sys, time\nKIND = "layers"\n\n\n'
                    f"def select(context):\n    {action}\n")  # fmt: skip
    method = {kind: methods.read(file)}
    track = dataclasses.replace(SMOKE, methods={**SMOKE.methods, **method})
    monkeypatch.setattr(work, "limit_of", lambda _: 0.05 if kind == "sleeps" else 1)
    tiny.run("dense", track, tmp_path, model="dit")
    job = tiny.job("select", track, tmp_path, track.cell("dit", kind, 0.25, "none", 0))
    assert work.contained(select.select, job) == 0
    assert reason in json.loads(job.record.read_text())["failure"]["error"]
