"""The images of a cell: image i depends on seed and i only."""

from pathlib import Path

import torch
from torch import Tensor

from prunebench.errors import UserError
from prunebench.records import artefacts
from prunebench.records.parts import Sampling
from prunebench.records.provenance import PACKAGE, code_hash
from prunebench.stages.job import Job
from prunebench.stages.shard import draw, drawn_from

IMAGES = "images.safetensors"


def sample(job: Job) -> None:
    """Draw the cell's images, or gather what its shards drew: the same file, byte by byte."""
    made_from, seconds = drawn_from(job), 0.0
    if job.paths.shards:  # wall_s is the compute, as if one job had drawn all
        drawn, report, seconds = _gathered(job, made_from)
    else:
        drawn, report = draw(job, range(job.track.settings.sampling.count))
    file = job.file(IMAGES)
    artefacts.write_tensors(file, drawn)
    job.finish([file], made_from, seconds, sampling=report, shards=job.track.shards)
    _forget_other_shards(job)


def _gathered(job: Job, made_from: dict) -> tuple[dict[str, Tensor], Sampling, float]:
    """As `draw`, out of the shards' files, and the seconds that drawing them took."""
    shards, own = job.paths.shards, (made_from, job.fingerprint, code_hash(PACKAGE))
    records = [job.read("shard", shard=index) for index in range(len(shards))]
    stale = [
        file
        for (file, _), record in zip(shards, records, strict=True)
        if (record.inputs, record.fingerprint, record.provenance.code) != own
    ]
    for file in stale:
        Path(file).unlink(missing_ok=True)
    if stale:
        raise UserError(
            f"{', '.join(stale)} was drawn from another checkpoint, track or code than there is "
            "now; it was removed, run the same command again"
        )
    parts = [artefacts.read_tensors(Path(images)) for _, images in shards]
    drawn = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return drawn, records[0].sampling, sum(record.wall_s for record in records)


def _forget_other_shards(job: Job) -> None:
    """Remove what a killed run with another number of shards left."""
    own = {Path(file).name for files in job.paths.shards for file in files}
    for file in job.record.parent.glob("shard*of*"):
        if file.name not in own:
            file.unlink(missing_ok=True)
