# The track, and the functions that the rules share. Everything here is free of torch.
import contextlib
import functools
import inspect
import subprocess
from pathlib import Path

from snakemake.exceptions import WorkflowError

from prunebench import tracks
from prunebench.errors import UserError
from prunebench.records.artefacts import read_json
from prunebench.records.provenance import config_hash
from prunebench.runtime import gpus, run, slurm
from prunebench.tracks import rehearsal
from prunebench.tracks.stages import NEEDY, STAGES


@contextlib.contextmanager
def in_one_line():
    """What the user can mend is said without a traceback."""
    try:
        yield
    except UserError as error:
        raise WorkflowError(str(error))


KEYS = ("track", "rehearsal", "keep", "disk")  # of --config
LONG = 100  # jobs of a run that says at its start what it will cost

ARGUMENT = str(config.get("track", "embedded"))
with in_one_line():
    if unknown := [name for name in config if name not in KEYS]:
        raise UserError(f"--config {unknown[0]}=...: unknown key; known: {', '.join(KEYS)}")
    TRACK = tracks.load_any(ARGUMENT)
    if config.get("rehearsal"):
        ARGUMENT = str(rehearsal.write(TRACK, tracks.RUNS))
        TRACK = tracks.load(ARGUMENT)
    SETTINGS = config_hash(TRACK.in_force)
    if workflow.is_main_process:
        run.plan_by(SETTINGS)
        RUN_LOCK = run.take_lock()
    else:  # in a Slurm job
        run.check_planned(SETTINGS, ARGUMENT)

if workflow.is_main_process:
    for left_out in TRACK.warnings:
        logger.warning(left_out)

LAYOUT = tracks.Layout(TRACK)
SCORES = {division: TRACK.records(division) for division in TRACK.divisions}
BOARDS = {
    division: [
        f"{LAYOUT.leaderboard(division)}/leaderboard.{kind}"
        for kind in ("csv", "md", "tex", "html", "bib")
    ]
    for division in SCORES
}
DECODERS = [LAYOUT.record("decoder", **names) for names in TRACK.decoders()]
MASKS = [LAYOUT.record("oracle", **place) for place in TRACK.oracle()]


def prepare():
    """Make ready for the jobs before the first of them starts."""
    with in_one_line():
        if workflow.local_exec:
            run.check_gpus(workflow.dag, TRACK.needs)
        tracks.claim(ARGUMENT, LAYOUT.root)
        if workflow.local_exec:
            families = {model.family for model in TRACK.settings.models.values()}
            # What the short stage commands import; once for the run instead of once per command.
            preload = [STAGES[name].function.partition(":")[0] for name in NEEDY]
            preload += [f"prunebench.models.{family}" for family in sorted(families)]
            needs = map(TRACK.needs, NEEDY)
            run.prepare_machine(needs, preload, TRACK.name, logger.warning)
        elif workflow.executor_plugin.name == "slurm":
            import snakemake_executor_plugin_slurm

            slurm.resubmit_preempted(snakemake_executor_plugin_slurm)
            prefix = workflow.executor_settings.jobname_prefix
            run.cancel_leftover_jobs(RUN_LOCK, prefix, logger.warning)
        if TRACK.kind == "benchmark":
            say_what_it_will_cost(list(workflow.dag.needrun_jobs()))
        unseen = run.unseen_jobs(workflow.dag)
        own = "" if "keep" in config else SETTINGS
        run.adopt_unseen_records(unseen, adopt, own, config_of, ARGUMENT)


