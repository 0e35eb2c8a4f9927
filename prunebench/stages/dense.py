"""Dense models: trained from scratch, trained further from a checkpoint, or taken as they are."""

import logging
from pathlib import Path

import torch
from torch import nn

from prunebench.errors import CellError, UserError
from prunebench.evaluation import cost
from prunebench.models import official
from prunebench.pruning import targets
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts
from prunebench.records.parts import Weights
from prunebench.stages.inputs import located, trained_on, training_data
from prunebench.stages.job import Job
from prunebench.stages.work import checkpoints_of, save, training_report
from prunebench.tracks import plain
from prunebench.training import loop, parallel
from prunebench.training.budget import BudgetMeter, unspent
from prunebench.training.checkpoints import Checkpoints

log = logging.getLogger(__name__)


def dense(job: Job) -> None:
    """Train the dense model from scratch or from the track's checkpoint, or take that as it is."""
    torch.manual_seed(job.names["dense_seed"])
    network, source = _begun(job)
    network = network.to(parallel.device())
    _check_sparsities(job, network)
    trained = _trained(job, network, source) if job.settings.training else _UNTRAINED
    if parallel.rank():
        return  # the first process writes
    made_from = trained_on(job) if job.settings.training else {}
    made_from |= {"weights": source.sha256} if source else {}
    job.finish(save(job, network, Plan()), made_from, **trained, weights=source)


_UNTRAINED = {"budget": unspent(), "loss": None}


def _trained(job: Job, network: nn.Module, source: Weights | None) -> dict:
    """Train the network in place; returns what its record says of it."""
    settings, data = job.settings.training, training_data(job)
    meter, progress = BudgetMeter(), loop.Progress(settings.images // settings.batch)
    inputs = job.layout.encoded(job.settings) + ((source.place,) if source else ())
    checkpoints = checkpoints_of(job, *inputs)
    try:
        with meter.clock():
            losses = loop.train(
                meter.watch(network),
                data,
                settings,
                images=settings.images,
                seed=job.names["dense_seed"],
                muon_names=job.family.weights(network),
                progress=progress,
                meter=meter,
                checkpoints=checkpoints,
            )
    except CellError as error:
        name = job.model
        raise UserError(f"dense model '{name}': {error}; see models.{name}.training") from error
    return _report(job, losses, meter, progress, checkpoints)


def _report(
    job: Job,
    losses: list[float],
    meter: BudgetMeter,
    progress: loop.Progress,
    checkpoints: Checkpoints,
) -> dict:
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "earlier_s": checkpoints.earlier_s,
        "budget": meter.report(),
        "training": training_report(job, "training", progress, checkpoints),
        "loss": sum(tail) / len(tail),
    }


def _begun(job: Job) -> tuple[nn.Module, Weights | None]:
    """The network before any training, and where its weights are from: None, initialised."""
    settings = job.settings
    weights, config = settings.weights, settings.config
    if weights is None:
        return _built(job), None
    place = located(job, weights.asset) if weights.asset else Path(weights.file)
    file, classes = official.denoiser_of(place), weights.classes
    sha256 = artefacts.sha256(file)
    released = {**config, "classes": classes} if classes else config
    dtype = getattr(torch, weights.dtype)
    network = official.load(settings.family, released, file, weights.layout, dtype)
    log.info("%s: %d parameters from %s", job.model, cost.count_parameters(network), file)
    if classes:
        network = official.with_classes(network, settings.family, config)
    if artefacts.sha256(file) != sha256:
        raise UserError(f"{file} was changed while it was read; run the same command again")
    return network, Weights(name=file.name, sha256=sha256, place=str(file), given=plain(weights))


def _built(job: Job) -> nn.Module:
    try:
        return job.family.build(job.settings.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"models.{job.model}.config: {error}") from error


def _check_sparsities(job: Job, network: nn.Module) -> None:
    """Refuse targets that no plan can reach, before anything is trained for them."""
    wanted, methods = max(job.track.settings.sparsities), job.track.methods.values()
    for kind in ("layers", "widths", "weights"):
        most = targets.most(network, job.family, kind)
        if wanted > most and any(m.kind == kind and not m.sparsities for m in methods):
            raise UserError(
                f"sparsities: {wanted} is impossible for the {kind} of model '{job.model}'; "
                f"they hold {most:.3f} of its parameters"
            )
