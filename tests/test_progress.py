"""The live view of fabricated runs, of Slurm's words, of real processes, beside the Snakefile."""

import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import examples
import pytest
import tiny
import yaml

from prunebench import cli, progress, tracks
from prunebench.errors import CellError
from prunebench.progress import activity, jobs, view
from prunebench.records import artefacts, parts, sealed
from prunebench.runtime import run as life
from prunebench.stages.job import Job
from prunebench.stages.work import guarded
from prunebench.tracks import Cell, Paths

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """Whatever queue this machine has is not these runs'."""
    monkeypatch.setattr(activity, "QUEUE", ["squeue-of-nowhere"])


@pytest.fixture
def track(tmp_path) -> tracks.Track:
    """Two models, two seeds; dense, its fewer steps, the controls and one method."""
    content = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    content["models"] = {name: content["models"][name] for name in ("dit", "sit")}
    content["methods"] = {"folders": [str(ROOT / "methods")], "only": ["entpruner"]}
    content["oracle"] |= {"masks": 3}
    content["divisions"] = {"matched": content["divisions"]["matched"],
                            "recovery": {"compares": "recoveries", "methods": ["random_layers"],
                                         "recoveries": ["output_kd-low"]}}  # fmt: skip
    content["sampling"]["shards"] = 2
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    return tracks.load(str(tmp_path / "small.yaml"))


def write_stage(record: str, wall_s: float = 3.0, gpu: str | None = None, processes: int = 1,
                inputs: int = 0) -> None:  # fmt: skip
    """A record as a stage writes it; which stage's doesn't matter here.

    Args:
        inputs: how many it names, which make it long.
    """
    training = {**examples.TRAINING.model_dump(), "processes": processes}
    long = {f"input{number}": examples.HASH for number in range(inputs)}
    example = examples.every()["dense"]
    changed = examples.changed(example, wall_s=wall_s, training=training, inputs=long,
                               provenance={"gpu": gpu})  # fmt: skip
    sealed.write(record, changed)


def write_failure(record: str, stage: str, error: str, log: str) -> None:
    failure = parts.Failure(stage=stage, error=error, log=log)
    sealed.write(record, examples.failed(failure=failure))


def write_log(track: tracks.Track, runs: Path, record: str, text: str) -> str:
    """The log of a job, as its rule would name it; returns its path."""
    everything = jobs.plan(track, track.divisions, runs, oracle=True)
    log = Path(everything.jobs[record].log)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)
    return str(log)


def a_cell(track: tracks.Track, method: str, seed: int = 0, recovery: str = "none") -> Cell:
    sparsity = 0.0 if method == "dense" else 0.25
    return track.cell("dit", method, sparsity, recovery, seed)


def finish_cell(track: tracks.Track, cell: Cell, runs: Path, **stage) -> None:
    paths = Paths(track, cell, runs)
    for record in (paths.select, paths.cost, paths.sample, paths.score):
        write_stage(record, **stage)


def table_of(text: str) -> dict[str, dict[str, str]]:
    """The rows of the stages' table by stage."""
    lines = iter(text.splitlines())
    head = next(re.split(r"\s{2,}", line) for line in lines if line.startswith("stage "))
    rows = {}
    for line in lines:
        if not line:
            break
        cells = re.split(r"\s{2,}", line.strip())
        rows[cells[0]] = dict(zip(head[1:], cells[1:], strict=True))
    return rows


# ---- cells and stages


