"""Training images as latents, or captions as embeddings: computed once for all cells."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prunebench.errors import UserError
from prunebench.records.parts import Weights
from prunebench.records.provenance import PACKAGE, code_hash
from prunebench.stages.inputs import autoencoder, data_set, dataset, place, shape
from prunebench.stages.job import Job
from prunebench.training import latents, parallel, prompts

if TYPE_CHECKING:
    from prunebench.diffusion.autoencoder import Autoencoder
    from prunebench.diffusion.text_encoder import TextEncoder


def encode(job: Job) -> None:
    """Encode the training set once; an interrupted start goes on with the part it was at."""
    kind, entry = job.track.coder(job.names["coder"])
    index, count, coder = {"autoencoder": _latents, "text_encoder": _prompts}[kind](job, entry)
    weights = Weights(name=coder.place.name, sha256=coder.sha256(), place=str(coder.place))
    job.finish([index], data_set(job), kind=kind, weights=weights, count=count)


def _latents(job: Job, entry: Mapping) -> tuple[Path, int, "Autoencoder"]:
    images, coder = dataset(job), autoencoder(entry)
    data, identity = (images.train_images, images.train_labels), _identity(job, coder.sha256())
    index = latents.encode(job.record.parent, *data, coder, images.flip, identity)
    return index, len(images.train_labels), coder


def _prompts(job: Job, entry: Mapping) -> tuple[Path, int, "TextEncoder"]:
    from prunebench.diffusion.text_encoder import TextEncoder  # slow to import

    images = dataset(job)
    if not images.reference_captions:
        raise UserError(f"dataset.name: {job.track.settings.dataset.name} has no captions")
    side, device = shape(job)[1], parallel.device()
    coder = TextEncoder(place(entry), entry.batch, side, entry.tokens, device)
    told = images.train_captions, images.reference_captions
    index = prompts.encode(job.record.parent, *told, coder, _identity(job, coder.sha256()))
    return index, sum(map(len, told)) + 1, coder


def _identity(job: Job, weights: object) -> dict:
    """What encoded data depend on."""
    return {
        "code": code_hash(PACKAGE),
        "torch": torch.__version__,
        "track": job.track.fingerprint("encode", **job.names),
        "weights": weights,
    }
