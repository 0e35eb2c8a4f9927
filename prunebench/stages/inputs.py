"""What several stages work with: data, what images show, autoencoders and samplers."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from prunebench import assets
from prunebench.diffusion.objectives import objective
from prunebench.diffusion.sampling import Sampler
from prunebench.models.conditions import CLASSES, Conditions
from prunebench.pruning.plan import Plan
from prunebench.records import sealed
from prunebench.stages.job import Job
from prunebench.tracks import plain
from prunebench.tracks.settings_benchmark import Autoencoder, Sampling, TextEncoder
from prunebench.training import latents, loop, parallel, prompts

if TYPE_CHECKING:
    from prunebench.diffusion.autoencoder import Autoencoder as Coder


def dataset(job: Job) -> assets.Dataset:
    return assets.load_dataset(**job.track.settings.dataset.model_dump())


def shape(job: Job) -> tuple[int, int, int]:
    """Channels, height and width of the data set's images."""
    return assets.data_set(job.track.settings.dataset.name).shape


def data_set(job: Job) -> dict[str, str]:
    """Hashes of the files of the data set and its reference, as a record's `inputs` name them."""
    given = job.track.settings.dataset
    names = [given.name, given.reference]
    wanted = [assets.asset(name) for name in names if name not in ("held_out", "train")]
    hashes = [assets.hashes(one) for one in wanted]
    return {f"dataset/{file}": value for found in hashes for file, value in found.items()}


def trained_on(job: Job) -> dict[str, str]:
    """What `training_data` reads, as a record's `inputs` name it."""
    coders = job.settings.coders
    encoded = {kind: job.read("encode", coder=coder) for kind, coder in coders.items()}
    images = {} if "autoencoder" in encoded else data_set(job)
    return {**images, **sealed.made_from(**encoded)}


def training_data(job: Job) -> loop.Data:
    """What the model trains on: images, or latents that `encode` wrote, and what they show."""
    goal = objective(job.settings.objective.model_dump())
    shown = conditions(job, training=True)
    if name := job.settings.autoencoder:
        job.read("encode", coder=name)
        (_, entry), folder = job.track.coder(name), job.path("encode", coder=name).parent
        encoded = latents.Latents(folder, entry.scale, entry.shift)
        return latents.LatentData(encoded, encoded.labels, goal, conditions=shown)
    images = dataset(job)
    return loop.Data(images.train_images, images.train_labels, goal, images.flip, shown)


def conditions(job: Job, training: bool) -> Conditions:
    """What the model takes for labels: these, or prompts that `encode` wrote."""
    name = job.settings.text_encoder
    if name is None:
        return CLASSES
    job.read("encode", coder=name)
    return prompts.Prompts(job.path("encode", coder=name).parent, training)


def place(entry: Autoencoder | TextEncoder) -> Path:
    """Folder of an autoencoder or of text encoders."""
    return assets.locate(entry.asset) if entry.asset else Path(entry.folder)


def autoencoder(entry: Autoencoder) -> "Coder":
    from prunebench.diffusion.autoencoder import Autoencoder as Coder  # slow to import

    return Coder(place(entry), entry.scale, entry.batch, parallel.device(), entry.shift)


def sampler_for(job: Job, network: nn.Module, plan: Plan, way: Sampling | None = None) -> Sampler:
    """The sampler of the job, or of another sampling, over a network of the model's kind."""
    settings, common, coder = job.settings, job.track.settings.sampling, None
    asked = conditions(job, training=False)
    drawn = common.model_dump(include={"lanes", "size"}, exclude_none=True)
    images = assets.data_set(job.track.settings.dataset.name)
    if settings.autoencoder:
        coder = autoencoder(job.track.coder(settings.autoencoder)[1])
    return Sampler(
        network,
        objective(settings.objective.model_dump()),
        coder.latent_shape(images.shape) if coder else images.shape,
        len(asked) if isinstance(asked, prompts.Prompts) else images.classes,
        {**plain(way or job.sampling), **drawn},
        plan.steps,
        coder.decode if coder else None,
        asked,
    )
