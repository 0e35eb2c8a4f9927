"""Training images as latents, or captions as embeddings: computed once for all cells."""

from collections.abc import Mapping
from pathlib import Path

import torch

from prunebench.errors import UserError
from prunebench.records.provenance import PACKAGE, code_hash
from prunebench.stages.inputs import autoencoder, dataset, place, shape
from prunebench.stages.job import Job
from prunebench.training import latents, parallel, prompts


def encode(job: Job) -> None:
    """Encode the training set once; an interrupted start goes on with the part it was at."""
    kind, entry = job.track.coder(job.names["coder"])
    index, report = {"autoencoder": _latents, "text_encoder": _prompts}[kind](job, entry)
    job.finish([index], **{kind: report})


def _latents(job: Job, entry: Mapping) -> tuple[Path, dict]:
    images, coder = dataset(job), autoencoder(entry)
    weights, data = coder.sha256(), (images.train_images, images.train_labels)
    identity = _identity(job, weights)
    index = latents.encode(job.record.parent, *data, coder, images.flip, identity)
    return index, {"place": str(coder.place), "sha256": weights, "images": len(images.train_labels)}


def _prompts(job: Job, entry: Mapping) -> tuple[Path, dict]:
    from prunebench.diffusion.text_encoder import FLUX_TOKENS, TextEncoder  # slow to import

    images = dataset(job)
    if not images.reference_captions:
        raise UserError(f"dataset.name: {job.content['dataset']['name']} has no captions")
    tokens, device = entry.get("tokens", FLUX_TOKENS), parallel.device()
    coder = TextEncoder(place(entry), entry["batch"], shape(job)[1], tokens, device)
    weights, told = coder.sha256(), (images.train_captions, images.reference_captions)
    index = prompts.encode(job.record.parent, *told, coder, _identity(job, weights))
    count = sum(map(len, told)) + 1
    return index, {"place": str(coder.place), "sha256": weights, "prompts": count}


def _identity(job: Job, weights: object) -> dict:
    """What encoded data depend on."""
    return {
        "code": code_hash(PACKAGE),
        "torch": torch.__version__,
        "track": job.track.fingerprint("encode", **job.names),
        "weights": weights,
    }
