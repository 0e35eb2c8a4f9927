# The track, its paths and the functions the rules share. Everything here is free of torch.
import fcntl
import os
from pathlib import Path

from snakemake.exceptions import WorkflowError

from prunebench import config as tracks
from prunebench import warm
from prunebench.artefacts import read_json
from prunebench.errors import UserError

try:
    TRACK = tracks.load(config.get("track", "embedded"))
except UserError as error:
    raise WorkflowError(str(error))

ARGUMENT = config.get("track", "embedded")
LAYOUT = tracks.Layout(TRACK.name)
METRICS = {
    division: [tracks.Paths(TRACK, cell).metrics for cell in TRACK.cells(division)]
    for division in TRACK.divisions
}
RESULTS = {division: LAYOUT.results(division, TRACK.default_division) for division in METRICS}
LEADERBOARD = {
    division: [f"{folder}/leaderboard.{kind}" for kind in ("csv", "md", "tex", "html", "bib")]
    for division, folder in RESULTS.items()
}
ORACLE = [LAYOUT.oracle(*place) for place in TRACK.oracle()]


def forget_killed_run():
    """Remove the marks that a killed run left, so that the same command simply goes on.

    The kernel gives up our own lock with the process that holds it: if we get it, no run is alive
    and Snakemake's lock is stale. Its list of incomplete outputs is too, because records appear
    complete or not at all: a job cut short has left none.
    """
    state = Path(".snakemake")
    state.mkdir(exist_ok=True)
    handle = (state / "prunebench.lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    for mark in (*state.glob("locks/*.lock"), *state.glob("incomplete/*")):
        mark.unlink()
    return handle


RUN_LOCK = forget_killed_run() if workflow.is_main_process else None

# What the short stage commands import; once for the whole run instead of once per command.
PRELOAD = ["prunebench.stages"]


def start_warm_server():
    """On one machine stage commands fork from a process that has imported everything already."""
    if workflow.local_exec:
        socket = warm.start(os.getpid(), PRELOAD, "prunebench.cli:main")
        if socket:
            os.environ[warm.VARIABLE] = socket


def report_failed_cells():
    for division, metrics in METRICS.items():
        failed = [path for path in metrics if Path(path).exists() and is_failed(path)]
        if failed and Path(LEADERBOARD[division][0]).exists():
            logger.warning(
                f"{len(failed)} of {len(metrics)} cells failed; "
                f"{RESULTS[division]}/leaderboard.md names the reasons and logs"
            )


def is_failed(record):
    return read_json(record)["status"] == "failed"


def recovery_of(wildcards):
    """The cell's recovery; a selection names one only where its method trains."""
    named = wildcards.get("recovery") or wildcards.selection.removeprefix("selection")
    return named.lstrip("-") or "none"


def paths(wildcards):
    """The artefacts of the cell that a job's wildcards name."""
    cell = tracks.Cell(
        TRACK.name,
        wildcards.model,
        wildcards.method,
        float(wildcards.sparsity),
        recovery_of(wildcards),
        int(wildcards.seed),
    )
    return tracks.Paths(TRACK, cell)


def artefact(name):
    """Input function: one artefact of the job's cell."""
    return lambda wildcards: getattr(paths(wildcards), name)


def fingerprint(stage):
    """Params function: changes, and so reruns the stage, when settings it depends on change."""
    return lambda wildcards: TRACK.fingerprint(
        stage, wildcards.get("model", ""), wildcards.get("method", "")
    )


def checkpoint_file(wildcards):
    """The file of a model's weights, where the track names one by its path."""
    file = TRACK.model(wildcards.model).get("weights", {}).get("file")
    return [file] if file else []


def method_file(wildcards):
    return str(TRACK.method(wildcards.method).file)


def finished(records):
    return [path for path in records if Path(path).exists()]
