"""A part of a cell's images, and how images are drawn in general."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from prunebench.diffusion.sampling import shard_range
from prunebench.pruning import surgery
from prunebench.records import artefacts
from prunebench.records.provenance import PACKAGE, code_hash
from prunebench.stages.inputs import sampler_for
from prunebench.stages.job import Job, upstream
from prunebench.tracks.layout import images_of
from prunebench.training import parallel

log = logging.getLogger(__name__)


def shard(job: Job) -> None:
    """Draw one shard of the cell's images, which `sample` gathers."""
    index, settings = job.names["shard"], job.content["sampling"]
    came_from = origin(job, upstream(job.paths.checkpoint))
    indices = shard_range(index, job.track.shards, settings["count"], settings["lanes"])
    drawn, report = draw(job, indices)
    images = Path(images_of(str(job.record)))
    artefacts.write_tensors(images, drawn)
    job.finish([images], sampling=report, origin=came_from)


def draw(job: Job, indices: range) -> tuple[dict[str, Tensor], dict]:
    """The cell's images of some indices with their labels, and how they were drawn."""
    settings = job.content["sampling"]
    network, plan = surgery.load(Path(job.paths.checkpoint).parent)
    sampler = sampler_for(job, network.to(parallel.device()), plan)
    batch, images = job.names.get("batch") or settings["batch"], []
    for part in sampler.images(job.cell.seed, indices.start, indices.stop, batch):
        images.append(part)
        log.info("%d of %d images", sum(map(len, images)), len(indices))
    report = {**sampler.settings, "steps": sampler.steps, "count": settings["count"]}
    return {"images": torch.cat(images), "labels": sampler.labels(indices)}, report


def origin(job: Job, checkpoint: dict) -> dict:
    """What images depend on besides their indices; shards of unequal origin are not gathered.

    Args:
        checkpoint: record of the network that draws them.
    """
    settings = job.track.fingerprint("sample", **job.names)
    found = {"checkpoint": checkpoint["files"], "settings": settings, "code": code_hash(PACKAGE)}
    if reader := job.settings.get("text_encoder"):
        found["prompts"] = artefacts.read_record(job.layout.encode(reader))["files"]
    return found
