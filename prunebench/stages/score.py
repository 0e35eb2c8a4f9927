"""The score of a cell: its quality, and everything else that is known of it, on one record."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from prunebench import assets
from prunebench.evaluation import features, metrics
from prunebench.evaluation.grid import write_grid
from prunebench.evaluation.metrics import Evidence, Missing, precision
from prunebench.pruning import surgery
from prunebench.records import artefacts
from prunebench.stages.extractor import FEATURES
from prunebench.stages.inputs import dataset
from prunebench.stages.job import Job, labels, shared_settings, upstream
from prunebench.stages.sample import IMAGES
from prunebench.tracks import as_dict
from prunebench.training import parallel
from prunebench.training.budget import unspent

CLIP = "model.safetensors"  # of evaluation.clip


def score(job: Job) -> None:
    """Compare the cell's images with the reference and with dense's; gather everything known."""
    paths = job.paths
    names = ["select", "cost", "sample", *(["recover"] if job.cell.recovery != "none" else [])]
    records = {name: upstream(getattr(paths, name)) for name in names}
    upstream(paths.dense_sample)
    drawn = artefacts.read_tensors(Path(paths.sample).parent / IMAGES)
    used = upstream(paths.extractor)["extractor"]
    healed = records.get("recover", {"budget": unspent(), "size": {}})
    grid = job.file("grid.png")
    write_grid(grid, drawn["images"], drawn["labels"])
    content = {
        "schema": 1,
        "cell": as_dict(job.cell),
        "failure": None,
        "labels": labels(job),
        **_evaluated(job, used, drawn),
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
        **_told(job),
        "settings": _settings(job),
        "plan": artefacts.read_json(Path(paths.select).parent / surgery.PLAN)["plan"],
        "stages": _history(records),
    }
    job.finish([grid], **content)


def _told(job: Job) -> dict:
    """The text encoder that read the prompts, where there is one."""
    name = job.settings.get("text_encoder")
    if name is None:
        return {}
    report = artefacts.read_record(job.layout.encode(name))["text_encoder"]
    return {"text_encoder": {k: v for k, v in report.items() if k != "place"}}


def _evaluated(job: Job, extractor: dict, drawn: dict[str, Tensor]) -> dict:
    """Every metric of the cell's images."""
    settings, weights = job.content["evaluation"], Path(extractor["weights"])
    undisturbed = artefacts.read_tensors(Path(job.paths.dense_sample).parent / IMAGES)
    evidence = Evidence(
        generated=features.load_extractor(extractor["name"], weights).extract(
            drawn["images"], settings["batch"]
        ),
        reference=artefacts.read_tensors(Path(job.paths.extractor).parent / FEATURES),
        images=drawn["images"],
        dense_images=undisturbed["images"],
        labels=drawn["labels"],
        prompts=_prompts(job, drawn["labels"]) if "text_encoder" in job.settings else None,
        settings=settings,
        extractor=weights,
        weights=_weights(settings),
        device=parallel.device(),
    )
    return _qualities(evidence, settings)


def _prompts(job: Job, labels: Tensor) -> list[str]:
    texts = dataset(job).reference_captions
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


def _settings(job: Job) -> dict:
    """What of the track made this cell, so that its record alone says how."""
    method = job.track.method(job.cell.method)
    return {
        "parameters": {**method.parameters, **job.track.parameters(job.cell)},
        "method_sha256": artefacts.sha256(method.file),
        **shared_settings(job),
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
