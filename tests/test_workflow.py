"""The real workflow on real data: the smoke track, killed, resumed, extended and abused."""

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from project import ROOT, Project

from prunebench import tracks
from prunebench.runtime import gpus

SMOKE = tracks.load(str(ROOT / "config" / "smoke.yaml"))
CELLS = len(SMOKE.cells())
SEEDS = 2
ROWS = CELLS // SEEDS
NEW_ROWS = 6  # of a method: three models, two recoveries

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """The smoke track, killed with SIGKILL in the middle, then given the same command again."""
    project = Project(tmp_path_factory.mktemp("project"))
    command = ("snakemake", "--cores", "2", "--config", "track=smoke")
    process = project.start(*command, stdout=subprocess.DEVNULL)  # nobody reads while it runs
    deadline = time.monotonic() + 600
    while len(project.scores()) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the warm server follows its owner, and takes its jobs with it
    project.before = project.records()
    project.status, project.output = project.snakemake()
    return project


def test_a_killed_run_goes_on_where_it_was(project):
    assert 20 <= len([p for p in project.before if p.name == "score.json"]) < CELLS
    assert project.status == 0, project.output[-3000:]
    assert re.search(rf"smoke: {CELLS} cells, \d+ jobs, about .* core hours", project.output)
    after = project.records()
    assert {file: after[file] for file in project.before} == project.before
    assert len(project.scores()) == CELLS


def test_the_leaderboard_is_complete(project):
    rows = project.rows()
    assert len(rows) == ROWS
    assert {row["model"] for row in rows} == {"dit", "sit", "unet"}
    assert all(float(row["fid_mean"]) > 0 and row["seeds_ok"] == str(SEEDS) for row in rows)
    out = project.folder / "runs/smoke/leaderboard/matched"
    for name in ("leaderboard.md", "leaderboard.tex", "leaderboard.html", "leaderboard.bib"):
        assert (out / name).stat().st_size > 0
    raw = sorted((out / "raw").rglob("*.json"))
    assert len(raw) == CELLS
    provenance = json.loads(raw[0].read_text())["provenance"]
    assert {"commit", "code", "config", "date", "cpu", "packages"} <= set(provenance)


def test_a_second_call_has_nothing_to_do(project):
    before = project.records()
    status, output = project.snakemake()
    assert status == 0
    assert "Nothing to be done" in output
    assert project.records() == before


def test_a_misspelt_key_of_config_is_named(project):
    status, output = project.run("snakemake", "-n", "--config", "trak=smoke")
    assert status != 0
    assert "--config trak=...: unknown key; known: track, rehearsal, keep, disk" in output


def test_snakemake_plans_only_when_something_has_happened(project):
    """Its rate limiter's timers would add a step for every step a second ago."""
    cells = sorted((project.folder / "runs/smoke/unet").glob("*/*/none/seed*/score.json"))[:12]
    for record in cells:
        record.unlink()
    targets = [str(record.relative_to(project.folder)) for record in cells]
    command = ("snakemake", "--verbose", "--cores", "1", *targets, "--config", "track=smoke")
    status, output = project.run(*command)
    assert status == 0, output[-3000:]
    assert 0 < output.count("Ready jobs: ") <= len(cells)


def test_quality_is_identical_when_computed_again(project):
    cell = project.folder / "runs/smoke/sit/random_widths/0.25/finetune-low/seed1"
    before = json.loads((cell / "score.json").read_text())
    for folder in (cell, cell.parents[1] / "selection" / "seed1"):
        shutil.rmtree(folder)
    status, output = project.snakemake()
    assert status == 0, output[-3000:]
    after = json.loads((cell / "score.json").read_text())
    assert after["provenance"]["date"] > before["provenance"]["date"]
    for part in ("quality", "size", "plan"):
        assert after[part] == before[part]


def cell_command(project: Project, stage: str, *more: str, **options) -> tuple[int, str]:
    cell = {
        "track": "smoke",
        "model": "dit",
        "method": "entpruner",
        "sparsity": "0.25",
        "seed": "0",
    }
    arguments = [word for name, value in cell.items() for word in (f"--{name}", value)]
    return project.run("prunebench", stage, *arguments, *more, **options)


def test_sampling_batch_does_not_change_images(project):
    record = project.folder / "runs/smoke/dit/entpruner/0.25/none/seed0/sample.json"
    before = json.loads(record.read_text())["files"]
    status, output = cell_command(project, "sample", "--batch", "7")
    assert status == 0, output
    assert json.loads(record.read_text())["files"] == before


def test_a_corrupt_artefact_is_named(project):
    images = project.folder / "runs/smoke/dit/entpruner/0.25/none/seed0/images.safetensors"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    status, output = cell_command(project, "score")
    images.write_bytes(whole)
    assert status == 2
    assert "entpruner/0.25/none/seed0/images.safetensors is corrupt" in output
    assert "Traceback" not in output


