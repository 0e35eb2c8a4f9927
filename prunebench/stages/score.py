"""The stages that evaluate images: the extractor of features, and the score of a cell.

Apart from the other stages, because what they import takes as long as all the rest.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from prunebench import assets
from prunebench.errors import UserError
from prunebench.evaluation import classifier, features, metrics
from prunebench.evaluation.grid import write_grid
from prunebench.evaluation.metrics import Evidence, Missing, precision
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
    loaded = features.load_extractor(settings["name"], weights)
    found = loaded.extract(images.reference_images, track.content["evaluation"]["batch"])
    compared = {name: found[name] for name in ("features", "spatial")}  # no metric reads logits
    if images.statistics:
        compared |= dict(zip(("mu", "sigma"), images.statistics, strict=True))
    artefacts.write_tensors(folder / FEATURES, compared)
    report |= {"weights": str(weights), "sha256": artefacts.sha256(weights)}
    payload = [folder / FEATURES, *([weights] if weights.parent == folder else [])]
    finish(layout.extractor, track, start, payload, extractor=report)


def _check_sizes(track: Track, images: assets.Dataset) -> None:
    """An extractor sees images of other sizes differently: samples must have the references'."""
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
    used = upstream(paths.extractor)["extractor"]
    healed = records.get("recover", {"budget": unspent(), "size": {}})
    grid = Path(paths.metrics).parent / "grid.png"
    write_grid(grid, drawn["images"], drawn["labels"])
    content = {
        "schema": 1,
        "cell": as_dict(cell),
        "failure": None,
        "labels": labels(track, cell),
        **_evaluated(track, cell, paths, used, drawn),
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
        "extractor": {k: v for k, v in used.items() if k != "weights"},
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


def _evaluated(
    track: Track, cell: Cell, paths: Paths, extractor: dict, drawn: dict[str, Tensor]
) -> dict:
    """Every metric of the cell's images."""
    settings, weights = track.content["evaluation"], Path(extractor["weights"])
    reads = "text_encoder" in track.model(cell.model)
    undisturbed = artefacts.read_tensors(Path(paths.dense_sample).parent / IMAGES)
    evidence = Evidence(
        generated=features.load_extractor(extractor["name"], weights).extract(
            drawn["images"], settings["batch"]
        ),
        reference=artefacts.read_tensors(Path(paths.extractor).parent / FEATURES),
        images=drawn["images"],
        dense_images=undisturbed["images"],
        labels=drawn["labels"],
        prompts=_prompts(track, drawn["labels"]) if reads else None,
        settings=settings,
        extractor=weights,
        weights=_weights(settings),
        device=parallel.device(),
    )
    return _qualities(evidence, settings)


def _prompts(track: Track, labels: Tensor) -> list[str]:
    texts = dataset(track).reference_captions
    return [texts[label] for label in labels.tolist()]


def _weights(settings: Mapping) -> dict[str, Path]:
    """Where the assets lie that metrics read."""
    names = {name: entry.weights(settings) for name, entry in metrics.metrics().items()}
    return {name: assets.locate(asset) for name, asset in names.items() if asset}


def _clip(evidence: Evidence, settings: Mapping) -> dict | None:
    if "clip" not in settings:
        return None
    place = evidence.weights["clip_score"]
    return {"name": settings["clip"], "sha256": artefacts.sha256(place / CLIP)}


def _qualities(evidence: Evidence, settings: Mapping) -> dict[str, dict]:
    """The metrics as a record holds them."""
    found = metrics.evaluate(evidence)
    why = {name: value.reason for name, value in found.items() if isinstance(value, Missing)}
    values = {name: None if name in why else value for name, value in found.items()}
    consistency = {name: values.pop(name) for name in ("lpips", "ssim", "psnr")}
    kept = ("inception_score",) if evidence.prompts is None else ("inception_score", "clip_score")
    if evidence.prompts is None:
        values.pop("clip_score")
    else:
        values["clip"] = _clip(evidence, settings)
    counts = {
        "unavailable": {name: why[name] for name in kept if name in why},
        "samples": len(evidence.generated["features"]),
        "reference_samples": len(evidence.reference["features"]),
        "prc_reference_samples": precision.compared(evidence),
    }
    return {"quality": {**values, **counts}, "consistency": consistency}


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