def test_every_state_of_a_cell_and_its_stage(track, tmp_path):
    runs = tmp_path / "runs"
    write_stage(f"{runs}/small/extractor/extractor.json")
    write_stage(f"{runs}/small/dit/dense/dense.json")
    finish_cell(track, a_cell(track, "dense"), runs)
    cell = a_cell(track, "entpruner")
    lost = Paths(track, a_cell(track, "random_layers"), runs)

    def broken(job):
        raise CellError("no such luck")

    for stage in ("select", "cost", "sample", "score"):
        assert not guarded(broken, Job(stage, track, tracks.as_dict(cell), runs, "a.log"))
    write_stage(lost.select)
    log = write_log(track, runs, lost.sample, "07:00:01 40 of 80 images\nMemoryError: 3 GiB\n")

    text = progress.show(track, None, runs)
    cells = len(track.cells())
    # the selection of the failed cell is also that of the one which would be fine-tuned
    assert text.splitlines()[0] == (
        f"small, matched: 1 of {cells} cells done ({1 / cells:.0%}), 1 failed, 1 stopped, "
        f"{cells - 3} waiting"
    )
    rows = table_of(text)
    assert rows["extractor"]["finished"] == "1/1"
    assert rows["dense"]["finished"] == "1/2"
    assert (rows["sample"]["finished"], rows["sample"]["stopped"]) == (f"2/{cells}", "1")
    assert rows["score"] == {"finished": f"2/{cells}", "failed": "1", "running": "-",
                             "queued": "-", "stopped": "-", "mean": "3.0 s",
                             "hours": "0.00"}  # fmt: skip
    assert "1 x sample: MemoryError: 3 GiB" in text
    assert "cells that wait for it: 1; for example dit/random_layers/0.25/none/seed0" in text
    assert f"log: {log}" in text
    assert "1 x select: no such luck" in text
    assert "log: a.log" in text
    assert "\033" not in text


def test_a_failed_selection_fails_its_cells_before_they_are_scored(track, tmp_path):
    runs = tmp_path / "runs"
    record = Paths(track, a_cell(track, "random_layers"), runs).select
    write_failure(record, "select", "no luck", "a.log")
    text = progress.show(track, None, runs)
    assert ", 2 failed" in text.splitlines()[0]  # with and without fine-tuning
    assert "2 x select: no luck" in text


def test_nothing_on_disk_is_everything_waiting_and_no_estimate(track, tmp_path):
    text = progress.show(track, None, tmp_path / "runs")
    assert f"0 of {len(track.cells())} cells done (0%), {len(track.cells())} waiting" in text
    assert "No workflow is running." in text
    assert "no estimate" in text
    assert "Failed" not in text and "Stopped" not in text


def test_a_stopped_dense_model_says_how_many_cells_wait(track, tmp_path):
    record = f"{tmp_path}/runs/small/sit/dense/dense.json"
    write_log(track, tmp_path / "runs", record, "prunebench: cannot write x: No space left\n")
    text = progress.show(track, None, tmp_path / "runs")
    assert "1 x dense: prunebench: cannot write x: No space left" in text
    waiting = sum(cell.model == "sit" for cell in track.cells())
    assert f"cells that wait for it: {waiting}; for example sit" in text


def test_all_divisions_share_cells_and_bring_the_oracle(track, tmp_path):
    runs = tmp_path / "runs"
    write_stage(tracks.Layout(track, runs).record("oracle", **track.oracle()[0]), 7200.0)
    text = progress.show(track, "all", runs)
    union = {cell for division in track.divisions for cell in track.cells(division)}
    assert len(union) < sum(len(track.cells(division)) for division in track.divisions)
    assert f"0 of {len(union)} cells done" in text
    masks = table_of(text)["oracle"]
    assert (masks["finished"], masks["hours"]) == (f"1/{len(track.oracle())}", "2.00")


def test_hours_on_gpus_count_every_process(track, tmp_path):
    runs, paths = tmp_path / "runs", Paths(track, a_cell(track, "entpruner"), tmp_path / "runs")
    gpu = {"gpu": "NVIDIA H200"}
    write_stage(paths.dense, 3600.0, **gpu, processes=4)
    write_stage(paths.select, 1800.0, **gpu)
    write_stage(paths.cost, 900.0)
    text = progress.show(track, None, runs)
    assert "Spent in finished jobs: 4.50 GPU hours, 0.25 hours on CPUs." in text


