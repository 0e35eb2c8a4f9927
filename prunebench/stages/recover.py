"""Recovery: the pruned model is trained on what selection has left of the budget."""

from types import ModuleType

from torch import Tensor, nn

from prunebench import recovery
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Loss
from prunebench.stages.inputs import check_data, trained_on, training_data
from prunebench.stages.job import Job
from prunebench.stages.select import AVERAGE
from prunebench.stages.work import checkpoints_of, dense_model, save, sizes, training_report
from prunebench.training import loop, parallel
from prunebench.training.budget import BudgetMeter
from prunebench.training.checkpoints import Checkpoints


def recover(job: Job) -> None:
    """Train the pruned model on what selection has left of the cell's budget."""
    chosen, dense = job.read("select"), job.read("dense", payload=False)
    sealed.check_made_from(job.path("select"), chosen, dense=dense)
    check_data(job, "select", chosen)
    folder = job.path("select").parent
    pruned, plan = surgery.load(folder)
    whole, pruned = dense_model(job).to(parallel.device()), pruned.to(parallel.device())
    checkpoints, meter = checkpoints_of(job, job.paths.dense, job.paths.select), BudgetMeter()
    begun = artefacts.read_tensors(folder / AVERAGE) if AVERAGE in chosen.files else {}
    progress = training_left(job, chosen.trained_images, begun)
    losses = train(job, pruned, plan, whole, meter, progress, checkpoints)
    if parallel.rank():
        return  # the first process writes
    job.finish(
        save(job, pruned, plan),
        {**sealed.made_from(select=chosen, dense=dense), **trained_on(job)},
        checkpoints.earlier_s,
        budget=meter.report(),
        training=training_report(job, "recovery", progress, checkpoints),
        size=sizes(whole, pruned, plan),
        loss=Loss(first=losses[0], last=losses[-1]) if losses else None,
    )


def training_left(
    job: Job, trained: int = 0, average: dict[str, Tensor] | None = None
) -> loop.Progress:
    """What is left of a cell's training after selection has trained on `trained` images of it.

    Args:
        average: average of the training that selection began, which goes on.
    """
    batch, budget = job.settings.recovery.batch, job.track.budget(job.cell)
    total, left = budget // batch, (budget - trained) // batch
    moved = {name: tensor.to(parallel.device()) for name, tensor in (average or {}).items()}
    return loop.Progress(total, total - left, moved)


def train(
    job: Job,
    pruned: nn.Module,
    plan: Plan,
    whole: nn.Module,
    meter: BudgetMeter,
    progress: loop.Progress,
    checkpoints: Checkpoints,
) -> list[float]:
    """Train `pruned` in place as the cell's recovery says; returns the loss of every step.

    Args:
        whole: the dense model, which a distilling recovery has as its teacher.
        progress: which steps of the cell's training are left.
    """
    options, data = job.settings.recovery, training_data(job)
    family, module = job.family, recovery.recovery(job.track.recovered_by(job.cell))
    teaching = _teaching(whole, plan, family, meter) if module.TEACHER else None
    with meter.clock():
        return loop.train(
            meter.watch(pruned),
            data,
            options,
            images=(progress.total - progress.done) * options.batch,
            seed=job.cell.seed,
            muon_names=family.weights(pruned),
            masks=plan.masks,
            loss=module.loss(teaching),
            progress=progress,
            meter=meter,
            checkpoints=checkpoints,
        )


def _teaching(
    whole: nn.Module, plan: Plan, family: ModuleType, meter: BudgetMeter
) -> recovery.Teaching:
    # Before the teacher is frozen and metered: finding widths may trace the model, which needs
    # gradients and is no pass of the recovery.
    kept = surgery.kept_rows(whole, plan, family)
    return recovery.Teaching(meter.watch(whole.requires_grad_(False), "teacher"), kept)
