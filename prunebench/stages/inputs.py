"""What several stages work with: data, what images show, autoencoders and samplers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from prunebench import assets
from prunebench.diffusion.objectives import objective
from prunebench.diffusion.sampling import Sampler
from prunebench.models.conditions import CLASSES, Conditions
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts
from prunebench.stages.job import Job
from prunebench.training import latents, loop, parallel, prompts

if TYPE_CHECKING:
    from prunebench.diffusion.autoencoder import Autoencoder


def dataset(job: Job) -> assets.Dataset:
    return assets.load_dataset(**job.content["dataset"])


def shape(job: Job) -> tuple[int, int, int]:
    """Channels, height and width of the data set's images."""
    return assets.data_set(job.content["dataset"]["name"]).shape


def training_data(job: Job) -> loop.Data:
    """What the model trains on: images, or latents that `encode` wrote, and what they show."""
    goal = objective(job.settings["objective"])
    shown = conditions(job, training=True)
    if name := job.settings.get("autoencoder"):
        record, (_, entry) = job.layout.encode(name), job.track.coder(name)
        artefacts.read_record(record)
        encoded = latents.Latents(Path(record).parent, entry["scale"], entry.get("shift", 0.0))
        return latents.LatentData(encoded, encoded.labels, goal, conditions=shown)
    images = dataset(job)
    return loop.Data(images.train_images, images.train_labels, goal, images.flip, shown)


def conditions(job: Job, training: bool) -> Conditions:
    """What the model takes for labels: these, or prompts that `encode` wrote."""
    name = job.settings.get("text_encoder")
    if name is None:
        return CLASSES
    record = job.layout.encode(name)
    artefacts.read_record(record)
    return prompts.Prompts(Path(record).parent, training)


def place(entry: Mapping) -> Path:
    """Folder of an autoencoder or of text encoders."""
    return assets.locate(entry["asset"]) if "asset" in entry else Path(entry["folder"])


def autoencoder(entry: Mapping) -> "Autoencoder":
    from prunebench.diffusion.autoencoder import Autoencoder  # slow to import

    shift = entry.get("shift", 0.0)
    return Autoencoder(place(entry), entry["scale"], entry["batch"], parallel.device(), shift)


def sampler_for(job: Job, network: nn.Module, plan: Plan) -> Sampler:
    """The sampler of the model's settings over a network of its kind."""
    settings, common, coder = job.settings, job.content["sampling"], None
    asked = conditions(job, training=False)
    images = assets.data_set(job.content["dataset"]["name"])
    if "autoencoder" in settings:
        coder = autoencoder(job.track.coder(settings["autoencoder"])[1])
    return Sampler(
        network,
        objective(settings["objective"]),
        coder.latent_shape(images.shape) if coder else images.shape,
        len(asked) if isinstance(asked, prompts.Prompts) else images.classes,
        {**settings["sampling"], **{k: common[k] for k in ("lanes", "size") if k in common}},
        plan.steps,
        coder.decode if coder else None,
        asked,
    )
