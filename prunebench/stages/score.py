"""The score of a cell: its quality, and everything else that is known of it, on one record."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from prunebench import assets
from prunebench.errors import CellError
from prunebench.evaluation import metrics
from prunebench.evaluation.grid import write_grid
from prunebench.evaluation.metrics import Evidence, Missing
from prunebench.pruning import surgery
from prunebench.records import artefacts, sealed
from prunebench.records.parts import (
    Budget,
    Costs,
    Expected,
    Machine,
    Plan,
    Quality,
    Sizes,
    Spent,
    Stage,
    Student,
    Trained,
    Weights,
)
from prunebench.records.schema import Record
from prunebench.stages.extractor import load
from prunebench.stages.inputs import check_data, data_set, dataset, decoded_by, located
from prunebench.stages.job import Job, labels, shared_settings
from prunebench.stages.sample import IMAGES
from prunebench.stages.work import check_selected, dense_model
from prunebench.tracks import plain
from prunebench.training import parallel
from prunebench.training.budget import unspent

CLIP = "model.safetensors"  # of evaluation.clip


def score(job: Job) -> None:
    """Compare the cell's images with the reference and with dense's; gather everything known."""
    records = _records(job)
    _check_recovered(job, records)
    drawn = artefacts.read_tensors(job.path("sample").with_name(IMAGES))
    grid = job.file("grid.png")
    write_grid(grid, drawn["images"], drawn["labels"])
    used, reference, extractor = load(job)
    generated = used.extract(drawn["images"], job.track.settings.evaluation.batch)
    evidence = _evidence(job, generated, reference, drawn, Path(extractor.extractor.weights))
    undisturbed = job.read("sample", **job.track.undisturbed)
    others = {"extractor": extractor, "dense_sample": undisturbed}
    made_from = sealed.made_from(**records, **others, method=records["select"].inputs["method"])
    job.finish(
        [grid],
        {**made_from, **data_set(job), **_metrics_made_from(job)},
        labels=labels(job),
        quality=_qualities(evidence),
        samples=len(generated["features"]),
        reference_samples=len(reference["features"]),
        **_gathered(job, records),
        extractor=extractor.extractor.model_copy(update={"weights": ""}),
        text_encoder=_text_encoder(job),
        clip=_clip(evidence),
        **_told(job),
    )


def _records(job: Job) -> dict[str, Record]:
    """The records that the cell rests on, by stage; all of one dense model and one selection.

    Raises:
        UserError: one was made from another than there is.
    """
    found = {"dense": job.read("dense", payload=False)}
    found |= {name: job.read(name) for name in ("select", "cost")}
    _check(job, "select", dense=found["dense"], records=found)
    checkpoint, timed = {"select": found["select"]}, {}
    if job.cell.recovery != "none":
        found["recover"] = job.read("recover")
        _check(job, "recover", select=found["select"], dense=found["dense"], records=found)
        checkpoint = {"recover": found["recover"]}
        timed = checkpoint if found["recover"].student.steps else {}
    _check(job, "cost", select=found["select"], dense=found["dense"], **timed, records=found)
    found["sample"] = job.read("sample")
    if decoder := job.settings.autoencoder:
        checkpoint |= decoded_by(job, decoder)
    if reader := job.settings.text_encoder:
        checkpoint["prompts"] = job.read("encode", coder=reader)
    _check(job, "sample", **checkpoint, records=found)
    for stage, record in found.items():
        check_data(job, stage, record)
    return found


def _check_recovered(job: Job, records: Mapping[str, Record]) -> None:
    """The recovered model has what its plan leaves; what the method left was checked by `cost`."""
    if recovered := records.get("recover"):
        pruned, plan = surgery.load(job.path("recover").parent)
        check_selected(job, dense_model(job), pruned, plan, recovered)
    if _sizes(records["cost"].size) != _sizes(records["select"].size):
        raise CellError("cost.json tells other sizes than select.json")


def _sizes(told: Sizes | Costs) -> Sizes:
    return Sizes(**{name: getattr(told, name) for name in Sizes.model_fields})


def _check(job: Job, stage: str, records: Mapping[str, Record], **now: Record) -> None:
    sealed.check_made_from(job.path(stage), records[stage], **now)


def _gathered(job: Job, records: Mapping[str, Record]) -> dict:
    """What the records of the other stages say."""
    select, cost, recover = records["select"], records["cost"], records.get("recover")
    spent = recover.budget if recover else Budget(**unspent())
    own = {name: record for name, record in records.items() if name != "dense"}
    return {
        "size": Costs(**{**dict(cost.size), **(dict(recover.size) if recover else {})}),
        "latency": cost.latency,
        "budget": Spent(selection=select.budget, recovery=spent),
        "trained": Trained(
            selection=select.trained_images, recovery=recover.trained_images if recover else 0
        ),
        "phases": recover.phases if recover else (),
        "student": recover.student if recover else Student(),
        "trainings": {name: record.training for name, record in own.items() if record.training},
        "sampling": records["sample"].sampling,
        "stages": {name: _history(record) for name, record in own.items()},
    }


def _history(record: Record) -> Stage:
    """When, where, with which code and how long a stage ran."""
    made = record.provenance
    machine = Machine(cpu=made.cpu, cores=made.cores, gpu=made.gpu)
    return Stage(wall_s=record.wall_s, date=made.date, code=made.code, machine=machine)


def _told(job: Job) -> dict:
    """What the track and the method say."""
    method, settings = job.track.method(job.cell.method), job.settings
    plan = artefacts.read_json(job.path("select").with_name(surgery.PLAN))["plan"]
    kept = {name: tuple(indices) for name, indices in plan["kept"].items()}
    names = {name: tuple(plan[name]) for name in ("layers", "copies")}
    expected = settings.reference
    return {
        "expected": Expected(**expected.model_dump()) if expected else None,
        "released": settings.weights is not None and settings.training is None,
        "plan": Plan(**{**plan, **names, "kept": kept}),
        "parameters": {**method.parameters, **job.track.parameters(job.cell)},
        "settings": shared_settings(job),
    }


def _text_encoder(job: Job) -> Weights | None:
    """The text encoder that read the prompts, where there is one."""
    if name := job.settings.text_encoder:
        return job.read("encode", coder=name).weights.model_copy(update={"place": ""})
    return None


def _evidence(
    job: Job,
    generated: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor],
    extractor: Path,
) -> Evidence:
    settings = plain(job.track.settings.evaluation)
    undisturbed = artefacts.read_tensors(
        job.path("sample", **job.track.undisturbed).with_name(IMAGES)
    )
    return Evidence(
        generated=generated,
        reference=reference,
        images=drawn["images"],
        dense_images=undisturbed["images"],
        labels=drawn["labels"],
        prompts=_prompts(job, drawn["labels"]) if job.settings.text_encoder else None,
        settings=settings,
        extractor=extractor,
        weights=_weights(job, settings),
        device=parallel.device(),
    )


def _prompts(job: Job, labels: Tensor) -> list[str]:
    texts = dataset(job).reference_captions
    return [texts[label] for label in labels.tolist()]


def _weights(job: Job, settings: Mapping) -> dict[str, Path]:
    """Where the assets lie that metrics read."""
    return {name: located(job, asset) for name, asset in _read_by_metrics(settings).items()}


def _read_by_metrics(settings: Mapping) -> dict[str, str]:
    """Metric -> the asset that it reads, of those that read one."""
    names = {name: entry.weights(settings) for name, entry in metrics.metrics().items()}
    return {name: asset for name, asset in names.items() if asset}


def _metrics_made_from(job: Job) -> dict[str, str]:
    """Hashes of what metrics read, as a record's `inputs` name it."""
    named = _read_by_metrics(plain(job.track.settings.evaluation))
    hashes = {name: assets.hashes(assets.asset(asset)) for name, asset in named.items()}
    return {
        f"{name}/{file}": value for name, found in hashes.items() for file, value in found.items()
    }


def _clip(evidence: Evidence) -> Weights | None:
    if evidence.prompts is None or "clip" not in evidence.settings:
        return None
    sha256 = artefacts.sha256(evidence.weights["clip_score"] / CLIP)
    return Weights(name=evidence.settings["clip"], sha256=sha256)


def _qualities(evidence: Evidence) -> dict[str, Quality]:
    """The metrics as a record holds them."""
    return {
        name: Quality(reason=value.reason) if isinstance(value, Missing) else Quality(value=value)
        for name, value in metrics.evaluate(evidence).items()
    }
