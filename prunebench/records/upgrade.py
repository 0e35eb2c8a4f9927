"""Records of schema 1, which had no identity, no inputs and no checksum, as today's.

What they don't say can't be made up: their `inputs` hold the method file's hash at most. The stages
refuse them; leaderboards of published results read them through here.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from prunebench.errors import UserError
from prunebench.records import sealed
from prunebench.records.schema import VERSION, Efficiency, Failed, Oracle, Score, Sealed

ALIKE = "equal to the dense model's images: infinite"
UNSAID = "not recorded"
# What older records say of a method and what is false.
CORRECTED = {"Half of the budget trains under soft masks.": "A tenth of the budget trains under "
             "soft masks."}  # fmt: skip
SINGLE = {"dense_seed": 0, "precision": "fp32", "sampling": "default"}  # all that there was


def parse(path: Path, text: bytes) -> Score | Failed | Oracle | Efficiency:
    """The record in a file of schema 1 or of today's version; errors as `sealed.read`."""
    content = sealed.opened(path, text)
    if "schema" not in content:
        return sealed.parse(path, text)
    try:
        kind, converted = upgraded(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a record of schema 1: {error!r}; {sealed.AGAIN}") from error
    whole = {**converted, "files": content.get("files", {})}
    whole["checksum"] = sealed.checksum(whole)
    return sealed.validated(path, json.dumps(whole), kind)


def upgraded(old: Mapping) -> tuple[type[Sealed], dict]:
    """The kind and the content of today's record, out of one of schema 1."""
    if "row" in old:
        return Efficiency, _efficiency(old)
    if "mask" in old["cell"]:
        return Oracle, _oracle(old)
    if old["status"] == "failed":
        return Failed, _failed(old)
    return Score, _score(old)


def _common(old: Mapping, stage: str, names: Mapping) -> dict:
    return {
        "version": VERSION,
        "identity": {"stage": stage, **names},
        "status": old["status"],
        "wall_s": old.get("wall_s", 0.0),
        "provenance": old["provenance"],
    }


def _names(old: Mapping) -> dict:
    """A cell's; what is a method's recipe now was called "published"."""
    recovery = old["cell"]["recovery"].replace("published-", "recipe-")
    return {**SINGLE, **old["cell"], "recovery": recovery}


def _score(old: Mapping) -> dict:
    settings, model = dict(old["settings"]), old["settings"]["model"]
    parameters, method = settings.pop("parameters"), settings.pop("method_sha256")
    batch = model["recovery"]["batch"]
    clip = old["quality"].get("clip")
    return {
        **_common(old, "score", _names(old)),
        "inputs": {"method": method},
        "labels": _labels(old),
        "quality": _quality(old),
        "samples": old["quality"]["samples"],
        "reference_samples": old["quality"]["reference_samples"],
        **{name: old[name] for name in ("size", "latency", "budget", "trained", "plan")},
        "trainings": {name: {"batch": batch, **how} for name, how in old["training"].items()},
        "sampling": _sampling(old["sampling"]),
        "extractor": old["extractor"],
        "text_encoder": {"name": "", **old["text_encoder"]} if "text_encoder" in old else None,
        "clip": clip,
        "expected": model.get("reference"),
        "released": "weights" in model and "training" not in model,
        "parameters": parameters,
        "settings": settings,
        "stages": old["stages"],
    }


def _failed(old: Mapping) -> dict:
    names = _names(old)
    return {
        **_common(old, "score", names),
        "failure": old["failure"],
        "labels": _labels(old),
    }


def _labels(old: Mapping) -> dict:
    labels = dict(old["labels"])
    for false, right in CORRECTED.items():
        labels["notes"] = labels["notes"].replace(false, right)
    return {"recovered_by": labels.pop("healing"), **labels}


def _quality(old: Mapping) -> dict:
    counted = ("unavailable", "samples", "reference_samples", "prc_reference_samples", "clip")
    numbers = {name: value for name, value in old["quality"].items() if name not in counted}
    reasons = {"psnr": ALIKE, **old["quality"]["unavailable"]}
    return {
        name: {"reason": reasons.get(name, UNSAID)} if value is None else {"value": value}
        for name, value in {**numbers, **old["consistency"]}.items()
    }


def _sampling(old: Mapping) -> dict:
    known = {name: old[name] for name in ("sampler", "steps", "lanes", "count")}
    return {**known, "options": {name: old[name] for name in old if name not in known}}


def _oracle(old: Mapping) -> dict:
    names = {"dense_seed": SINGLE["dense_seed"], **old["cell"]}
    missing = (old["failure"] or {}).get("error", UNSAID)
    fid = {"reason": missing} if old["fid"] is None else {"value": old["fid"]}
    same = ("layers", "masks", "exhaustive", "budget", "extractor", "settings")
    return {**_common(old, "oracle", names), "fid": fid, **{name: old[name] for name in same}}


def _efficiency(old: Mapping) -> dict:
    same = ("title", "asked", "seed", "settings", "layers", "left", "size", "timings",
            "not_measured")  # fmt: skip
    failure = old["failure"] and {"stage": "efficiency", "error": old["failure"], "log": None}
    found = {name: old[name] for name in same if name in old}
    return {**_common(old, "efficiency", old["row"]), "failure": failure, **found}
