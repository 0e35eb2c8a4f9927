"""A part of a cell's images, and how images are drawn in general."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from prunebench.diffusion.sampling import shard_range
from prunebench.models import precision
from prunebench.pruning import surgery
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Sampling
from prunebench.stages.inputs import decoded_by, sampler_for, student_of
from prunebench.stages.job import Job
from prunebench.tracks.layout import images_of
from prunebench.training import parallel

log = logging.getLogger(__name__)


def shard(job: Job) -> None:
    """Draw one shard of the cell's images, which `sample` gathers."""
    index, settings = job.names["shard"], job.track.settings.sampling
    made_from = drawn_from(job)
    indices = shard_range(index, job.track.shards, settings.count, settings.lanes)
    drawn, report = draw(job, indices)
    images = Path(images_of(str(job.record)))
    artefacts.write_tensors(images, drawn)
    job.finish([images], made_from, sampling=report)


def draw(job: Job, indices: range) -> tuple[dict[str, Tensor], Sampling]:
    """The cell's images of some indices with their labels, and how they were drawn."""
    settings = job.track.settings.sampling
    network, plan = surgery.load(Path(job.paths.checkpoint).parent)
    network, arithmetic = precision.converted(network.to(parallel.device()), job.cell.precision)
    sampler = sampler_for(job, network, plan, student=student_of(job))
    batch, images = job.names.get("batch") or settings.batch, []
    for part in sampler.images(job.cell.seed, indices.start, indices.stop, batch):
        images.append(part)
        log.info("%d of %d images", sum(map(len, images)), len(indices))
    options = {k: v for k, v in sampler.settings.items() if k not in Sampling.model_fields}
    report = Sampling(
        sampler=sampler.settings["sampler"],
        steps=sampler.steps,
        lanes=sampler.settings["lanes"],
        count=settings.count,
        options=options,
        arithmetic=arithmetic,
    )
    return {"images": torch.cat(images), "labels": sampler.labels(indices)}, report


def drawn_from(job: Job) -> dict[str, str]:
    """The checkpoint, decoder and prompts that images are made from, as `inputs` name them."""
    stage = "select" if job.cell.recovery == "none" else "recover"
    made_from = {stage: job.read(stage)}
    if decoder := job.settings.autoencoder:
        made_from |= decoded_by(job, decoder)
    if reader := job.settings.text_encoder:
        made_from["prompts"] = job.read("encode", coder=reader)
    return sealed.made_from(**made_from)
