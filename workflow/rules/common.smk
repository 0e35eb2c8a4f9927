# The track, its paths and the functions the rules share. Everything here is free of torch.
import atexit
import functools
import inspect
import os
import socket
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from prunebench import tracks
from prunebench.runtime import gpus
from prunebench.runtime import slurm
from prunebench.runtime import warm
from prunebench.records.artefacts import read_json
from prunebench.errors import UserError
from prunebench.progress import activity
from prunebench.records.provenance import config_hash

try:
    TRACK = tracks.load_any(config.get("track", "embedded"))
except UserError as error:
    raise WorkflowError(str(error))

ARGUMENT = config.get("track", "embedded")
LAYOUT = tracks.Layout(TRACK.name)
METRICS = {division: TRACK.records(division) for division in TRACK.divisions}
RESULTS = {division: LAYOUT.results(division, TRACK.default_division) for division in METRICS}
LEADERBOARD = {
    division: [f"{folder}/leaderboard.{kind}" for kind in ("csv", "md", "tex", "html", "bib")]
    for division, folder in RESULTS.items()
}
ORACLE = [LAYOUT.oracle(*place) for place in TRACK.oracle()]


def forget_killed_run():
    """Remove the marks that a killed run left, so that the same command simply goes on.

    Live runs, of different tracks, share a lock of our own, which the kernel gives up with its
    process: if we get it for ourselves, no run is alive and Snakemake's lock is stale. Its list of
    incomplete outputs is too, because records appear complete or not at all: a job cut short has
    left none.

    A run on a cluster writes its machine's name into the lock file and takes it back when it ends.
    On some file systems locks are seen on their own machine only, so that a name that is not ours
    may be of a run that is alive.
    """
    state = Path(".snakemake")
    state.mkdir(exist_ok=True)
    handle = (state / "prunebench.lock").open("a+")
    if not activity.only_run(handle):
        return handle
    handle.seek(0)
    if handle.read() not in ("", socket.gethostname()):
        raise WorkflowError(
            f"A run on another machine was killed or is alive: see {handle.name}. Give the command "
            "there; or, if nothing runs there, delete the file and give it here."
        )
    atexit.register(handle.truncate, 0)
    for mark in (*state.glob("locks/*.lock"), *state.glob("incomplete/**/*")):
        if not mark.is_dir():
            mark.unlink(missing_ok=True)  # jobs that outlived the run remove their own
    activity.share(handle)
    return handle


RUN_LOCK = forget_killed_run() if workflow.is_main_process else None


def cancel_leftover_jobs():
    """A killed run's Slurm jobs go on without it; ours would do the same work beside them."""
    if not activity.only_run(RUN_LOCK):
        logger.warning(
            "Another run of this folder is alive, or its file system has no locks: "
            "no left-over jobs are looked for."
        )
        return
    try:
        found, left = slurm.cancel(workflow.executor_settings.jobname_prefix, Path.cwd())
    except UserError as error:
        raise WorkflowError(str(error))
    RUN_LOCK.truncate(0)
    RUN_LOCK.write(socket.gethostname())
    RUN_LOCK.flush()
    activity.share(RUN_LOCK)
    if left:
        logger.warning(f"Cancelled Slurm jobs of a killed run do not end, going on: {left}")
    elif found:
        logger.warning(f"Cancelled {len(found)} Slurm jobs of a killed run; planning anew.")
        os.execv(sys.executable, sys.orig_argv)  # some may have finished since the jobs were listed


