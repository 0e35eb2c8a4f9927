"""What several stages work with: data, what images show, autoencoders and samplers."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from prunebench import assets
from prunebench.diffusion.objectives import Objective, objective
from prunebench.diffusion.sampling import Sampler
from prunebench.errors import UserError
from prunebench.models.conditions import CLASSES, Conditions
from prunebench.pruning.plan import Plan
from prunebench.records import sealed
from prunebench.records.parts import Identity, Student
from prunebench.records.schema import Assets, Record
from prunebench.stages.job import Job
from prunebench.tracks import plain
from prunebench.tracks.settings_benchmark import Sampling
from prunebench.training import latents, loop, parallel, prompts

if TYPE_CHECKING:
    from prunebench.diffusion.autoencoder import Autoencoder as Coder

DENSE = Student()  # as a dense model is, and one that no recovery changed so


def located(job: Job, name: str) -> Path:
    """The verified file or folder of an asset, the very one that the run began with.

    Raises:
        UserError: as `assets.locate`; or `assets.json` of the track has another hash of it.
    """
    place, record = assets.locate(name), job.path("assets")
    if record.exists():  # not where a stage is run by hand
        identity = Identity(stage="assets", track=job.track.name)
        began = sealed.read(record, Assets, identity, payload=False).assets.get(name, {})
        now = assets.hashes(assets.asset(name))
        changed = [file for file, value in began.items() if now.get(file) != value]
        if changed:
            raise UserError(
                f"asset {name}: {changed[0]} is another file than when the run began ({record} has "
                f"its sha256); put that back, or delete {record}, which computes anew what rests "
                "on it"
            )
    return place


def dataset(job: Job) -> assets.Dataset:
    given = job.track.settings.dataset
    if given.made_up:
        return assets.made_up(given.name, **given.made_up.model_dump(), flip=given.flip)
    for name in _data_assets(job):
        located(job, name)
    return assets.load_dataset(**given.model_dump(exclude={"made_up"}))


def _data_assets(job: Job) -> list[str]:
    """The data set and, where it is an asset of its own, the reference; none of made-up images."""
    given = job.track.settings.dataset
    if given.made_up:
        return []
    return [name for name in (given.name, given.reference) if name not in ("held_out", "train")]


def shape(job: Job) -> tuple[int, int, int]:
    """Channels, height and width of the data set's images."""
    return job.track.settings.dataset.entry.shape


def data_set(job: Job) -> dict[str, str]:
    """Hashes of the files of the data set and its reference, as a record's `inputs` name them."""
    hashes = [assets.hashes(assets.asset(name)) for name in _data_assets(job)]
    return {f"dataset/{file}": value for found in hashes for file, value in found.items()}


def check_data(job: Job, stage: str, record: Record, **changes: object) -> None:
    """Refuse a record that was made of another data set than there is now; `changes` as `read`."""
    used = {name for name in record.inputs if name.startswith("dataset/")}
    now = {name: value for name, value in data_set(job).items() if name in used} if used else {}
    sealed.check_made_from(job.path(stage, **changes), record, **now)


def trained_on(job: Job) -> dict[str, str]:
    """What `training_data` reads, as a record's `inputs` name it."""
    coders = job.settings.coders
    encoded = {kind: job.read("encode", coder=coder) for kind, coder in coders.items()}
    images = {} if "autoencoder" in encoded else data_set(job)
    return {**images, **sealed.made_from(**encoded)}


def objective_of(job: Job, student: Student = DENSE) -> Objective:
    """What the model's network predicts; after a recovery, what the student does."""
    asked = job.settings.objective.model_dump()
    return objective({**asked, **student.model_dump(include={"prediction"}, exclude_none=True)})


def training_data(job: Job) -> loop.Data:
    """What the model trains on: images, or latents that `encode` wrote, and what they show."""
    goal = objective_of(job)
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


def place(job: Job, coder: str) -> Path:
    """Folder of one of the track's autoencoders or text encoders."""
    _, entry = job.track.coder(coder)
    if entry.own:
        job.read("coder", coder=coder)
        return job.path("coder", coder=coder).parent
    return located(job, entry.asset) if entry.asset else Path(entry.folder)


def autoencoder(job: Job, name: str) -> "Coder":
    from prunebench.diffusion.autoencoder import Autoencoder as Coder  # slow to import

    _, entry = job.track.coder(name)
    return Coder(place(job, name), entry.scale, entry.batch, parallel.device(), entry.shift)


def decoder(job: Job, name: str) -> "Coder":
    """The autoencoder that decodes a model's latents, the one whose latents it was trained on.

    Raises:
        UserError: its files are no longer those that encoded the training images.
    """
    coder, record = autoencoder(job, name), job.path("encode", coder=name)
    encoded = job.read("encode", payload=False, coder=name)
    if coder.sha256() != encoded.weights.sha256:
        raise UserError(
            f"{coder.place} is not the autoencoder that {record} was made by; put that back, or "
            "delete the record and run again"
        )
    return coder


def decoded_by(job: Job, name: str) -> dict[str, str]:
    """The decoder, as a record's `inputs` name it: by what encoded the training images."""
    weights = job.read("encode", payload=False, coder=name).weights
    return {f"autoencoder/{file}": value for file, value in weights.sha256.items()}


def student_of(job: Job) -> Student:
    """How the cell's model is to be sampled, by the record of its recovery."""
    return job.read("recover").student if job.cell.recovery != "none" else DENSE


def sampler_for(
    job: Job,
    network: nn.Module,
    plan: Plan,
    way: Sampling | None = None,
    student: Student = DENSE,
) -> Sampler:
    """The sampler of the job, or of another sampling, over a network of the model's kind.

    Args:
        student: what a recovery changed of that.
    """
    settings, common, coder = job.settings, job.track.settings.sampling, None
    asked = conditions(job, training=False)
    drawn = common.model_dump(include={"lanes", "size"}, exclude_none=True)
    images = job.track.settings.dataset.entry
    if settings.autoencoder:
        coder = decoder(job, settings.autoencoder)
    given = {**plain(way or job.sampling), **drawn}
    return Sampler(
        network,
        objective_of(job, student),
        coder.latent_shape(images.shape) if coder else images.shape,
        len(asked) if isinstance(asked, prompts.Prompts) else images.classes,
        {**given, "steps": student.steps or given["steps"]},
        1.0 if student.steps else plan.steps,
        coder.decode if coder else None,
        asked,
    )
