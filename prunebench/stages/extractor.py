"""The feature extractor, and the features of the reference images."""

import logging
from pathlib import Path

from torch import Tensor

from prunebench import assets
from prunebench.errors import UserError
from prunebench.evaluation import classifier, features
from prunebench.records import artefacts
from prunebench.records.parts import Extractor as Report
from prunebench.records.schema import FeatureExtractor
from prunebench.stages.inputs import check_data, data_set, dataset, located, shape
from prunebench.stages.job import Job

log = logging.getLogger(__name__)

FEATURES, CLASSIFIER = "reference.safetensors", "model.safetensors"


def extractor(job: Job) -> None:
    """Train the domain classifier, or take a published extractor; features of the reference set."""
    images, settings = dataset(job), job.track.settings.extractor
    _check_sizes(job, images)
    accuracy = None
    if settings.training:
        model = classifier.train_classifier(
            images.train_images, images.train_labels, **settings.training.model_dump(), log=log.info
        )
        accuracy = classifier.accuracy(model, images.reference_images, images.reference_labels)
        log.info("accuracy on the reference set: %.4f", accuracy)
        weights = job.file(CLASSIFIER)
        artefacts.write_tensors(weights, model.state_dict())
    else:
        weights = located(job, settings.asset)
    loaded = features.load_extractor(settings.name, weights)
    found = loaded.extract(images.reference_images, job.track.settings.evaluation.batch)
    compared = {name: found[name] for name in ("features", "spatial")}  # no metric reads logits
    if images.statistics:
        compared |= dict(zip(("mu", "sigma"), images.statistics, strict=True))
    artefacts.write_tensors(job.file(FEATURES), compared)
    report = Report(
        name=settings.name,
        sha256=artefacts.sha256(weights),
        dimensions=found["features"].shape[1],
        accuracy=accuracy,
        weights=str(weights),
    )
    own = [weights] if settings.training else []
    made_from = {**data_set(job), "weights": report.sha256}
    job.finish([job.file(FEATURES), *own], made_from, extractor=report)


def load(job: Job) -> tuple[features.Extractor, dict[str, Tensor], FeatureExtractor]:
    """The feature extractor, what it found in the reference images, and its record.

    Raises:
        UserError: its weights, or the data set, are no longer those that the reference features
            are of.
    """
    record = job.read("extractor")
    check_data(job, "extractor", record)
    used, weights = record.extractor, Path(record.extractor.weights)
    if not weights.exists() or artefacts.sha256(weights) != used.sha256:
        raise UserError(
            f"{weights} is not the feature extractor of {job.path('extractor')}, which expects "
            f"sha256 {used.sha256}; put that back, or delete the record and run again"
        )
    reference = artefacts.read_tensors(job.path("extractor").with_name(FEATURES))
    return features.load_extractor(used.name, weights), reference, record


def _check_sizes(job: Job, images: assets.Dataset) -> None:
    """An extractor sees images of other sizes differently: samples must have the references'."""
    side = job.track.settings.sampling.size or shape(job)[1]
    if (seen := images.reference_images[:1].shape[-1]) != side:
        raise UserError(
            f"sampling.size: samples would have {side} pixels a side, the references have {seen}"
        )
