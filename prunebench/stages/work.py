"""What the stages that compute share: guarding them, the dense model, saving and resuming.

A record's status is "ok" or "failed". A cell fails where its method or its training breaks; the
failure is recorded and passed on, so that it costs its own cells only. Anything else that goes
wrong (disk, memory, corrupt files) stops the command and is tried again by the next run.
"""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prunebench.errors import CellError, machine_fault
from prunebench.evaluation import cost
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Failure, Sizes, Training
from prunebench.records.provenance import PACKAGE, code_hash, provenance
from prunebench.records.schema import Failed, Record
from prunebench.runtime import child
from prunebench.selection import checks as selection
from prunebench.stages.job import Job, labels
from prunebench.tracks.stages import limit_of
from prunebench.training import loop, parallel
from prunebench.training.checkpoints import Checkpoints

log = logging.getLogger(__name__)


def guarded(stage: Callable[[Job], None], job: Job) -> bool:
    """Run a stage of a cell; record a failure of the cell instead of raising it.

    Returns:
        True if the cell is well.
    """
    try:
        stage(job)
        return True
    except (CellError, RuntimeError) as error:  # RuntimeError: the pruned model does not run
        if machine_fault(error):
            raise
        traceback.print_exc()
        own = Failure(stage=job.stage, error=str(error), log=job.log)
        failure = getattr(error, "inherited", None) or own
        if parallel.rank() and not isinstance(error, CellError):
            raise  # the other processes may not have failed with this one
    log.error("cell failed in %s: %s", failure.stage, failure.error)
    if parallel.rank():
        return False  # the first process writes
    record_failure(job, failure)
    return False


def record_failure(job: Job, failure: Failure) -> None:
    """Write the record of a stage whose cell failed."""
    content = {"failure": failure, "labels": labels(job), "fingerprint": job.fingerprint}
    made = provenance(job.track.in_force)
    record = Failed(identity=job.identity(job.stage), provenance=made, **content)
    sealed.write(job.record, record)
    artefacts.forget_training(job.record)


def contained(stage: Callable[[Job], None], job: Job) -> int:
    """As `guarded`, in a child process: crashing or never ending fails the cell as well.

    One that is killed is tried again once, for it may have been the system or somebody.

    Returns:
        The exit status, 0 where a failure was recorded.
    """
    minutes = limit_of(job.track.in_force)
    for trial in (1, 2):
        end = child.run(lambda: 0 * guarded(stage, job), 60 * minutes)
        if end.status is not None:
            return end.status
        log.error("%s: %s", job.stage, end.reason)
        if not end.killed or trial == 2:
            break
    reason = f"{end.reason}, twice" if end.killed else end.reason
    if end.late:
        reason += f"; needs.{job.stage}.runtime of the track says how long it may take"
    error = f"method {job.cell.method} did not come to its end: {reason}"
    record_failure(job, Failure(stage=job.stage, error=error, log=job.log))
    return 0


def dense_model(job: Job) -> nn.Module:
    """The verified dense model of the job, on the CPU."""
    job.read("dense")
    return surgery.load(job.path("dense").parent)[0]


def save(job: Job, network: nn.Module, plan: Plan) -> list[Path]:
    """Write a network beside the job's record; returns its files."""
    folder, settings = job.record.parent, job.settings
    return surgery.save(folder, network, plan, settings.family, settings.config)


def checkpoints_of(job: Job, *inputs: str | Path) -> Checkpoints:
    """Where the job's trainings are saved, for a later start of the same job on the same inputs."""
    identity = {
        "code": code_hash(PACKAGE),
        "torch": torch.__version__,
        "track": job.track.fingerprint(job.stage, **job.names),
        "names": dict(job.names),
        "inputs": {str(file): artefacts.sha256(file) for file in inputs},
    }
    seconds = job.track.settings.checkpoint_seconds
    return Checkpoints(artefacts.training_folder(job.record), identity, seconds)


def training_report(
    job: Job, section: str, progress: loop.Progress, checkpoints: Checkpoints
) -> Training:
    """Under what conditions a stage trained, by which section of the model's settings."""
    return Training(
        batch=getattr(job.settings, section).batch,
        micro_batch=progress.micro_batch,
        processes=parallel.world(),
        resumed=checkpoints.resumed,
        held=progress.held,
    )


def check_selected(job: Job, whole: nn.Module, pruned: nn.Module, plan: Plan, told: Record) -> None:
    """Check again what a method left, in a stage that runs no method's code.

    Args:
        whole, pruned: the dense and the stored model, on the CPU.
        told: the record that vouches for `pruned`.

    Raises:
        CellError: its sizes are not those that its record tells, its target is missed, its masks
            do not hold, or weights differ from the dense model's that nothing may have changed.
    """
    method = job.track.method(job.cell.method)
    free = method.trains or method.recovery == "required" or told.STAGE == "recover"
    selection.recheck(
        whole,
        pruned,
        plan,
        job.family,
        method.kind,
        job.cell.sparsity,
        method.steps,
        untouched=not free,
        updates=method.updates,
    )
    if sizes(whole, pruned, plan) != told.size:
        raise CellError(f"{told.STAGE}.json tells other sizes than its model has")


def sizes(whole: nn.Module, pruned: nn.Module, plan: Plan) -> Sizes:
    """Parameters of a pruned model and of the dense one."""
    return Sizes(
        parameters=cost.count_parameters(pruned),
        nonzero_parameters=cost.count_nonzero(pruned),
        dense_parameters=cost.count_parameters(whole),
        sparsity_reached=targets.reached(whole, pruned, plan),
    )