def test_the_estimate_uses_the_means_of_the_same_model(track, tmp_path, monkeypatch):
    """Left of the scores: dit's at dit's mean, sit's at the mean over models; 4 cores."""
    runs, cells = tmp_path / "runs", track.cells()
    planned = jobs.plan(track, ["matched"], runs)
    (tmp_path / ".snakemake").mkdir()
    mark_other(tmp_path, track.name, local=True, host=socket.gethostname(), cores=4)
    for record, job in planned.jobs.items():
        if job.stage != "score":
            write_stage(record, 1000.0)
    for seed, wall in ((0, 100.0), (1, 300.0)):
        write_stage(Paths(track, a_cell(track, "dense", seed), runs).score, wall)
    left = len(cells) - 2
    text = progress.show(track, None, runs)
    work = 200.0 * left  # no score of sit: the mean over all models, which is dit's
    hours = f"{work / 3600:.1f} h"
    minutes = f"{work / 4 / 60:.1f} min"
    assert f"{left} jobs are left, by estimate {hours} of work; 4 at a time, which" in text
    assert minutes in text
    monkeypatch.setattr(activity, "in_processes", lambda track, runs: {
        Paths(track, a_cell(track, "entpruner", seed), runs).score:
        [activity.Work("process 1", 50.0)] for seed in (0, 1)})  # fmt: skip
    text = progress.show(track, None, runs)
    assert f"2 at a time, as now: {(work - 100) / 2 / 3600:.1f} h" in text
    assert table_of(text)["score"]["running"] == "2"


def test_stages_of_which_none_has_finished_are_left_out_of_the_estimate(track, tmp_path):
    write_stage(f"{tmp_path}/runs/small/extractor/extractor.json", 10.0)
    write_stage(f"{tmp_path}/runs/small/dit/dense/dense.json", 90.0)
    text = progress.show(track, None, tmp_path / "runs")
    assert "by estimate 1.5 min of work" in text  # the other dense model
    assert re.search(r"Not in the estimate, because none has finished: \d+ select, \d+ cost", text)


def test_equal_failures_are_one_line(track, tmp_path):
    """Equal but for numbers; 500 more cells of them, and one of another kind."""
    content = {**tiny.plain(track), "seeds": list(range(250))}
    many = tiny.track(track.name, content, track.methods)
    runs = tmp_path / "runs"
    for seed in range(250):
        for model in ("dit", "sit"):
            cell = track.cell(model, "entpruner", 0.25, "none", seed)
            other = seed == 7 and model == "sit"
            error = "ValueError: other" if other else f"the training loss is nan at step {seed}"
            record = Paths(many, cell, runs).score
            write_failure(record, "recover", error, f"logs/{seed}.log")
    lines = progress.show(many, None, runs).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("Failed cells"))
    assert lines[start + 1 :] == [
        "  499 x recover: the training loss is nan at step 0",
        "      for example dit/entpruner/0.25/none/seed0",
        "      log: logs/0.log",
        "  1 x recover: ValueError: other",
        "      for example sit/entpruner/0.25/none/seed7",
        "      log: logs/7.log",
    ]


# ---- files that are being written


def test_records_are_read_again_when_they_change(tmp_path):
    record, records = str(tmp_path / "metrics.json"), jobs.Records()
    assert records.read([record]) == {}
    write_stage(record, 1.0)
    assert records.read([record])[record]["wall_s"] == 1.0
    write_stage(record, 2.0)
    assert records.read([record])[record]["wall_s"] == 2.0
    Path(record).unlink()
    assert records.read([record]) == {}


