"""Recovery: the pruned model is trained on what selection has left of the budget."""

import copy
from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor, nn

from prunebench import recovery
from prunebench.diffusion import samplers
from prunebench.diffusion.sampling import image_seed
from prunebench.errors import CellError
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Loss, Phase, Student
from prunebench.stages.inputs import check_data, objective_of, trained_on, training_data
from prunebench.stages.job import Job
from prunebench.stages.select import AVERAGE
from prunebench.stages.work import checkpoints_of, dense_model, save, sizes, training_report
from prunebench.tracks import phases
from prunebench.tracks.settings_benchmark import Phase as Asked
from prunebench.training import loop, parallel
from prunebench.training.budget import BudgetMeter, unwatched
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
    held = chosen.training.held if chosen.training else 0
    progress = training_left(job, chosen.trained_images, begun, held)
    taught = train(job, pruned, plan, whole, meter, progress, checkpoints)
    if parallel.rank():
        return  # the first process writes
    job.finish(
        save(job, pruned, plan),
        {**sealed.made_from(select=chosen, dense=dense), **trained_on(job)},
        checkpoints.earlier_s,
        budget=meter.report(),
        trained_images=sum(phase.images for phase in taught.phases),
        phases=taught.phases,
        student=taught.student,
        training=training_report(job, "recovery", progress, checkpoints),
        size=sizes(whole, pruned, plan),
        loss=taught.loss,
    )


def training_left(
    job: Job, trained: int = 0, average: dict[str, Tensor] | None = None, held: int = 0
) -> loop.Progress:
    """What is left of a cell's training after selection has trained on `trained` images of it.

    Args:
        average: average of the training that selection began, which goes on.
        held: steps of it at a constant learning rate, whose cosine begins after them.
    """
    batch, budget = job.settings.recovery.batch, job.track.budget(job.cell)
    total, left = budget // batch, (budget - trained) // batch
    moved = {name: tensor.to(parallel.device()) for name, tensor in (average or {}).items()}
    return loop.Progress(total, total - left, moved, held=held)


@dataclass(frozen=True)
class Taught:
    """What a recovery did, beside the weights.

    Attributes:
        student: how the model is to be sampled now.
        loss: of the last phase that trained, at both ends; None where none did.
    """

    phases: tuple[Phase, ...]
    student: Student
    loss: Loss | None


def train(
    job: Job,
    pruned: nn.Module,
    plan: Plan,
    whole: nn.Module,
    meter: BudgetMeter,
    progress: loop.Progress,
    checkpoints: Checkpoints,
) -> Taught:
    """Train `pruned` in place as the cell's recovery says, phase after phase.

    Args:
        whole: the dense model, which a distilling recovery has as its teacher.
        progress: which steps of the cell's training are left. The first phase goes on with the
            schedule and the average of a selection that trained, every other has its own.
    """
    asked = job.track.phases_of(job.cell.method, job.cell.recovery)
    steps = phases.steps_of(asked, progress.total - progress.done)
    school, done, loss = _School(job, plan, whole, meter), [], None
    meter.watch(pruned)
    for number, (phase, count) in enumerate(zip(asked, steps, strict=True)):
        part = loop.Progress(count)
        if not number:
            part = replace(progress, total=progress.done + count)
        losses = school.teach(pruned, number, phase, part, checkpoints)
        images = len(losses) * job.settings.recovery.batch
        done.append(Phase(module=phase.module, images=images, parameters=phase.parameters))
        loss = Loss(first=losses[0], last=losses[-1]) if losses else loss
        progress.micro_batch = part.micro_batch
    return Taught(tuple(done), school.student, loss)


class _School:
    """What the phases of a recovery share.

    Attributes:
        student: how the model is to be sampled after the phases so far.
    """

    def __init__(self, job: Job, plan: Plan, whole: nn.Module, meter: BudgetMeter):
        self.job, self.plan, self.whole, self.meter = job, plan, whole, meter
        self.data, self.student = training_data(job), Student()
        self._dense: recovery.Teaching | None = None

    def teach(
        self,
        pruned: nn.Module,
        number: int,
        phase: Asked,
        progress: loop.Progress,
        checkpoints: Checkpoints,
    ) -> list[float]:
        """Train in phase `number`; returns the loss of every step."""
        job, entry, options = self.job, recovery.entry(phase.module), self.job.settings.recovery
        if progress.done >= progress.total and (entry.folds or entry.predicts):
            raise CellError(f"selection left nothing of the budget for the phase '{phase.module}'")
        teaching = self._teaching(pruned, entry) if entry.teacher else None
        self._promote(entry, phase)
        seed = image_seed(job.cell.seed, number) if number else job.cell.seed
        with self.meter.clock():
            return loop.train(
                pruned,
                replace(self.data, objective=objective_of(job, self.student)),
                options,
                images=(progress.total - progress.done) * options.batch,
                seed=seed,
                muon_names=job.family.weights(pruned),
                masks=self.plan.masks,
                loss=recovery.recovery(phase.module).loss(teaching, **phase.parameters),
                progress=progress,
                meter=self.meter,
                checkpoints=checkpoints,
            )

    def _promote(self, entry: recovery.Entry, phase: Asked) -> None:
        """What the student predicts, and in how many steps, from this phase on."""
        if entry.predicts:
            self.student = self.student.model_copy(update={"prediction": entry.predicts})
        if entry.folds:
            left = self._steps() // phase.parameters["fold"]
            self.student = self.student.model_copy(update={"steps": left})

    def _steps(self) -> int:
        asked = round(self.job.settings.sampling.steps * self.plan.steps)
        return self.student.steps or asked

    def _teaching(self, pruned: nn.Module, entry: recovery.Entry) -> recovery.Teaching:
        """The dense model; where steps are folded once more, the student as it is by then.

        The student has been taught as few steps as it is now asked to do in fewer, the dense model
        never was.
        """
        if entry.folds and self.student.steps:
            teacher = unwatched(copy.deepcopy(pruned)).eval().requires_grad_(False)
            kept = dict.fromkeys(self.job.family.features(teacher))
            teacher = self.meter.watch(teacher, "teacher")
            return self._complete(recovery.Teaching(teacher, kept), self.student)
        if self._dense is None:
            found = _teaching(self.whole, self.plan, self.job.family, self.meter)
            self._dense = self._complete(found, Student())
        return self._dense

    def _complete(self, teaching: recovery.Teaching, student: Student) -> recovery.Teaching:
        """What is known of a teacher that is to be sampled as `student`, beside its features."""
        how, goal = self.job.settings.sampling, objective_of(self.job, student)
        steps = self._steps()
        options = samplers.checked(how.sampler, steps, how.options, goal.name, goal.train_steps)
        sampling = recovery.Sampling(how.sampler, steps, options, how.guidance)
        known = {"conditions": self.data.conditions, "objective": goal, "sampling": sampling}
        return replace(teaching, **known)


def _teaching(
    whole: nn.Module, plan: Plan, family: ModuleType, meter: BudgetMeter
) -> recovery.Teaching:
    # Before the teacher is frozen and metered: finding widths may trace the model, which needs
    # gradients and is no pass of the recovery.
    kept = surgery.kept_rows(whole, plan, family)
    return recovery.Teaching(meter.watch(whole.requires_grad_(False), "teacher"), kept)