def plan_at_events_only():
    """Drop Snakemake's default limit, 100 jobs a second, and with it steps that nothing calls for.

    In 9.27 every step of the scheduler sets a timer for another one as long as jobs are ready. So
    steps multiply until its process is always busy (snakemake issue 2967), beside measurements of
    latency or on a login node. A limit that somebody set is kept.
    """
    limiter = workflow.scheduler.job_rate_limiter
    if limiter and (limiter.max_jobs, limiter.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


UNSEEN = Path(".snakemake/prunebench.unseen")


def adopt_unseen_records():
    """Note what records rest on whose jobs ended after their controller was killed.

    It could not, and Snakemake takes outputs without a note for good whatever is changed later. So
    records of other settings than the track has now are for the user to judge.
    """
    others, own = [], config_hash(TRACK.content)
    for job in workflow.dag.jobs:
        if workflow.dag.needrun(job) or not workflow.dag.reason(job).no_metadata:
            continue
        if not Path(job.output[0]).exists():  # a shard that was gathered, or was deleted
            continue
        if "keep" in config or config_of(job.output[0]) in (own, None):
            workflow.async_run(workflow.persistence.finished(job))
        else:
            others.append(job.output[0])
    if others:
        UNSEEN.write_text("\n".join([*others, ""]))
        raise WorkflowError(
            f"{len(others)} records, such as {others[0]}, were made with other settings of track "
            f"{TRACK.name}, by jobs whose end no run has seen. `xargs rm < {UNSEEN}` has them made "
            f"anew; the same command with `--config track={ARGUMENT} keep=yes`, once, takes them."
        )


def config_of(record):
    """Hash of the configuration a record was made with; None if it depends on none."""
    if not record.endswith(".json"):
        return None
    return read_json(Path(record)).get("provenance", {}).get("config")


# What the short stage commands import; once for the whole run instead of once per command.
FAMILIES = sorted({model["family"] for model in TRACK.content["models"].values()})
PRELOAD = ["prunebench.stages.score", *(f"prunebench.models.{family}" for family in FAMILIES)]


def prepare_machine():
    """For jobs on this machine: its GPUs are shared out, and the imports done once for all."""
    os.environ[gpus.CLAIM] = "1"
    if gpus.devices() and not any(TRACK.needs(name)["gpu"] for name in tracks.stages.NEEDS):
        logger.warning(f"Track {TRACK.name} asks for no GPU (key `needs`): it runs on the CPU.")
    socket = warm.start(os.getpid(), PRELOAD, "prunebench.cli:main")
    if socket:
        os.environ[warm.VARIABLE] = socket


def report_unfinished_run():
    logger.error(
        "Not everything was made; what is finished is kept. "
        f"`prunebench progress --track {ARGUMENT}` lists lost jobs with their reasons and logs, "
        "the same snakemake command tries them again, and "
        f"`snakemake --cores 1 partial --config track={ARGUMENT}` makes leaderboards of the rest."
    )


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


def needs(rule):
    """What the track says that the rule's jobs need; memory and time grow with every attempt.

    CPUs are no `threads`, because `--cores all` would cap those at the cores of the submit host.
    """
    asked = TRACK.needs(rule)
    return {
        "mem_mb": inspected(lambda wildcards, attempt: asked["mem_mb"] * attempt),
        "runtime": inspected(lambda wildcards, attempt: asked["runtime"] * attempt),
        "gpu": asked["gpu"],
        "cpus_per_task": asked["cpus"],
        "nodes": 1,  # or Slurm may spread a job's GPUs over several
    }


def recovery_of(wildcards):
    """The cell's recovery; a selection names one only where its method trains."""
    named = wildcards.get("recovery") or wildcards.selection.removeprefix("selection")
    return named.lstrip("-") or "none"


@functools.cache
def cell_paths(model, method, sparsity, recovery, seed):
    cell = tracks.Cell(TRACK.name, model, method, float(sparsity), recovery, int(seed))
    return tracks.Paths(TRACK, cell)


def paths(wildcards):
    """The artefacts of the cell that a job's wildcards name."""
    names = (wildcards.model, wildcards.method, wildcards.sparsity)
    return cell_paths(*names, recovery_of(wildcards), wildcards.seed)


def inspected(function):
    """Note the function's signature, which Snakemake else works out anew for every job."""
    function.__signature__ = inspect.signature(function)
    return function


def artefact(name):
    """Input function: one artefact of the job's cell."""
    return inspected(lambda wildcards: getattr(paths(wildcards), name))


stage_fingerprint = functools.cache(TRACK.fingerprint)


def shards(wildcards):
    """Records and images of the shards a cell is drawn in; none where it is drawn in one piece."""
    return [file for files in paths(wildcards).shards for file in files]


def fingerprint(stage):
    """Params function: changes, and so reruns the stage, when settings it depends on change."""
    return inspected(
        lambda wildcards: stage_fingerprint(
            stage, wildcards.get("model", ""), wildcards.get("method", "")
        )
    )


def checkpoint_file(wildcards):
    """The file of a model's weights, where the track names one by its path."""
    file = TRACK.model(wildcards.model).get("weights", {}).get("file")
    return [file] if file else []


def latents(wildcards):
    """Records of the latents and prompts that a model trains on; none for images of classes."""
    return LAYOUT.encoded(TRACK.model(wildcards.model))


def prompts(wildcards):
    """The record of the prompts that a model is asked; none where it has classes."""
    name = TRACK.model(wildcards.model).get("text_encoder")
    return [LAYOUT.prompts(name)] if name else []


def encode_fingerprint(wildcards):
    return TRACK.fingerprint("encode", **dict(wildcards.items()))


def method_file(wildcards):
    return str(TRACK.method(wildcards.method).file)


def alone(wildcards):
    """Threads function: every core of this machine, so that no job runs beside a measurement.

    On a cluster a job has its node or GPU to itself where the profile asks for that. A track that
    waits for no quiet machine (`latency.wait: 0`) does not ask for one here either: its rows say
    that they were not timed alone, but its cells are finished early.
    """
    waits = TRACK.content.get("latency", {}).get("wait") != 0
    return workflow.cores if workflow.local_exec and waits else 1


def alone_if_measured(wildcards):
    """Threads function of an efficiency track's rows: counting needs no quiet machine."""
    measured = TRACK.content["device"] == "cpu" or gpus.devices()
    return alone(wildcards) if measured else 1


def finished(records):
    return [path for path in records if Path(path).exists()]


# Looking for records is left to functions: every Slurm job reads the Snakefile, and should not ask
# the file system for thousands of files.


def finished_cells(division):
    return lambda wildcards: finished(METRICS[division])


def finished_oracle(division):
    """A finished oracle joins the default division's tables; it is never made for them."""
    mine = division == TRACK.default_division
    return lambda wildcards: ORACLE if mine and len(finished(ORACLE)) == len(ORACLE) else []


def partial_leaderboards(wildcards):
    begun = [division for division in METRICS if finished(METRICS[division])]
    return [f"{LAYOUT.root}/partial_{division}.done" for division in begun]
