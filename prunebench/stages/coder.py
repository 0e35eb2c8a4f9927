"""Autoencoders and text encoders of a track's own: latent and text models without downloads."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunebench.diffusion.objectives import objective
from prunebench.diffusion.sampling import to_uint8
from prunebench.errors import UserError
from prunebench.evaluation import cost
from prunebench.records import artefacts
from prunebench.stages.fitting import fit
from prunebench.stages.inputs import data_set, dataset, shape
from prunebench.stages.job import Job
from prunebench.tracks.settings_benchmark import Autoencoder as Encodes
from prunebench.tracks.settings_benchmark import OwnAutoencoder
from prunebench.tracks.settings_benchmark import TextEncoder as Reads
from prunebench.training import loop, parallel
from prunebench.training.budget import unspent

if TYPE_CHECKING:
    from prunebench.diffusion.autoencoder import Autoencoder

log = logging.getLogger(__name__)

STANDARDISED = 10_000  # images that the spread of latents is taken over


def coder(job: Job) -> None:
    """Train the autoencoder, or make the text encoder, that the track asks for."""
    name = job.names["coder"]
    kind, entry = job.track.coder(name)
    if entry.own is None:
        raise UserError(f"{kind}s.{name} is taken as it is: it has no key 'own'")
    make = {"autoencoder": _autoencoder, "text_encoder": _text_encoder}[kind]
    files, report = make(job, entry, f"{kind}s.{name}.own")
    job.finish(files, data_set(job), kind=kind, **report)


def _text_encoder(job: Job, entry: Reads, key: str) -> tuple[list[Path], dict]:
    from prunebench.diffusion import word_encoder  # slow to import

    images, own = dataset(job), entry.own
    texts = [*images.train_captions, *images.reference_captions]
    longest = max(len(text.split()) for text in texts) + 2
    if longest > own.tokens:
        raise UserError(f"{key}.tokens: {own.tokens}, but a caption takes {longest}")
    files, count = word_encoder.write(job.record.parent, texts, **own.model_dump())
    return files, {"parameters": count, "budget": unspent()}


def _autoencoder(job: Job, entry: Encodes, key: str) -> tuple[list[Path], dict]:
    from diffusers import AutoencoderKL

    from prunebench.diffusion.autoencoder import WEIGHTS, Autoencoder
    from prunebench.training.autoencoding import Reconstruction, reconstruction_loss, standardise

    images, own, folder = dataset(job), entry.own, job.record.parent
    config = _config(own, shape(job)[0])
    torch.manual_seed(own.seed)
    network = Reconstruction(AutoencoderKL.from_config(config), own.kl).to(parallel.device())
    # Only clean images are looked at, so that the objective does not matter.
    clean = objective({"name": "flow", "times": "uniform", "time_scale": 1.0})
    data = loop.Data(images.train_images, images.train_labels, clean, images.flip)
    report = fit(job, network, data, own, reconstruction_loss, key)
    standardise(network.coder, images.train_images[:STANDARDISED], entry.batch)
    artefacts.write_json(folder / "config.json", config)
    artefacts.write_tensors(folder / WEIGHTS, network.coder.state_dict())
    made = Autoencoder(folder, 1.0, entry.batch, parallel.device())
    report |= {
        "parameters": cost.count_parameters(network),
        "psnr": _psnr(made, images.reference_images),
    }
    log.info("reference images come back with a PSNR of %.2f dB", report["psnr"])
    return [folder / "config.json", folder / WEIGHTS], report


def _config(own: OwnAutoencoder, channels: int) -> dict:
    """What diffusers' AutoencoderKL is called with."""
    levels = len(own.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(own.channels),
        "layers_per_block": own.layers,
        "latent_channels": own.latent_channels,
        "norm_num_groups": own.groups,
    }


def _psnr(coder: "Autoencoder", images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit images after encoding and decoding."""
    total = 0.0
    for start in range(0, len(images), coder.batch):
        part = images[start : start + coder.batch]
        latents = coder.moments(part)[:, 0].to(coder.device)
        again = to_uint8(coder.decode(latents)).cpu()
        total += (again.double() - part.double()).square().mean((1, 2, 3)).sum().item()
    return 20 * math.log10(255) - 10 * math.log10(max(total / len(images), 1e-12))