def say_what_it_will_cost(jobs):
    """Hours and disk of a long run, which is refused where the disk can't hold it."""
    if len(jobs) < LONG:
        return
    made = {file for job in jobs for file in job.output}
    asked = [division for division, board in BOARDS.items() if not made.isdisjoint(board)]
    words = ["plan", ARGUMENT, "--start", *(f"--division={division}" for division in asked)]
    words += ["--any-disk"] * (config.get("disk") == "any")
    done = subprocess.run(["prunebench", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("prunebench: "))
    logger.info(done.stdout.strip())


def adopt(job):
    workflow.async_run(workflow.persistence.finished(job))


def config_of(record):
    """Hash of the configuration a record was made with; None if it depends on none."""
    if not record.endswith(".json"):
        return None
    return read_json(Path(record)).get("provenance", {}).get("config")


def report_unfinished_run():
    logger.error(
        "Not everything was made; what is finished is kept. "
        f"`prunebench progress --track {ARGUMENT}` lists lost jobs with their reasons and logs, "
        "the same snakemake command tries them again, and "
        f"`snakemake --cores 1 partial --config track={ARGUMENT}` makes leaderboards of the rest."
    )


def report_failed_cells():
    for division, records in SCORES.items():
        failed = [path for path in finished(records) if is_failed(path)]
        if failed and Path(BOARDS[division][0]).exists():
            logger.warning(
                f"{len(failed)} of {len(records)} cells failed; "
                f"{LAYOUT.leaderboard(division)}/leaderboard.md names the reasons and logs"
            )


def is_failed(record):
    return read_json(record)["status"] == "failed"


# ---- what a job needs


def needs(stage):
    """What the track says that a stage's jobs need; memory and time grow with every attempt.

    CPUs are no `threads`, because `--cores all` would cap those at the cores of the submit host.
    """
    asked = TRACK.needs(stage)
    return {
        "mem_mb": inspected(lambda wildcards, attempt: asked["mem_mb"] * attempt),
        "runtime": inspected(lambda wildcards, attempt: asked["runtime"] * attempt),
        "gpu": asked["gpu"],
        "cpus_per_task": asked["cpus"],
        "nodes": 1,  # or Slurm may spread a job's GPUs over several
    }


def inspected(function):
    """Note the function's signature, which Snakemake else works out anew for every job."""
    function.__signature__ = inspect.signature(function)
    return function


def alone(wildcards):
    """Threads function: every core of this machine, so that no job runs beside a measurement.

    On a cluster a job has its node or GPU to itself where the profile asks for that. A track that
    waits for no quiet machine (`latency.wait: 0`) does not ask for one here either: its rows say
    that they were not timed alone, but its cells are finished early.
    """
    return workflow.cores if workflow.local_exec and TRACK.wait else 1


def alone_if_measured(wildcards):
    """Threads function of an efficiency track's rows: counting needs no quiet machine."""
    measured = TRACK.settings.device == "cpu" or gpus.devices()
    return alone(wildcards) if measured else 1


# ---- what a job is about


def names_of(wildcards):
    """What the stage of a job is called with, by name."""
    return LAYOUT.names_of(dict(wildcards.items()))


def job(stage):
    """Params function: the options of a job's command but for --gpus and --log, as words."""

    def options(wildcards):
        names, words = names_of(wildcards), ["--track", ARGUMENT]
        for name in STAGES[stage].names:
            words += [f"--{name.replace('_', '-')}", str(names[name])]
        return words

    return inspected(options)


@functools.cache
def stage_fingerprint(stage, **names):
    return TRACK.fingerprint(stage, **names)


# Names that choose settings.
DEPENDING = ("coder", "model", "dense_seed", "method", "recovery", "sampling", "plan")


def fingerprint(stage):
    """Params function: changes, and so reruns the stage, when settings it depends on change."""

    def settings(wildcards):
        names = names_of(wildcards)
        chosen = {name: names[name] for name in DEPENDING if name in STAGES[stage].names}
        return stage_fingerprint(stage, **chosen)

    return inspected(settings)


@functools.cache
def cell_paths(model, dense_seed, method, sparsity, recovery, seed, precision, sampling):
    cell = tracks.Cell(
        track=TRACK.name,
        model=model,
        dense_seed=int(dense_seed),
        method=method,
        sparsity=float(sparsity),
        recovery=recovery,
        precision=precision,
        sampling=sampling,
        seed=int(seed),
    )
    return tracks.Paths(TRACK, cell)


def paths(wildcards):
    """The artefacts of the cell that a job's wildcards name."""
    names = names_of(wildcards)
    return cell_paths(*(names[name] for name in STAGES["score"].names))


def artefact(name):
    """Input function: one artefact of the job's cell."""
    return inspected(lambda wildcards: getattr(paths(wildcards), name))


def dense(wildcards):
    """Input function: the dense model of a job."""
    names = names_of(wildcards)
    return LAYOUT.dense(names["model"], names["dense_seed"])


def taught_steps(wildcards):
    """Input function: the recovery of a cell, where it makes the steps fewer that are timed."""
    names = names_of(wildcards)
    fewer = TRACK.fold(names["method"], names["recovery"]) > 1
    return [paths(wildcards).recover] if fewer else []


def shards(wildcards):
    """Records and images of the shards a cell is drawn in; none where it is drawn in one piece."""
    return [file for files in paths(wildcards).shards for file in files]


def checkpoint_file(wildcards):
    """The file of a model's weights, where the track names one by its path."""
    weights = TRACK.model(wildcards.model).weights
    return [weights.file] if weights and weights.file else []


def own_coder(wildcards):
    """The record of an autoencoder or text encoder that the track makes itself."""
    return LAYOUT.coder(wildcards.coder)


def encoded(wildcards):
    """Records of the latents and prompts that a model trains on; none for images of classes."""
    return LAYOUT.encoded(TRACK.model(wildcards.model))


def prompts(wildcards):
    """The record of the prompts that a model is asked; none where it has classes."""
    name = TRACK.model(wildcards.model).text_encoder
    return [LAYOUT.encode(name)] if name else []


def method_file(wildcards):
    return str(TRACK.method(wildcards.method).file)


# ---- what is finished
# Looking for records is left to functions: every Slurm job reads the Snakefile, and should not ask
# the file system for thousands of files.


def finished(records):
    return [path for path in records if Path(path).exists()]


def finished_cells(division):
    return lambda wildcards: finished(SCORES[division])


def finished_oracle(division):
    """A finished oracle joins the default division's tables; it is never made for them."""
    mine = division == TRACK.default_division
    return lambda wildcards: MASKS if mine and len(finished(MASKS)) == len(MASKS) else []


def partial_leaderboards(wildcards):
    begun = [division for division in SCORES if finished(SCORES[division])]
    return [f"{LAYOUT.root}/leaderboard/{division}/partial.done" for division in begun]
