"""Selection: a method decides what goes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prunebench.errors import UserError
from prunebench.records import artefacts, sealed
from prunebench.selection import checks as selection
from prunebench.stages.inputs import check_data, trained_on, training_data
from prunebench.stages.job import Job
from prunebench.stages.work import checkpoints_of, dense_model, save, sizes, training_report
from prunebench.tracks import methods, plain
from prunebench.training import parallel
from prunebench.training.budget import BudgetMeter

AVERAGE = "average.safetensors"  # of a training that selection began


def select(job: Job) -> None:
    """Run a method on the dense model and save what its plan leaves."""
    method, cell, whole = job.track.method(job.cell.method), job.cell, dense_model(job)
    check_data(job, "dense", job.read("dense", payload=False))
    meter, record = BudgetMeter(), job.layout.record("dense", **job.names)
    checkpoints = checkpoints_of(job, record, method.file)
    context = selection.Context(
        whole,
        job.family,
        job.settings.config,
        training_data(job),
        sparsity=cell.sparsity,
        seed=cell.seed,
        method=method.name,
        meter=meter,
        settings=job.settings.recovery,
        train_images=job.track.budget(cell) if method.trains else 0,
        sampling=plain(job.settings.sampling),
        checkpoints=checkpoints,
        device=parallel.device(),
    )
    with meter.clock(), _unedited(method.file) as source:
        plan, pruned = selection.select(
            context,
            methods.load(method),
            method.kind,
            job.track.parameters(cell),
            method.steps,
            method.updates,
        )
    files = save(job, pruned, plan)
    if average := selection.averaged(context, plan):
        files.append(job.file(AVERAGE))
        artefacts.write_tensors(files[-1], average)
    made_from = sealed.made_from(dense=job.read("dense", payload=False), method=source)
    job.finish(
        files,
        {**made_from, **trained_on(job)},
        checkpoints.earlier_s,
        budget=meter.report(),
        trained_images=context.trained_images,
        training=training_report(job, "recovery", context.progress, checkpoints),
        size=sizes(whole, pruned, plan),
    )


@contextlib.contextmanager
def _unedited(file: Path) -> Iterator[str]:
    """The file's hash. Else the record would be newer than an edit that it knows nothing of.

    Raises:
        UserError: the method's file is no longer what it was.
    """
    before = artefacts.sha256(file)
    try:
        yield before
    finally:
        if artefacts.sha256(file) != before:
            raise UserError(f"{file} was edited while it ran; run the same command again")
