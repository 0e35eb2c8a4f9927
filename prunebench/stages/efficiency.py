"""The stage of an efficiency track: one row, counted and, where there is a GPU, measured."""

import copy
import functools
import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.errors import CellError
from prunebench.evaluation import cost, latency, semi_structured, variants
from prunebench.pruning import targets
from prunebench.pruning.plan import Plan
from prunebench.records.parts import Failure
from prunebench.records.schema import Asked
from prunebench.stages import networks
from prunebench.stages.job import Job
from prunebench.tracks import plain
from prunebench.tracks.efficiency import Track
from prunebench.tracks.settings_efficiency import Network

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_GPU = "no GPU"


@dataclass(frozen=True)
class Row:
    """A network of the track, dense and with a plan carried out, both without memory."""

    model: Network
    dense: nn.Module
    pruned: nn.Module
    plan: Plan


def efficiency(job: Job) -> None:
    """Count a row's parameters and MACs, time it beside dense where that is possible, record it.

    A plan that the network can't carry out gives a record with status "failed".
    """
    track, names = job.track, job.names
    settings, wanted = track.model(job.model), track.plan(**names)
    try:
        pruned, chosen, left = networks.pruned(settings, wanted, track.settings.seed)
        row = Row(settings, networks.dense(settings), pruned, chosen)
        found = {
            "status": "ok",
            "layers": chosen.layers,
            "left": left,
            "size": _size(row),
            **_measured(track, row),
        }
    except CellError as error:
        log.error("%s of %s: %s", names["plan"], job.model, error)
        failure = Failure(stage="efficiency", error=str(error), log=job.log)
        found = {"status": "failed", "failure": failure}
    job.finish(
        [],
        {},
        title=settings.title,
        asked=Asked(**wanted.model_dump(exclude_none=True)),
        seed=track.settings.seed,
        settings={"model": plain(settings), **_conditions(track)},
        **found,
    )


def _conditions(track: Track) -> dict:
    names = ("device", "precisions", "modes", "rounds", "warmup")
    return {name: plain(track.settings)[name] for name in names}


def _size(row: Row) -> dict:
    """Parameters, as in docs/models.md the elements of the state dict, and MACs of one image."""
    counts = {}
    for prefix, network in (("", row.pruned), ("dense_", row.dense)):
        counts[f"{prefix}parameters"] = sum(t.numel() for t in network.state_dict().values())
        weightless = _on_meta(network)
        macs = cost.count_macs(weightless, *networks.inputs(row.model, 1, "meta"))
        counts |= {f"{prefix}{name}": value for name, value in macs.items()}
    zeros = networks.zeros(row.plan)
    removed = targets.reached(row.dense, row.pruned, Plan())
    share = zeros / cost.count_parameters(row.dense)
    counts["nonzero_parameters"] = counts["parameters"] - zeros
    return {**counts, "sparsity_reached": removed + share}


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy whose buffers are on the meta device too."""
    return nn.Module.to(copy.deepcopy(network), "meta")


def _measured(track: Track, row: Row) -> dict:
    """Timings, one per precision, mode and batch; or why there are none ("not_measured")."""
    device = torch.device(track.settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return {"timings": (), "not_measured": NO_GPU}
    timings = []
    for precision in track.settings.precisions:
        timings += _in_precision(track, row, precision, device)
        _free(device)
    return {"timings": tuple(timings), "not_measured": None}


def _in_precision(track: Track, row: Row, precision: str, device: torch.device) -> list[dict]:
    """The timings of every mode and batch. A failure, such as no memory, stands in its place."""
    places = [
        {"precision": precision, "mode": mode, "batch": batch}
        for mode in track.settings.modes
        for batch in row.model.batches
    ]
    built = variants.attempt(precision, lambda: _pair(row, device, DTYPES[precision]))
    if "failure" in built:
        return [{**place, **built} for place in places]
    return [{**place, **_timed(track, row, place, built, device)} for place in places]


def _pair(row: Row, device: torch.device, dtype: torch.dtype) -> dict:
    """Both networks with weights, and the report on 2:4 kernels; dense stands for itself."""
    reason = _no_kernels(row.plan, device, dtype)
    if reason:
        return {"failure": reason}
    dense = networks.materialised(row.dense, Plan(), device, dtype)
    if row.plan == Plan():
        return {"pair": (dense, dense), "kernels": None}
    pruned = networks.materialised(row.pruned, row.plan, device, dtype)
    masked = row.plan.pattern == semi_structured.PATTERN
    report = semi_structured.accelerate_in_place(pruned, row.plan) if masked else None
    return {"pair": (pruned, dense), "kernels": report}


def _no_kernels(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 2:4 masks would run as dense matrices, which is not worth timing; None if they don't."""
    if plan.pattern != semi_structured.PATTERN:
        return None
    if dtype == torch.float32:
        return "2:4 kernels exist in half precision only"
    return semi_structured.missing_kernels(device)


def _timed(track: Track, row: Row, place: Mapping, built: Mapping, device: torch.device) -> dict:
    what = "{precision} {mode} batch {batch}".format_map(place)
    found = variants.attempt(what, lambda: _timing(track, row, place, built["pair"], device))
    _free(device)
    return {**found, "kernels": built["kernels"]}


def _timing(
    track: Track, row: Row, place: Mapping, pair: tuple[nn.Module, nn.Module], device: torch.device
) -> dict:
    """One forward pass of the batch, dense and pruned in turns, and the peak memory of each."""
    values = networks.inputs(row.model, place["batch"], device, DTYPES[place["precision"]])
    models = [variants.compiled(m) if place["mode"] == "compiled" else m for m in pair]
    timed = functools.partial(
        latency.interleaved_latency,
        rounds=track.settings.rounds,
        warmup=track.settings.warmup,
        device=device,
    )
    found = variants.compare(models, {"forward": values}, timed, track.settings.wait)
    peaks = [
        cost.peak_memory(functools.partial(model, *values), plain)
        for model, plain in zip(models, pair, strict=True)
    ]
    memory = dict(zip(("peak_memory_mb", "dense_peak_memory_mb"), peaks, strict=True))
    return {**found["forward"], **memory, "alone": found["alone"]}


def _free(device: torch.device) -> None:
    """Give the GPU's memory back that a failed or finished attempt held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