def test_a_corrupt_record_is_named_and_the_rest_goes_on(track, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # long reasons are cut
    runs = Path("runs")
    finish_cell(track, a_cell(track, "dense"), runs)
    record = Path(Paths(track, a_cell(track, "entpruner"), runs).select)
    record.parent.mkdir(parents=True)
    record.write_text('{"status": "ok", "wa')
    text = progress.show(track, None, runs)
    assert "1 of " in text.splitlines()[0]
    assert f"1 x select: its record {record} can't be read" in text


def test_a_job_that_ends_while_we_look_is_not_lost(track, tmp_path, monkeypatch):
    """Its record was not there before the processes were listed, and it was not among them."""
    runs = tmp_path / "runs"
    record = Paths(track, a_cell(track, "dense"), runs).select
    write_log(track, runs, record, "07:00:00 train 0/4\n")

    def ends_now(track, runs):
        write_stage(record)
        return {}

    monkeypatch.setattr(activity, "in_processes", ends_now)
    row = table_of(progress.show(track, None, runs))["select"]
    assert (row["finished"].split("/")[0], row["stopped"]) == ("1", "-")


# ---- why a job stopped


@pytest.mark.parametrize(
    "own, slurm, reason",
    [
        ("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of "
         "memory\n", "", "torch.OutOfMemoryError: CUDA out of memory"),
        ("prunebench: cannot write a.json: No space left on device\n", "",
         "prunebench: cannot write a.json: No space left on device"),
        ("prunebench: no warm server at /tmp/x (gone); importing everything here\n"
         "07:35:11 train 0/4\n07:35:12 train 1/4\n", "",
         "killed, or its machine lost: the log ends without an error, after “train 1/4”"),
        ("", "", "killed, or its machine lost: the log ends without an error"),
        ("07:35:12 train 1/4\n",
         "slurmstepd-cpu1: error: *** JOB 12 ON cpu1 CANCELLED AT 2026-11-21T13:00:00 DUE TO TIME "
         "LIMIT ***\n",
         "JOB 12 ON cpu1 CANCELLED AT 2026-11-21T13:00:00 DUE TO TIME LIMIT"),
        ("07:35:12 train 1/4\n",
         "rule recover:\nslurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the "
         "step tasks have been OOM Killed.\nsrun: error: cpu1: task 0: Out Of Memory\n",
         "srun: error: cpu1: task 0: Out Of Memory"),
        ("UserWarning: careful\n  warn()\n", "/bin/bash: line 1: 77 Killed   prunebench sample\n",
         "/bin/bash: line 1: 77 Killed   prunebench sample"),
    ],
)  # fmt: skip
def test_the_line_that_says_why(own, slurm, reason):
    assert jobs.why_stopped(own, slurm) == reason


def test_slurms_log_is_read_if_it_is_of_the_same_track(track, tmp_path):
    runs = tmp_path / "runs"
    record = "runs/small/dit/random_layers/0.25/selection/seed0/select.json"
    folder = tmp_path / ".snakemake/slurm_logs/rule_select/dit__random_layers_0.25_selection_0"
    folder.mkdir(parents=True)
    killed = "slurmstepd: error: *** JOB {} ON cpu1 CANCELLED DUE TO NODE FAILURE ***\n"
    (folder / "7.log").write_text("output: runs/another/select.json\n" + killed.format(7))
    assert table_of(progress.show(track, None, runs))["select"]["stopped"] == "-"
    (folder / "6.log").write_text(f"output: {record}\n" + killed.format(6))
    text = progress.show(track, None, runs)
    assert "1 x select: JOB 6 ON cpu1 CANCELLED DUE TO NODE FAILURE" in text
    assert f"log: {folder}/6.log" in text
    (folder / "8.log").write_text(killed.format(8))  # before Snakemake could say what it runs
    assert "1 x select: JOB 8 ON cpu1" in progress.show(track, None, runs)


# ---- who is at work


QUEUE = """\
101|RUNNING|1:02|cpu1|rule_dense_wildcards_dit_|{home}
102|RUNNING|1-02:03:04|gpu[1-2]|rule_recover_wildcards_dit__entpruner_0.25_finetune-low_0|{home}
103|PENDING|0:00||rule_select_wildcards_sit__random_layers_0.25_selection_1|{home}
104|RUNNING|0:10|cpu2|rule_extractor|/somebody/elses
105|RUNNING|INVALID|cpu2|(null)|/odd|folder
short line
"""


def test_squeues_lines():
    entries = activity.parse_queue(QUEUE.format(home="/home/me/bench"))
    assert [(e.number, e.state, e.seconds, e.nodes) for e in entries] == [
        ("101", "RUNNING", 62, "cpu1"),
        ("102", "RUNNING", 86400 + 2 * 3600 + 3 * 60 + 4, "gpu[1-2]"),
        ("103", "PENDING", 0, ""),
        ("104", "RUNNING", 10, "cpu2"),
        ("105", "RUNNING", 0, "cpu2"),
    ]
    assert entries[4].folder == "/odd|folder"
    assert entries[1].work == activity.Work("Slurm job 102 on gpu[1-2]", 93784.0)


def show_with_queue(track, tmp_path, monkeypatch, text: str, problem: str = "") -> str:
    entries = activity.parse_queue(text.format(home=tmp_path))
    monkeypatch.setattr(activity, "queue", lambda: (entries, problem))
    return progress.show(track, None, tmp_path / "runs")


def mark_other(home: Path, track: str, local: bool, host: str = "login9", cores=None) -> None:
    run = life.Run(track, host, os.getpid(), time.time(), local, cores)
    artefacts.write_json(home / life.MARK, run.__dict__)


def test_the_queue_says_what_runs_and_what_waits_in_it(track, tmp_path, monkeypatch):
    runs, cell = tmp_path / "runs", a_cell(track, "entpruner", 0, "finetune-low")
    write_log(track, runs, Paths(track, cell, runs).recover, "07:00:00 train 40/400\n")
    text = show_with_queue(track, tmp_path, monkeypatch, QUEUE)
    assert re.search(r"  dense +dit +1\.0 min +Slurm job 101 on cpu1", text)
    assert re.search(r"  recover +dit/entpruner/0.25/finetune-low/seed0 +1\.1 d +"
                     r"Slurm job 102 on gpu\[1-2\] +train 40/400", text)  # fmt: skip
    rows = table_of(text)
    assert (rows["recover"]["running"], rows["select"]["queued"]) == ("1", "1")
    assert rows["extractor"]["running"] == "-"  # of another folder
    assert "1 running" in text.splitlines()[0]
    mark_other(tmp_path, "another", local=False)  # comments do not name the track
    assert table_of(show_with_queue(track, tmp_path, monkeypatch, QUEUE))["dense"]["running"] == "-"


def test_a_cell_is_drawn_in_shards(track, tmp_path, monkeypatch):
    """A drawn one is not lost while the next waits; two at work are two jobs of one cell."""
    runs = tmp_path / "runs"
    paths = Paths(track, a_cell(track, "random_layers"), runs)
    for record in (paths.extractor, paths.dense, paths.select, paths.cost):
        write_stage(record, 60.0)
    folder = tmp_path / "runs/small/logs/dit/random_layers/0.25/none/seed0"
    folder.mkdir(parents=True)
    (folder / "shard0of2.log").write_text("07:00:00 20 of 20 images\n")
    write_stage(paths.shards[0][0])
    assert table_of(progress.show(track, None, runs))["sample"]["stopped"] == "-"
    (folder / "shard1of2.log").write_text("07:00:00 10 of 20 images\nMemoryError\n")
    text = progress.show(track, None, runs)
    assert "1 x sample: MemoryError" in text
    assert f"log: {folder}/shard1of2.log" in text
    comment = "rule_shard_wildcards_dit__random_layers_0.25_none___0"
    queue = "".join(f"{7 + k}|RUNNING|0:30|cpu1|{comment}_{k}_2|{{home}}\n" for k in range(2))
    text = show_with_queue(track, tmp_path, monkeypatch, queue)
    assert re.search(r"  sample +dit/random_layers/\S+ +30 s +Slurm job 7 on cpu1 and 1 more", text)
    assert table_of(text)["sample"]["running"] == "1"
    assert "; 2 at a time, as now" in text


@pytest.mark.parametrize("problem", ["squeue failed: Unable to contact slurm controller", ""])
def test_jobs_out_of_sight_run_as_long_as_their_logs_are_fresh(
    track, tmp_path, monkeypatch, problem
):
    """Slurm jobs while squeue does not answer, or local ones of a run on another machine."""
    runs = tmp_path / "runs"
    mark_other(tmp_path, track.name, local=not problem)
    paths = Paths(track, a_cell(track, "entpruner"), runs)
    fresh = write_log(track, runs, paths.dense, "07:00:00 train 40/400\n")
    old = write_log(track, runs, paths.extractor, "07:00:00 epoch 1\n")
    os.utime(old, (time.time() - 2 * jobs.FRESH,) * 2)
    text = show_with_queue(track, tmp_path, monkeypatch, "", problem)
    assert (problem or "its jobs run on login9") in text
    assert re.search(r"  dense +dit +seen \d+ s ago +train 40/400", text)
    assert table_of(text)["extractor"]["stopped"] == "1"
    os.utime(fresh, (time.time() - 2 * jobs.FRESH,) * 2)
    artefacts.training_folder(paths.dense).mkdir(parents=True)  # it has just saved itself
    text = show_with_queue(track, tmp_path, monkeypatch, "", problem)
    assert table_of(text)["dense"]["running"] == "1"


def test_grouped_slurm_jobs_hide_their_stages(track, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    mark_other(tmp_path, track.name, local=False)
    write_log(track, runs, f"{runs}/small/extractor/extractor.json", "07:00:00 epoch 1\n")
    text = show_with_queue(track, tmp_path, monkeypatch, "9|RUNNING|0:05|cpu1|rule_scores|{home}")
    assert "1 Slurm jobs do not tell what they run" in text
    assert table_of(text)["extractor"]["running"] == "1"


@pytest.mark.parametrize(
    "command, found",
    [
        ("/usr/bin/python /opt/bin/prunebench dense --track a --model dit", ("dense", "dit")),
        ("python -m prunebench recover --gpus 2 --model=sit", ("recover", "sit")),
        ("torchrun --nproc-per-node 2 -m prunebench recover --model dit", ("recover", "dit")),
        ("prunebench progress --track a", None),
        ("vi prunebench/cli.py", None),
        ("prunebench", None),
    ],
)
def test_stage_commands_among_processes(command, found):
    options = activity.stage_command(command.split())
    assert (options.get("stage") and (options["stage"], options["--model"])) == found
    assert activity.stage_command(["bash", "-c", f"set -e; {command} &> a/prunebench"]) == {}


def test_a_running_process_is_seen_and_missed_when_it_is_killed(track, tmp_path):
    """A real stage, in a folder of its own, and a second look after SIGKILL."""
    content = tiny.plain(track)
    content["models"]["dit"]["training"]["images"] = 16 * 100_000
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    runs, log = tmp_path / "runs", tmp_path / "runs/small/logs/dit/dense/dense.log"
    log.parent.mkdir(parents=True)
    command = ["prunebench", "dense", "--track", "small.yaml", "--model", "dit"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with log.open("w") as handle:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=handle, env=environment)
    try:
        deadline = time.monotonic() + 120
        while "train 0/" not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        seen = progress.show(track, None, runs)
    finally:
        process.kill()
        process.wait()
    line = rf"  dense +dit +[\d.]+ (s|min) +process {process.pid} +train 0/100000"
    assert re.search(line, seen)
    assert table_of(seen)["dense"]["running"] == "1"
    gone = progress.show(track, None, runs)
    assert table_of(gone)["dense"]["running"] == "-"
    assert "1 x dense: killed, or its machine lost" in gone
    assert f"log: {log}" in gone


def test_a_run_is_known_by_its_mark_until_its_process_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    life.mark_run("small", local=True, cores=2)
    run = life.read_run(tmp_path)
    assert (run.track, run.pid, run.here, run.ended) == ("small", os.getpid(), True, False)
    later = life.Run(**{**run.__dict__, "started": run.started - 1e9})
    assert later.ended  # the number is another process's now
    life.unmark_run()
    assert life.read_run(tmp_path) is None
    life.unmark_run()
    mark_other(tmp_path, "small", local=False)
    assert not life.read_run(tmp_path).ended  # nobody here can tell
    life.unmark_run()
    assert life.read_run(tmp_path).host != socket.gethostname()  # it is not ours to take back


def test_a_command_beside_a_run_leaves_its_mark(tmp_path, monkeypatch):
    """`partial --nolock`, which docs/cluster.md recommends."""
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as process:
        monkeypatch.setattr(os, "getpid", lambda: process.pid)
        life.mark_run("small", local=False, cores=None)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        life.mark_run("other", local=True, cores=1)
        life.unmark_run()
        assert life.read_run(tmp_path).pid == process.pid
        process.kill()
    life.mark_run("other", local=True, cores=1)  # it was killed
    assert life.read_run(tmp_path).track == "other"


# ---- the command


def test_the_command_and_its_errors(track, tmp_path, capsys):
    runs = ["--runs", str(tmp_path / "runs")]
    small = ["progress", "--track", str(tmp_path / "small.yaml"), *runs]
    assert cli.main(small) == 0
    assert capsys.readouterr().out.startswith("small, matched: 0 of ")
    for wrong, message in (
        (["progress", "--track", "nowhere", *runs], "unknown track 'nowhere'"),
        ([*small, "--division", "best"], "unknown division 'best'"),
        ([*small, "--watch", "0"], "--watch 0"),
    ):
        assert cli.main(wrong) == 2
        assert message in capsys.readouterr().err


def test_watching_ends_with_the_last_job(track, tmp_path, capsys, monkeypatch):
    runs = tmp_path / "runs"
    records = iter(jobs.plan(track, ["matched"], runs).jobs)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        for record in records:
            write_stage(record)

    monkeypatch.setattr(view.time, "sleep", nap)
    progress.watch(track, None, runs, 5.0)
    cells = len(track.cells())
    assert naps == [5.0]
    assert f"{cells} of {cells} cells done (100%)" in capsys.readouterr().out

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(view.time, "sleep", interrupt)
    progress.watch(track, None, tmp_path / "other", 5.0)


def test_it_needs_no_torch_and_no_pandas():
    code = "import sys, prunebench.progress; print({'torch', 'pandas'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "set()"


def test_looking_again_at_a_thousand_cells_is_quick(track, tmp_path):
    many = tiny.track(track.name, {**tiny.plain(track), "seeds": list(range(40))}, track.methods)
    planned = jobs.plan(many, ["matched"], tmp_path / "runs")
    assert len(planned.cells) > 1000
    for place, record in enumerate(planned.jobs):
        if place % 2:
            write_stage(record, inputs=60)
    began = time.process_time()
    progress.show(many, None, tmp_path / "runs")
    assert time.process_time() - began < 2  # 0.3 s where nothing else runs


# ---- beside the Snakefile


@pytest.fixture
def workflow(track, tmp_path) -> Path:
    for part in ("Snakefile", "workflow", "methods", "environment.yml", "envs"):
        (tmp_path / part).symlink_to(ROOT / part)
    return tmp_path


def snakemake(workflow: Path, *arguments: str, **options) -> subprocess.Popen:
    command = ["snakemake", *arguments, "--config", "track=small.yaml"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=workflow, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **options)  # fmt: skip


@pytest.mark.slow
def test_jobs_are_those_of_the_workflow(workflow, track):
    """Records, logs and wildcards of every job, as a dry run prints them."""
    process = snakemake(workflow, "--cores", "1", "--dry-run", "everything")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    printed = {}
    for block in re.findall(r"^rule (\w+):\n((?: {4}.*\n)+)", output, re.MULTILINE):
        facts = dict(line.strip().split(": ", 1) for line in block[1].splitlines() if ": " in line)
        values = re.findall(r"\w+=([^,]*)", facts.get("wildcards", ""))
        first = facts.get("output", "").split(", ")[0]
        printed[first] = (block[0], facts.get("log"), "_".join(values).replace("/", "_"))
    shown = (*jobs.SHOWN, "shard")
    expected = {record: entry for record, entry in printed.items() if entry[0] in shown}
    planned = jobs.plan(track, track.divisions, Path("runs"), oracle=True)
    parts = [part for job in planned.jobs.values() for part in job.parts]
    assert {part.record: (part.stage, part.log, part.wildcards) for part in parts} == expected


@pytest.mark.slow
def test_a_run_marks_itself_and_says_what_to_do_after_a_full_disk(workflow, track):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    target = "runs/small/extractor/extractor.json"
    process = snakemake(workflow, "--cores", "1", target, preexec_fn=limit)
    marked = None
    while process.poll() is None:
        marked = life.read_run(workflow) or marked
        time.sleep(0.1)
    output = process.stdout.read()
    assert process.returncode == 1, output[-3000:]
    assert (marked.track, marked.local, marked.cores, marked.pid) == ("small", True, 1, process.pid)
    assert life.read_run(workflow) is None
    assert "prunebench progress --track small.yaml" in output
    text = progress.show(track, None, workflow / "runs")
    assert re.search(r"1 x extractor: prunebench: cannot write runs/small/extractor/", text)
    assert f"cells that wait for it: {len(track.cells())};" in text