def test_a_full_disk_leaves_no_half_file(project):
    folder = project.folder / "runs/smoke/dit/entpruner/0.25/none/seed0"
    before = {file: file.read_bytes() for file in folder.iterdir()}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    status, output = cell_command(project, "sample", preexec_fn=limit)
    assert status == 2, output
    assert "cannot write" in output
    assert "images.safetensors" in output
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture
def settled(project):
    """Bring up to date what other tests recomputed by hand; remove added methods in any case."""
    status, output = project.snakemake()
    assert status == 0, output[-3000:]
    yield
    for name in ("mine", "broken"):
        (project.folder / "methods" / f"{name}.py").unlink(missing_ok=True)


def documented_method() -> str:
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


def test_adding_and_deleting_a_method_touches_only_its_cells(project, settled):
    before, mine = project.records(), project.folder / "methods" / "mine.py"
    mine.write_text(documented_method())
    status, output = project.snakemake()
    assert status == 0, output[-3000:]
    added = {file for file in project.records() if file not in before}
    assert added
    assert all("/mine/" in str(file) for file in added)
    assert {file: project.records()[file] for file in before} == before
    rows = [row for row in project.rows() if row["method"] == "mine"]
    assert len(rows) == NEW_ROWS
    assert len(project.rows()) == ROWS + NEW_ROWS

    mine.unlink()
    status, output = project.snakemake()
    assert status == 0, output[-3000:]
    assert len(project.rows()) == ROWS
    assert not list(
        (project.folder / "runs/smoke/leaderboard/matched/raw").glob("*/mine/**/*.json")
    )
    assert {file: project.records()[file] for file in before} == before


def test_a_method_that_raises_costs_its_own_cells_only(project, settled):
    before, broken = project.records(), project.folder / "methods" / "broken.py"
    broken.write_text('"""Always fails."""\n\nKIND = "layers"\n\n\n'
                      'def select(context):\n    raise ValueError("no such luck")\n')  # fmt: skip
    status, output = project.snakemake()
    broken.unlink()
    assert status == 0, output[-3000:]
    assert f"{NEW_ROWS * SEEDS} of {CELLS + NEW_ROWS * SEEDS} cells failed" in output
    assert {file: project.records()[file] for file in before} == before
    rows = [row for row in project.rows() if row["method"] == "broken"]
    assert len(rows) == NEW_ROWS
    assert all(row["status"] == "failed" and not row["fid_mean"] for row in rows)
    table = (project.folder / "runs/smoke/leaderboard/matched/leaderboard.md").read_text()
    assert "ValueError: no such luck" in table
    log = project.folder / re.search(r"runs/smoke/logs/dit/broken\S*?\.log", table).group()
    assert "no such luck" in log.read_text()
    status, _ = project.snakemake()
    assert status == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda track: track.update(speed=1), "speed"),
        (lambda track: track["models"]["dit"].update(family="dti"), "unknown family 'dti'"),
        (lambda track: track["methods"].update(exclude=["random_layers"]), "can't be switched off"),
        (lambda track: track.update(sparsities=[1.5]), "sparsities"),
        (lambda track: track["methods"]["parameters"].update(entprune={}), "unknown method"),
        (
            lambda track: track["divisions"]["matched"].update(recoveries=["finetune-huge"]),
            "finetune-huge",
        ),
        pytest.param(
            lambda track: track.update(needs={"default": {"gpu": 1}}),
            "needs.dense.gpu, ",
            marks=pytest.mark.skipif(bool(gpus.devices()), reason="this machine has a GPU"),
        ),
    ],
)
def test_a_bad_track_is_refused_before_anything_runs(project, edit, message):
    content = yaml.safe_load((project.folder / "config" / "smoke.yaml").read_text())
    edit(content)
    (project.folder / "bad.yaml").write_text(yaml.safe_dump(content))
    status, output = project.snakemake(track="bad.yaml")
    assert status != 0
    assert message in output
    assert "Traceback" not in output
    assert not (project.folder / "runs" / "bad").exists()


