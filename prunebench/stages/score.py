"""The stages that judge images: the extractor of features, and the score of a cell.

Apart from the other stages, because what they import takes as long as all the rest.
"""

import logging
import time
from pathlib import Path

from torch import Tensor

from prunebench import assets
from prunebench.errors import UserError
from prunebench.evaluation import classifier, consistency, features, quality
from prunebench.evaluation.clip import clip_score
from prunebench.evaluation.grid import write_grid
from prunebench.pruning import surgery
from prunebench.records import artefacts
from prunebench.stages.common import IMAGES, dataset, finish, labels, shared_settings, upstream
from prunebench.tracks import Cell, Layout, Paths, Track, as_dict
from prunebench.training import parallel
from prunebench.training.budget import unspent

log = logging.getLogger(__name__)

FEATURES, CLASSIFIER = "reference.safetensors", "model.safetensors"
CLIP = "model.safetensors"  # of evaluation.clip


def extractor(track: Track, layout: Layout) -> None:
    """Train the domain classifier, or take a published extractor; features of the reference set."""
    start, images = time.perf_counter(), dataset(track)
    _check_sizes(track, images)
    settings = track.content["extractor"]
    folder = Path(layout.extractor).parent
    report = {"name": settings["name"]}
    if "training" in settings:
        model = classifier.train_classifier(
            images.train_images, images.train_labels, **settings["training"], log=log.info
        )
        report["accuracy"] = classifier.accuracy(
            model, images.reference_images, images.reference_labels
        )
        log.info("accuracy on the reference set: %.4f", report["accuracy"])
        weights = folder / CLASSIFIER
        artefacts.write_tensors(weights, model.state_dict())
    else:
        weights = assets.locate(settings["asset"])
    judge = features.load_extractor(settings["name"], weights)
    found = judge.extract(images.reference_images, track.content["evaluation"]["batch"])
    compared = {name: found[name] for name in ("features", "spatial")}  # no logits: see `quality`
    if images.statistics:
        compared |= dict(zip(("mu", "sigma"), images.statistics, strict=True))
    artefacts.write_tensors(folder / FEATURES, compared)
    report |= {"weights": str(weights), "sha256": artefacts.sha256(weights)}
    payload = [folder / FEATURES, *([weights] if weights.parent == folder else [])]
    finish(layout.extractor, track, start, payload, extractor=report)


def _check_sizes(track: Track, images: assets.Dataset) -> None:
    """A judge sees images of other sizes differently: samples must have the references'."""
    own = assets.data_set(track.content["dataset"]["name"]).shape[1]
    side = track.content["sampling"].get("size", own)
    if (seen := images.reference_images[:1].shape[-1]) != side:
        raise UserError(
            f"sampling.size: samples would have {side} pixels a side, the references have {seen}"
        )


def score(track: Track, cell: Cell, paths: Paths) -> None:
    """Compare the cell's images with the reference and with dense's; gather everything known."""
    start = time.perf_counter()
    names = ["select", "cost", "sample", *(["recover"] if cell.recovery != "none" else [])]
    records = {name: upstream(getattr(paths, name)) for name in names}
    upstream(paths.dense_sample)
    drawn = artefacts.read_tensors(Path(paths.sample).parent / IMAGES)
    judge = upstream(paths.extractor)["extractor"]
    healed = records.get("recover", {"budget": unspent(), "size": {}})
    grid = Path(paths.metrics).parent / "grid.png"
    write_grid(grid, drawn["images"], drawn["labels"])
    content = {
        "schema": 1,
        "cell": as_dict(cell),
        "failure": None,
        "labels": labels(track, cell),
        **_judged(track, cell, paths, judge, drawn),
        "size": {**records["cost"]["size"], **healed["size"]},
        "latency": records["cost"]["latency"],
        "budget": {"selection": records["select"]["budget"], "recovery": healed["budget"]},
        "trained": {
            "selection": records["select"]["trained_images"],
            "recovery": healed["budget"]["student_backward"],
        },
        "training": {
            stage: record["training"] for stage, record in records.items() if "training" in record
        },
        "sampling": records["sample"]["sampling"],
        "extractor": {k: v for k, v in judge.items() if k != "weights"},
        **_told(track, cell, paths),
        "settings": _settings(track, cell),
        "plan": artefacts.read_json(Path(paths.select).parent / surgery.PLAN)["plan"],
        "stages": _history(records),
    }
    finish(paths.metrics, track, start, [grid], **content)


def _told(track: Track, cell: Cell, paths: Paths) -> dict:
    """The text encoder that read the prompts, where there is one."""
    name = track.model(cell.model).get("text_encoder")
    if name is None:
        return {}
    report = artefacts.read_record(paths.layout.prompts(name))["text_encoder"]
    return {"text_encoder": {k: v for k, v in report.items() if k != "place"}}


def _judged(track: Track, cell: Cell, paths: Paths, judge: dict, drawn: dict[str, Tensor]) -> dict:
    """Quality against the reference set, and consistency with the dense model's images."""
    settings, weights = track.content["evaluation"], Path(judge["weights"])
    eye = features.load_extractor(judge["name"], weights)
    generated = eye.extract(drawn["images"], settings["batch"])
    reference = artefacts.read_tensors(Path(paths.extractor).parent / FEATURES)
    undisturbed = artefacts.read_tensors(Path(paths.dense_sample).parent / IMAGES)
    distance = _distance(settings["lpips"], weights)
    found = quality.quality(generated, reference, drawn["labels"])
    if "text_encoder" in track.model(cell.model):
        found = _with_clip_score(track, drawn, found)
    return {
        "quality": found,
        "consistency": consistency.consistency(drawn["images"], undisturbed["images"], distance),
    }


def _with_clip_score(track: Track, drawn: dict[str, Tensor], found: dict) -> dict:
    """`found` with the CLIP score of the images and their prompts, or the reason for none."""
    settings, value, why, clip = track.content["evaluation"], None, {}, None
    if "clip" in settings:
        texts = dataset(track).reference_captions
        asked = [texts[label] for label in drawn["labels"].tolist()]
        place, device = assets.locate(settings["clip"]), parallel.device()
        value = clip_score(place, drawn["images"], asked, settings["batch"], device)
        clip = {"name": settings["clip"], "sha256": artefacts.sha256(place / CLIP)}
    else:
        why = {"clip_score": "the track names no CLIP (evaluation.clip)"}
    unavailable = {**found["unavailable"], **why}
    return {**found, "clip_score": value, "clip": clip, "unavailable": unavailable}


def _distance(name: str, judge: Path) -> consistency.Distance | None:
    if name == "none":
        return None
    weights = judge if name == "domain" else assets.locate(f"lpips-{name}")
    return consistency.perceptual_distance(name, weights)


def _settings(track: Track, cell: Cell) -> dict:
    """What of the track made this cell, so that its record alone says how."""
    return {
        "parameters": {**track.method(cell.method).parameters, **track.parameters(cell)},
        "method_sha256": artefacts.sha256(track.method(cell.method).file),
        **shared_settings(track, cell.model),
    }


def _history(records: dict[str, dict]) -> dict:
    """When, where, with which code and how long each stage ran that a score rests on."""
    return {
        stage: {
            "wall_s": record["wall_s"],
            "date": record["provenance"]["date"],
            "code": record["provenance"]["code"],
            "machine": {name: record["provenance"][name] for name in ("cpu", "cores", "gpu")},
        }
        for stage, record in records.items()
    }
