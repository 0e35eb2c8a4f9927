"""Training images as latents, or captions as embeddings: computed once for all cells."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prunebench.errors import UserError
from prunebench.records import sealed
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
    name = job.names["coder"]
    kind, entry = job.track.coder(name)
    coder = {"autoencoder": autoencoder, "text_encoder": _text_encoder}[kind](job, name)
    before = coder.sha256()
    identity = _identity(job, before)
    index, count = {"autoencoder": _latents, "text_encoder": _prompts}[kind](job, coder, identity)
    if coder.sha256() != before:
        raise UserError(f"{coder.place} was changed while it was read; run the same command again")
    weights = Weights(name=coder.place.name, sha256=before, place=str(coder.place))
    own = sealed.made_from(coder=job.read("coder")) if entry.own else {}
    job.finish([index], {**data_set(job), **own}, kind=kind, weights=weights, count=count)


def _latents(job: Job, coder: "Autoencoder", identity: dict) -> tuple[Path, int]:
    images = dataset(job)
    data = images.train_images, images.train_labels
    index = latents.encode(job.record.parent, *data, coder, images.flip, identity)
    return index, len(images.train_labels)


def _text_encoder(job: Job, name: str) -> "TextEncoder":
    from prunebench.diffusion.text_encoder import TextEncoder  # slow to import

    _, entry = job.track.coder(name)
    side, device = shape(job)[1], parallel.device()
    return TextEncoder(place(job, name), entry.batch, side, entry.tokens, device)


def _prompts(job: Job, coder: "TextEncoder", identity: dict) -> tuple[Path, int]:
    images = dataset(job)
    if not images.reference_captions:
        raise UserError(f"dataset.name: {job.track.settings.dataset.name} has no captions")
    told = images.train_captions, images.reference_captions
    index = prompts.encode(job.record.parent, *told, coder, identity)
    return index, sum(map(len, told)) + 1


def _identity(job: Job, weights: object) -> dict:
    """What encoded data depend on."""
    return {
        "code": code_hash(PACKAGE),
        "torch": torch.__version__,
        "track": job.track.fingerprint("encode", **job.names),
        "weights": weights,
    }