def test_every_division_and_the_oracle(project):
    """A track of one model and seed: all leaderboards, recipes, recoveries and masks at once.

    It samples in shards, which changes no image of the cells that the smoke track has too.
    """
    content = yaml.safe_load((project.folder / "config" / "smoke.yaml").read_text())
    content |= {"models": {"dit": content["models"]["dit"]}, "seeds": [0]}
    content["methods"]["only"] = ["laptop_diff", "sparsedm", "diff_pruning"]
    content["sampling"]["shards"] = 2
    (project.folder / "config" / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    status, output = project.snakemake("everything", track="small")
    assert status == 0, output[-3000:]
    results = project.folder / "runs/small/leaderboard/matched"
    published = {row["method"]: row for row in project.rows("small", "as_published")}
    assert published["laptop_diff"]["recovered_by"] == "normalised_kd"
    assert float(published["laptop_diff"]["teacher_images_mean"]) > 0
    assert published["diff_pruning"]["share"] == "uniform"
    assert published["sparsedm"]["recovery"] == "recipe-low"
    recovery = [
        row for row in project.rows("small", "recovery") if row["method"] == "random_layers"
    ]
    assert {row["recovery"] for row in recovery} == set(SMOKE.divisions["recovery"].recoveries)
    assert {row["rank"] for row in recovery} == {"1", "2", "3", "4"}
    assert all(row["status"] == "ok" for row in (*published.values(), *recovery))
    layers = [row for row in project.rows("small") if row["method"] == "laptop_diff"]
    assert all(0 <= float(row["oracle_beaten_mean"]) <= 1 for row in layers)
    assert len(list((results / "raw" / "oracle").rglob("*.json"))) == len(SMOKE.oracle())
    assert_same_images(project.folder / "runs/small", project.folder / "runs/smoke", shards=2)
    before = project.records("small")
    status, _ = project.snakemake("everything", track="small")
    assert status == 0 and project.records("small") == before


def assert_same_images(sharded: Path, whole: Path, shards: int) -> None:
    """Every cell that both tracks have was drawn to the same bytes; no shard is left."""
    pairs = [(file, whole / file.relative_to(sharded)) for file in sharded.rglob("sample.json")]
    both = [[json.loads(file.read_text()) for file in pair] for pair in pairs if pair[1].exists()]
    assert len(both) >= 10
    for ours, theirs in both:
        assert (ours["shards"], theirs["shards"]) == (shards, 1)
        assert ours["files"] == theirs["files"]
    left = [path for path in sharded.rglob("shard*of*") if path.suffix != ".log"]
    assert not left


def test_a_syntax_error_in_a_method_names_file_and_line_and_stops_nothing(project):
    file = project.folder / "methods" / "typo.py"
    file.write_text('"""Idea."""\n\nKIND = "layers"\n\n\ndef select(context:\n')
    status, output = project.snakemake()
    file.unlink()
    assert status == 0, output[-3000:]
    assert "methods/typo.py line 6" in output


def test_partial_builds_the_leaderboard_of_what_is_finished(project, settled):
    gone = project.folder / "runs/smoke/dit/entpruner/0.25/none/seed0/score.json"
    gone.unlink()
    status, output = project.snakemake("partial", "--forcerun", "partial")
    assert status == 0, output[-3000:]
    table = (project.folder / "runs/smoke/leaderboard/matched/leaderboard.md").read_text()
    assert f"{CELLS - 1} of {CELLS} cells finished" in table
    status, _ = project.snakemake()
    assert status == 0
    assert gone.exists()


def test_records_of_jobs_whose_end_no_run_has_seen(tmp_path):
    """As jobs on Slurm that outlive a killed controller leave them: Snakemake has no note."""
    project, extractor = Project(tmp_path), Path("runs/smoke/extractor/extractor.json")
    track = tmp_path / "config" / "smoke.yaml"

    def learn_at(rate: str) -> None:
        track.write_text(
            re.sub(r"(epochs.*learning_rate: )[^}]+", rf"\g<1>{rate}", track.read_text())
        )

    def forget() -> None:
        shutil.rmtree(tmp_path / ".snakemake" / "metadata")

    def run(*more: str) -> tuple[int, str, bytes]:
        status, output = project.snakemake(str(extractor), *more)
        return status, output, (tmp_path / extractor).read_bytes()

    made = run()[2]
    forget()
    assert run("runs/smoke/dit/dense/dense.json")[2] == made  # whose start takes note of it
    learn_at("2.0e-2")
    assert run()[2] != made  # so that a change of its settings is seen

    forget()
    learn_at("3.0e-2")
    kept = (tmp_path / extractor).read_bytes()
    status, output, found = run("runs/smoke/sit/dense/dense.json")
    assert status == 1 and found == kept
    assert f"1 records, such as {extractor}, were made with other settings of track smoke" in output
    assert (tmp_path / ".snakemake/prunebench.unseen").read_text() == f"{extractor}\n"
    sit = "runs/smoke/sit/dense/dense.json"
    status, output = project.run("snakemake", "--cores", "2", str(extractor), sit,
                                 "--config", "track=smoke", "keep=yes")  # fmt: skip
    assert status == 0, output[-2000:]
    assert run()[2] == kept
    assert len(list((tmp_path / ".snakemake/metadata").iterdir())) > 1

    forget()
    learn_at("2.0e-2")
    (tmp_path / "runs/smoke/assets.json").unlink()  # one that has gone since is passed over
    status, output, found = run("runs/smoke/dit/magnitude_layers/0.25/selection/seed0/select.json")
    assert status == 1 and found == kept
    assert "1 records, such as runs/smoke/dit/dense/dense.json, were made with other" in output
