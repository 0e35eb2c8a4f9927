"""The feature extractor, and the features of the reference images."""

import logging

from prunebench import assets
from prunebench.errors import UserError
from prunebench.evaluation import classifier, features
from prunebench.records import artefacts
from prunebench.stages.inputs import dataset, shape
from prunebench.stages.job import Job

log = logging.getLogger(__name__)

FEATURES, CLASSIFIER = "reference.safetensors", "model.safetensors"


def extractor(job: Job) -> None:
    """Train the domain classifier, or take a published extractor; features of the reference set."""
    images, settings = dataset(job), job.content["extractor"]
    _check_sizes(job, images)
    report = {"name": settings["name"]}
    if "training" in settings:
        model = classifier.train_classifier(
            images.train_images, images.train_labels, **settings["training"], log=log.info
        )
        report["accuracy"] = classifier.accuracy(
            model, images.reference_images, images.reference_labels
        )
        log.info("accuracy on the reference set: %.4f", report["accuracy"])
        weights = job.file(CLASSIFIER)
        artefacts.write_tensors(weights, model.state_dict())
    else:
        weights = assets.locate(settings["asset"])
    loaded = features.load_extractor(settings["name"], weights)
    found = loaded.extract(images.reference_images, job.content["evaluation"]["batch"])
    compared = {name: found[name] for name in ("features", "spatial")}  # no metric reads logits
    if images.statistics:
        compared |= dict(zip(("mu", "sigma"), images.statistics, strict=True))
    artefacts.write_tensors(job.file(FEATURES), compared)
    report |= {"weights": str(weights), "sha256": artefacts.sha256(weights)}
    own = [weights] if "training" in settings else []
    job.finish([job.file(FEATURES), *own], extractor=report)


def _check_sizes(job: Job, images: assets.Dataset) -> None:
    """An extractor sees images of other sizes differently: samples must have the references'."""
    side = job.content["sampling"].get("size", shape(job)[1])
    if (seen := images.reference_images[:1].shape[-1]) != side:
        raise UserError(
            f"sampling.size: samples would have {side} pixels a side, the references have {seen}"
        )
