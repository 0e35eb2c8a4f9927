"""A track in small: the same cells, rules and boards with tiny networks and made-up images.

What fails at the end of a full-size track, after all its GPU hours, fails here within minutes on a
CPU: every rule is walked with the track's own methods, rows, seeds, divisions, samplers, classes
and kinds of networks. Its numbers mean nothing.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from prunebench import models
from prunebench.errors import UserError
from prunebench.records.artefacts import write_atomically
from prunebench.tracks.benchmark import Track
from prunebench.tracks.settings_benchmark import Model

SUFFIX = "_rehearsal"
SIDE, LATENT_SIDE, LATENT_CHANNELS = 16, 8, 4
IMAGES, LANES, BATCH = 40, 20, 8
TOKENS, TEXT = 8, 16  # words of a caption at most, and the width of what a network reads
STEPS, LEAST_STEPS = 4, 3  # of a sampler, also where fewer_steps leaves fewest
TRAINING = {"batch": BATCH, "learning_rate": 1.0e-3}


def write(track: Track, folder: Path) -> Path:
    """Write the track in small, `<name>_rehearsal.yaml`, into a folder; returns the file."""
    if track.kind != "benchmark":
        raise UserError(f"track {track.name} has nothing to rehearse: it is of kind {track.kind}")
    file = folder / f"{track.name}{SUFFIX}.yaml"
    text = yaml.safe_dump(in_small(track), sort_keys=False)
    if not file.exists() or file.read_text() != text:
        write_atomically(file, lambda path: path.write_text(text))
    return file


def in_small(track: Track) -> dict:
    """The content of the track's rehearsal."""
    content, settings = dict(track.in_force), track.settings
    content.pop("needs", None)
    budgets = {name: 4 * BATCH * (place + 1) for place, name in enumerate(settings.budgets)}
    return {
        **content,
        "title": f"Rehearsal of {track.name} (numbers mean nothing)",
        "dataset": _dataset(track),
        "extractor": {
            "name": "domain",
            "training": {"seed": 0, "epochs": 1, "batch": 20, "learning_rate": 1.0e-2},
        },
        "autoencoders": {name: _autoencoder() for name in settings.autoencoders},
        "text_encoders": {name: _text_encoder(track, name) for name in settings.text_encoders},
        "models": {name: _model(track, model) for name, model in settings.models.items()},
        "methods": {**content["methods"], "parameters": _parameters(track)},
        "budgets": budgets,
        "sampling": {"count": IMAGES, "lanes": LANES, "batch": IMAGES,
                     "shards": min(2, settings.sampling.shards)},
        "latency": {"batch": 4, "rounds": 1, "warmup": 0, "images": 1, "wait": 0.0},
        "evaluation": {"batch": 50, "lpips": "domain"},
        **({"oracle": {**content["oracle"], "masks": 2}} if settings.oracle else {}),
    }  # fmt: skip


def _dataset(track: Track) -> dict:
    given = track.settings.dataset
    made_up = {"side": SIDE, "train": 60, "reference": IMAGES}
    return {"name": given.name, "flip": given.flip, "made_up": made_up}


def _autoencoder() -> dict:
    own = {"seed": 0, "images": 2 * BATCH, **TRAINING, "channels": [8, 16], "groups": 4,
           "latent_channels": LATENT_CHANNELS}  # fmt: skip
    return {"own": own, "scale": 1.0, "batch": LANES}


def _text_encoder(track: Track, name: str) -> dict:
    """Random encoders of the kind that the models which read them expect."""
    pipeline = "StableDiffusionPipeline"
    for model in track.settings.models.values():
        if model.text_encoder == name and model.family == "flux":
            pipeline = "FluxPipeline"
        elif model.text_encoder == name and model.config.get("addition_embed_type"):
            pipeline = "StableDiffusionXLPipeline"
    own = {"seed": 0, "pipeline": pipeline, "width": TEXT, "heads": 2, "tokens": TOKENS}
    return {"own": own, "batch": 64, "tokens": TOKENS}


def _model(track: Track, model: Model) -> dict:
    """A small model of the same family, trained from scratch, sampled with the same sampler."""
    channels = track.settings.dataset.entry.shape[0]
    latent = (LATENT_CHANNELS, LATENT_SIDE) if model.autoencoder else (channels, SIDE)
    config = models.config(model.family)(**model.config).small(*latent, TEXT)
    own = model.model_dump(mode="json", exclude_defaults=True)
    trained = own.pop("training", {})
    for key in ("weights", "reference"):
        own.pop(key, None)
    recovery = {key: value for key, value in own["recovery"].items() if key not in TRAINING}
    steps = max(STEPS, math.ceil(LEAST_STEPS / (1 - max(track.settings.fewer_steps))))
    return {
        **own,
        "config": config,
        "training": {**trained, **TRAINING, "images": 2 * BATCH},
        "recovery": {**recovery, **TRAINING},
        "sampling": {**own["sampling"], "steps": min(own["sampling"]["steps"], steps)},
    }


def _parameters(track: Track) -> Mapping[str, Mapping]:
    """Each method's quick parameters, as `prunebench check` calls it."""
    return {name: dict(method.check) for name, method in track.methods.items() if method.check}
