"""From metrics.json files to one row per (model, method, sparsity, recovery).

`METRICS` is the only place that knows a number's path, unit, direction and format.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy.stats import ttest_ind_from_stats

from prunebench.errors import UserError

SCHEMA = 1
ROW = ["model", "method", "sparsity", "recovery"]
CELL = [*ROW, "seed"]
REFERENCE_KINDS = ("none", "steps")  # the dense model, with all or fewer sampling steps
MINIMUM_SAMPLES = 2048  # fewer leave Inception's covariance rank-deficient: the row is "smoke"
SPEED_TOLERANCE = 0.02  # the interleaved protocol tells speeds apart to 1-3 %
SIGNIFICANCE = 0.05
CLEANFID_TOLERANCE = 1e-3  # relative
LABELS = ("family", "kind", "control", "reconstruction", "title", "paper", "bibtex", "notes",
          "healing")  # fmt: skip
PROVENANCE = ("commit", "dirty", "code", "date", "cpu", "cores", "gpu", "packages")
ALONE = {True: "alone", False: "beside other load", None: "not recorded"}  # how it was timed
OUTCOMES = {"ok": 0, "failed": 1, "missing": 2}  # and the order inside a group
EXPECTED = ("expected_fid", "expected_tolerance", "expected_source")  # of the dense model
SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)  # names become files


@dataclass(frozen=True)
class Comparison:
    """What differs between the rows of a board that are ranked against each other."""

    group: tuple[str, ...]  # columns in which such rows agree
    section: str  # the column that, with the model, makes one printed table
    words: str  # what the rows of a group share


# By a division's `compares`. "share" keeps plans that fix their own share (N:M, uniform) apart.
COMPARISONS = {
    "selections": Comparison(
        ("model", "sparsity", "share", "recovery"), "recovery", "model, sparsity and recovery"
    ),
    "methods": Comparison(
        ("model", "sparsity", "share", "budget"), "budget", "model, sparsity and budget"
    ),
    "recoveries": Comparison(
        ("model", "sparsity", "share", "method", "budget"),
        "method",
        "model, selection, sparsity and budget",
    ),
}


@dataclass(frozen=True)
class Metric:
    """One number of metrics.json: where it lies, what it means and how it is printed."""

    paths: tuple[str, ...]  # dotted keys; several are summed
    label: str
    help: str
    better: str = ""  # "lower", "higher" or "" when neither is better
    unit: str = ""
    scale: float = 1.0  # printed value = stored value x scale
    format: str = ".3f"  # a format specification, or "sig" for three significant digits
    spread: bool = False  # print the standard deviation beside the mean
    null: str = "—"  # how a recorded null reads
    power: int = 1  # -1 turns a ratio of times into a speed-up
    optional: bool = False  # not every board has it

    def read(self, metrics: Mapping) -> float:
        try:
            values = [lookup(metrics, path) for path in self.paths]
        except KeyError:
            if self.optional:
                return math.nan
            raise
        return math.nan if None in values else float(sum(values)) ** self.power


METRICS = {
    "fid": Metric(
        ("quality.fid",), "FID", "Fréchet distance between the features of generated and reference "
        "images: mean ± standard deviation over seeds", "lower", format=".2f", spread=True),
    "kid": Metric(
        ("quality.kid",), "KID", "Kernel inception distance, unbiased at any sample count",
        "lower", "×10⁻³", 1e3, ".2f", spread=True),
    "precision": Metric(
        ("quality.precision",), "Precision", "Share of generated images inside the manifold of "
        "the reference images (fidelity)", "higher", spread=True),
    "recall": Metric(
        ("quality.recall",), "Recall", "Share of reference images inside the manifold of the "
        "generated images (diversity)", "higher", spread=True),
    "sfid": Metric(
        ("quality.sfid",), "sFID", "FID on spatial features, sensitive to layout", "lower",
        format=".2f", spread=True),
    "agreement": Metric(
        ("quality.agreement",), "Agreement", "Share of generated images that a classifier assigns "
        "to the class they were generated for", "higher", spread=True),
    "inception_score": Metric(
        ("quality.inception_score",), "IS", "Inception score of the generated images: sure and "
        "varied classes in Inception's eyes, without regard to the reference", "higher",
        format=".2f", spread=True, optional=True),
    "clip_score": Metric(
        ("quality.clip_score",), "CLIP", "Mean cosine of CLIP's embeddings of image and prompt",
        "higher", format=".4f", spread=True, optional=True),
    "fid_cleanfid": Metric(
        ("quality.fid_cleanfid",), "FID (clean-fid)", "The same distance from the clean-fid "
        "package, an independent check", "lower", format=".2f"),
    "lpips": Metric(
        ("consistency.lpips",), "LPIPS", "Perceptual distance to the dense model's image from the "
        "same noise", "lower", spread=True),
    "ssim": Metric(
        ("consistency.ssim",), "SSIM", "Structural similarity to the dense model's image from the "
        "same noise", "higher", spread=True),
    "psnr": Metric(
        ("consistency.psnr",), "PSNR", "Peak signal-to-noise ratio to the dense model's image from "
        "the same noise; infinite for dense itself", "higher", "dB", format=".1f", spread=True,
        null="∞"),
    "parameters": Metric(
        ("size.parameters",), "Params", "Parameters of the denoiser", "lower", "M", 1e-6, "sig"),
    "nonzero_parameters": Metric(
        ("size.nonzero_parameters",), "Non-zero", "Parameters that are not zero: the size of a "
        "masked model", "lower", "M", 1e-6, "sig"),
    "sparsity_reached": Metric(
        ("size.sparsity_reached",), "Reached", "Fraction of the denoiser's parameters that was "
        "removed or zeroed", "", "%", 1e2, ".1f"),
    "macs": Metric(
        ("size.macs",), "MACs", "Multiply-accumulates of one denoiser forward of one image; masks "
        "leave them as they are", "lower", "M", 1e-6, "sig"),
    "macs_without_attention_products": Metric(
        ("size.macs_without_attention_products",), "MACs w/o attn", "The same without the "
        "query-key and attention-value products, as many papers count", "lower", "M", 1e-6, "sig"),
    "forward_batch1_ratio": Metric(
        ("latency.forward_batch1.ratio",), "Forward, batch 1", "Time of one denoiser forward of "
        "one image relative to dense measured in turns; below 1 is faster", "lower", "× dense",
        format=".2f"),
    "forward_batch_ratio": Metric(
        ("latency.forward_batch.ratio",), "Forward, batch n", "Time of one denoiser forward of a "
        "full batch relative to dense; below 1 is faster", "lower", "× dense", format=".2f"),
    "sampling_ms": Metric(
        ("latency.sampling.ms",), "Latency", "Measured time of sampling one image end to end, all "
        "steps", "lower", "ms/image", format="sig"),
    "speedup": Metric(
        ("latency.sampling.ratio",), "Speed-up", "Sampling time of the dense model over this "
        "row's, measured in turns", "higher", "×", format=".2f", spread=True, power=-1),
    "dense_sampling_ms": Metric(
        ("latency.sampling.dense_ms",), "Dense latency", "The same of the dense model, measured in "
        "turns with this row", "lower", "ms/image", format="sig"),
    "peak_memory_mb": Metric(
        ("latency.peak_memory_mb",), "Peak memory", "Peak memory of one denoiser forward of a full "
        "batch: the model and its activations", "lower", "MB",
        format="sig"),
    "others_cpu": Metric(
        ("latency.others.during.cpu",), "Others' CPU", "CPU that other processes used while this "
        "row was timed", "lower", "cores", format=".2f", optional=True),
    "waited_s": Metric(
        ("latency.waited_s",), "Waited", "Time that timing waited for other processes to end",
        "", "s", format="sig", optional=True),
    "student_images": Metric(
        ("budget.selection.student_forward", "budget.recovery.student_forward"), "Budget",
        "Images sent forward through the model, dense or pruned, in selection and recovery "
        "together; the teacher's apart", "lower", "k images", 1e-3, "sig"),
    "selection_images": Metric(
        ("budget.selection.student_forward",), "Selection images", "Images sent forward through "
        "the model to choose what goes", "lower", "k images", 1e-3, "sig"),
    "selection_gradients": Metric(
        ("budget.selection.student_backward",), "Selection gradients", "Images whose gradient was "
        "taken to choose what goes", "lower", "k images", 1e-3, "sig"),
    "recovery_images": Metric(
        ("budget.recovery.student_forward",), "Recovery images", "Images sent through the pruned "
        "model in recovery", "lower", "k images", 1e-3, "sig"),
    "teacher_images": Metric(
        ("budget.selection.teacher_forward", "budget.recovery.teacher_forward"), "Teacher images",
        "Images sent through the dense model as a teacher", "lower", "k images", 1e-3, "sig"),
    "selection_wall_s": Metric(
        ("budget.selection.wall_s",), "Selection", "Wall time of choosing what to remove", "lower",
        "s", format="sig"),
    "recovery_wall_s": Metric(
        ("budget.recovery.wall_s",), "Recovery time", "Wall time of recovery", "lower", "s",
        format="sig"),
    "oracle_beaten": Metric(
        ("oracle.beaten",), "Masks beaten", "Share of all other layer masks of the same sparsity "
        "(or of the number of random ones that oracle.md states) whose FID is worse after the same "
        "recovery",
        "higher", "%", 1e2, ".0f", spread=True, optional=True),
    "oracle_gap": Metric(
        ("oracle.gap",), "FID above best mask", "FID minus that of the best of those masks",
        "lower", format=".2f", spread=True, optional=True),
}  # fmt: skip

# Conditions of timing besides the suite's own, where a track asks for them (latency.variants).
VARIANTS = {"compiled": "compiled", "bf16": "bf16", "compiled_bf16": "compiled, bf16"}


def _forward_metrics(name: str, words: str) -> dict[str, Metric]:
    """Both forwards and the throughput under one variant; not every board or row has them."""
    place = f"latency.variants.{name}"
    ratios = {
        f"{size}_ratio_{name}": Metric(
            (f"{place}.{size}.ratio",), f"Forward, {batch}, {words}", "Time of one denoiser "
            f"forward ({words}) relative to dense under the same conditions", "lower", "× dense",
            format=".2f", optional=True)
        for size, batch in (("forward_batch1", "batch 1"), ("forward_batch", "batch n"))
    }  # fmt: skip
    return ratios | {f"throughput_{name}": _throughput(place, f", {words}")}


def _throughput(place: str, words: str = "") -> Metric:
    return Metric(
        (f"{place}.forward_batch.images_per_s",), f"Throughput{words}", "Images of a full batch "
        f"that one denoiser forward{words} takes per second", "higher", "images/s", format="sig",
        optional=True)  # fmt: skip


METRICS["throughput"] = _throughput("latency")
for variant in VARIANTS.items():
    METRICS |= _forward_metrics(*variant)


@dataclass(frozen=True)
class Source:
    """One metrics.json as read: its place, bytes and content."""

    path: Path
    content: bytes
    metrics: dict

    @property
    def key(self) -> tuple:
        return cell_key(self.metrics["cell"])


def lookup(content: Mapping, path: str):
    """The value at a dotted path; KeyError names the path."""
    for name in path.split("."):
        if not isinstance(content, Mapping) or name not in content:
            raise KeyError(path)
        content = content[name]
    return content


def cell_key(cell: Mapping) -> tuple:
    sparsity, seed = float(cell["sparsity"]), int(cell["seed"])
    return (cell["model"], cell["method"], sparsity, cell["recovery"], seed)


def read_sources(files: Iterable[Path]) -> list[Source]:
    """Read and validate metrics.json files, in the order of their cells.

    Raises:
        UserError: a file is unreadable, breaks the schema, repeats a cell or is of another track.
    """
    sources = {}
    for file in map(Path, files):
        source = _read_source(file)
        if source.key in sources:
            raise UserError(
                f"{file} and {sources[source.key].path} are the same cell; keep one of them"
            )
        sources[source.key] = source
    if not sources:
        raise UserError("no metrics.json to make a leaderboard of; run some cells first")
    tracks = sorted({source.metrics["cell"]["track"] for source in sources.values()})
    if len(tracks) > 1:
        raise UserError(f"a leaderboard holds one track, found {', '.join(tracks)}")
    return [sources[key] for key in sorted(sources)]


def _read_source(file: Path) -> Source:
    try:
        content = file.read_bytes()
        metrics = json.loads(content)
        _validate(metrics)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except KeyError as error:
        raise _invalid(file, f"{error.args[0]} is missing") from error
    except (ValueError, TypeError) as error:
        raise _invalid(file, error) from error
    return Source(file, content, metrics)


def _invalid(file: Path, reason) -> UserError:
    return UserError(f"{file} is not a metrics.json of schema {SCHEMA}: {reason}; delete it and "
                     "score the cell again")  # fmt: skip


def _validate(metrics: Mapping) -> None:
    """Raise KeyError for an absent key and ValueError for a senseless value."""
    if lookup(metrics, "schema") != SCHEMA:
        raise ValueError(f"its schema is {metrics['schema']!r}")
    if lookup(metrics, "status") not in ("ok", "failed"):
        raise ValueError(f"its status is {metrics['status']!r}")
    for name in ("track", *CELL):
        lookup(metrics, f"cell.{name}")
    for name in ("track", "model", "method", "recovery"):
        if not SAFE_NAME.fullmatch(metrics["cell"][name]):
            raise ValueError(f"cell.{name} {metrics['cell'][name]!r} cannot name a file")
    cell_key(metrics["cell"])
    for path in [f"labels.{n}" for n in LABELS] + [f"provenance.{n}" for n in PROVENANCE]:
        lookup(metrics, path)
    if metrics["status"] == "failed":
        for name in ("stage", "error", "log"):
            lookup(metrics, f"failure.{name}")
        return
    _validate_numbers(metrics)


def _validate_numbers(metrics: Mapping) -> None:
    needed = ("quality.samples", "quality.reference_samples", "sampling.steps", "sampling.sampler")
    for path in needed:
        lookup(metrics, path)
    for path in {path for m in METRICS.values() if not m.optional for path in m.paths}:
        value = lookup(metrics, path)
        if value is None and path != "quality.fid":
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path} is {value!r}, not a finite number")


def cell_frame(sources: list[Source], expected: Iterable[Mapping] | None = None) -> pd.DataFrame:
    """One line per cell, found or expected; `status` is "ok", "failed" or "missing"."""
    labels = {source.metrics["cell"]["method"]: source.metrics["labels"] for source in sources}
    cells = {source.key: _cell(source) for source in sources}
    for key in sorted({cell_key(cell) for cell in expected or ()} - set(cells)):
        known = labels.get(key[1], {"title": key[1]})
        cells[key] = dict(zip(CELL, key, strict=True)) | {"status": "missing"} | _labels(known)
    columns = [*CELL, "status", *LABELS, *EXPECTED, "share", "details", "samples", "sampler",
               "steps", "alone", *METRICS]  # fmt: skip
    frame = pd.DataFrame([cells[key] for key in sorted(cells)], columns=columns)
    return frame.astype(dict.fromkeys(METRICS, float))


def _labels(labels: Mapping) -> dict:
    return {name: labels.get(name) or "" for name in LABELS}


def _cell(source: Source) -> dict:
    metrics = source.metrics
    cell = dict(zip(CELL, source.key, strict=True)) | {"status": metrics["status"]}
    cell |= _labels(metrics["labels"])
    if metrics["status"] == "ok":
        cell |= {name: metric.read(metrics) for name, metric in METRICS.items()}
        cell |= {"samples": metrics["quality"]["samples"]}
        cell |= {"share": _share(metrics), "details": _details(metrics)}
        expected = metrics.get("settings", {}).get("model", {}).get("reference", {})
        cell |= {f"expected_{key}": value for key, value in expected.items()}
        cell |= {"alone": ALONE[metrics["latency"].get("alone")]}
        cell |= {name: metrics["sampling"][name] for name in ("sampler", "steps")}
    return cell


def _share(metrics: Mapping) -> str:
    """How a plan fixes its own share of the parameters: "2:4", "uniform"; "" where it does not."""
    pattern = metrics.get("plan", {}).get("pattern")
    return "" if pattern in (None, "unstructured") else pattern


def _details(metrics: Mapping) -> str:
    """What a method and the timing want said beside the row, in one line."""
    kernels = metrics["latency"].get("kernels") or {}
    summary = metrics.get("plan", {}).get("notes", {}).get("summary", "")
    return "; ".join(filter(None, (summary, kernels.get("reason", ""), _training(metrics))))


def _training(metrics: Mapping) -> str:
    """How training differed from whole batches on one device, if it did."""
    batch = metrics.get("settings", {}).get("model", {}).get("recovery", {}).get("batch")
    words = {}
    for how in metrics.get("training", {}).values():
        if how["micro_batch"] and how["micro_batch"] * how["processes"] < batch:
            words[f"micro-batches of {how['micro_batch']} for a batch of {batch}"] = None
        if how["processes"] > 1:
            words[f"trained on {how['processes']} GPUs"] = None
    return ", ".join(words)


def aggregate(cells: pd.DataFrame, compares: str = "selections") -> pd.DataFrame:
    """One line per row with `<metric>_mean` and `<metric>_sd` (ddof 1), ranked and ordered."""
    comparison = COMPARISONS[compares]
    rows = pd.DataFrame([_row(key, group) for key, group in cells.groupby(ROW)])
    rows["section"] = rows[comparison.section]
    rows["unpublished"] = _unpublished(rows)
    rows["rank"] = _ranks(rows, comparison.group)
    rows["ties"] = [_ties(rows, row, comparison.group) for _, row in rows.iterrows()]
    rows = rows.join(pd.DataFrame([_equal_latency(rows, row) for _, row in rows.iterrows()]))
    rows = rows.astype(dict.fromkeys(["samples", "steps", "equal_latency_steps"], "Int64"))
    return _ordered(rows).copy()  # in one block: astype leaves a hundred


def _row(key: tuple, cells: pd.DataFrame) -> dict:
    ok = cells[cells.status == "ok"]
    best = cells.iloc[cells.status.map(OUTCOMES).argmin()]  # an "ok" one if there is one
    row = dict(zip(ROW, key, strict=True)) | {"status": best.status}
    row |= {name: best[name] for name in (*LABELS, *EXPECTED)}
    row |= {"control": bool(best.control), "reconstruction": bool(best.reconstruction)}
    row |= {"seeds_ok": len(ok), "seeds_expected": len(cells)}
    row |= {"samples": ok.samples.min(), "sampler": best.sampler, "steps": ok.steps.max()}
    row |= {name: best[name] if best.status == "ok" else "" for name in ("share", "details")}
    row |= {"timed_alone": (ok.alone == ALONE[True]).sum()}
    row |= {"timed_beside": (ok.alone == ALONE[False]).sum()}
    row["budget"] = row["recovery"].rpartition("-")[2]
    row["smoke"] = bool((ok.samples < MINIMUM_SAMPLES).any())
    for name in METRICS:
        row[f"{name}_mean"], row[f"{name}_sd"] = _spread(ok[name].dropna().tolist())
    return row


def _unpublished(rows: pd.DataFrame) -> pd.Series:
    """Why nothing may be cited of a row's model; "" where the dense model is as it should be."""
    reasons = dict.fromkeys(rows.model, "")
    for row in rows[rows.expected_fid.notna()].drop_duplicates("model").itertuples():
        dense = rows[(rows.model == row.model) & (rows.kind == "none") & (rows.status == "ok")]
        found = dense.fid_mean.iloc[0] if len(dense) else math.nan
        if not abs(found - row.expected_fid) <= row.expected_tolerance:
            words = f"is {found:.2f}" if len(dense) else "is not known"
            reasons[row.model] = (
                f"{row.model} is unpublished: the dense model's FID {words}, not "
                f"{row.expected_fid:g} ± {row.expected_tolerance:g} ({row.expected_source})"
            )
    return rows.model.map(reasons)


def _spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, correctly rounded: equal values have exactly none."""
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def is_reference(rows: pd.DataFrame) -> pd.Series:
    return rows.kind.isin(REFERENCE_KINDS)


def worse_by(metric: str, value: float, other: float) -> float:
    """How much worse `value` is than `other`: positive whichever way the metric points."""
    return value - other if METRICS[metric].better == "lower" else other - value


def _ranks(rows: pd.DataFrame, group: tuple[str, ...]) -> pd.Series:
    ranked = rows[(rows.status == "ok") & ~is_reference(rows) & (rows.unpublished == "")]
    cost = worse_by("fid", ranked.fid_mean, 0.0)
    groups = cost.groupby([ranked[name] for name in group])
    ranks = groups.rank(method="min").astype("Int64")
    return ranks.where(groups.transform("size") > 1)  # alone in its group, a row is not first


def indistinguishable(row: pd.Series, other: pd.Series) -> bool:
    """Whether Welch's t-test leaves two mean FIDs untold; one seed tells nothing."""
    if min(row.seeds_ok, other.seeds_ok) < 2:
        return True
    if row.fid_sd == other.fid_sd == 0:
        return row.fid_mean == other.fid_mean
    test = ttest_ind_from_stats(
        row.fid_mean, row.fid_sd, row.seeds_ok,
        other.fid_mean, other.fid_sd, other.seeds_ok,
        equal_var=False,
    )  # fmt: skip
    return bool(test.pvalue >= SIGNIFICANCE)


def _ties(rows: pd.DataFrame, row: pd.Series, group: tuple[str, ...]) -> int:
    if pd.isna(row["rank"]):
        return 0
    same = (rows[list(group)] == row[list(group)]).all(axis=1)
    rivals = rows[rows["rank"].notna() & same].drop(row.name)
    return sum(indistinguishable(row, rival) for _, rival in rivals.iterrows())


def _equal_latency(rows: pd.DataFrame, row: pd.Series) -> dict:
    """The dense model with the most steps that is as fast as this row, or the fastest there is."""
    nothing = {"equal_latency_fid": math.nan, "equal_latency_steps": math.nan,
               "equal_latency_reached": False, "equal_latency_verdict": ""}  # fmt: skip
    dense = rows[is_reference(rows) & (rows.model == row.model) & (rows.status == "ok")]
    dense = dense[dense.speedup_mean.notna()].sort_values(["steps", "speedup_mean"])
    if row.status != "ok" or row.kind in REFERENCE_KINDS or dense.empty:
        return nothing
    # Speed-ups were measured beside dense and compare; milliseconds of different moments do not.
    fast = dense[dense.speedup_mean >= row.speedup_mean * (1 - SPEED_TOLERANCE)]
    pick = fast.iloc[-1] if len(fast) else dense.loc[dense.speedup_mean.idxmax()]
    return {
        "equal_latency_fid": pick.fid_mean,
        "equal_latency_steps": pick.steps,
        "equal_latency_reached": len(fast) > 0,
        "equal_latency_verdict": _verdict(row, pick),
    }


def _verdict(row: pd.Series, other: pd.Series) -> str:
    if indistinguishable(row, other):
        return "same"
    return "worse" if worse_by("fid", row.fid_mean, other.fid_mean) > 0 else "better"


def recovery_order(rows: pd.DataFrame) -> list[str]:
    """Recoveries from none to the dearest."""
    cost = rows.groupby("recovery").recovery_images_mean.max().fillna(math.inf)
    return sorted(cost.index, key=lambda name: (name != "none", cost[name], name))


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """By model: references, then each group by rank, with failed and missing rows last."""
    order = {name: place for place, name in enumerate(recovery_order(rows))}
    keys = pd.DataFrame({
        "model": rows.model, "pruned": ~is_reference(rows),
        "section": rows.section.map(lambda name: order.get(name, 0)), "name": rows.section,
        "sparsity": rows.sparsity, "share": rows["share"],
        "budget": rows.groupby("budget").recovery_images_mean.transform("max").fillna(0),
        "status": rows.status.map(OUTCOMES), "rank": rows["rank"].astype(float),
        "steps": -rows.steps.astype(float), "method": rows.method, "recovery": rows.recovery,
    })  # fmt: skip
    keys.loc[~keys.pruned, ["section", "sparsity", "budget"]] = 0
    keys.loc[~keys.pruned, "name"] = ""
    return rows.loc[keys.sort_values(list(keys.columns)).index].reset_index(drop=True)


def caption(sources: list[Source], cells: pd.DataFrame) -> dict[str, str]:
    """What was measured, where and with which code, as label: text."""
    found = [source.metrics["provenance"] for source in sources]
    commits = {(p["commit"] or "unknown")[:10] + "-dirty" * bool(p["dirty"]) for p in found}
    text = {
        "Track": sources[0].metrics["cell"]["track"],
        "Cells": _progress(cells),
        "Date": max(p["date"] for p in found)[:10],
        "Commit": ", ".join(sorted(commits)),
        "Hardware": "; ".join(hardware(sources)),
        "Timing": _timing(cells),
        "Software": ", ".join(sorted({f"torch {p['packages'].get('torch')}" for p in found})),
        "Samples": _counts(sources, "samples") + " images per cell",
        "Reference": _counts(sources, "reference_samples") + " images",
        "Sampling": "; ".join(_sampling(cells)),
        "Not available": "; ".join(_unavailable(sources)),
        "Not gated": "; ".join(_ungated(sources)),
    }
    return {label: value for label, value in text.items() if value}


def _counts(sources: list[Source], name: str) -> str:
    found = {s.metrics["quality"][name] for s in sources if s.metrics["status"] == "ok"}
    return " or ".join(f"{count:,}" for count in sorted(found)) or "no"


def _unavailable(sources: list[Source]) -> list[str]:
    """Metrics that have no value for a recorded reason."""
    found = {
        f"{METRICS[name].label}: {reason}"
        for source in sources
        for name, reason in source.metrics.get("quality", {}).get("unavailable", {}).items()
    }
    return sorted(found)


def _ungated(sources: list[Source]) -> list[str]:
    """Models as released whose dense FID was held against none."""
    models = {
        source.metrics["cell"]["model"]: source.metrics.get("settings", {}).get("model", {})
        for source in sources
    }
    return [
        f"{name}: ranked without a published FID to reach first"
        for name, settings in sorted(models.items())
        if "weights" in settings and not {"training", "reference"} & set(settings)
    ]


def hardware(sources: list[Source]) -> list[str]:
    found = {(p["cpu"], p["cores"], p["gpu"] or "no GPU")
             for p in (source.metrics["provenance"] for source in sources)}  # fmt: skip
    return sorted(f"{cpu}, {cores} cores, {gpu}" for cpu, cores, gpu in found)


def _progress(cells: pd.DataFrame) -> str:
    count = cells.status.value_counts()
    text = f"{count.get('ok', 0):,} of {len(cells):,} cells finished"
    names = {"failed": "failed", "missing": "not finished"}
    return text + "".join(f", {count[s]:,} {name}" for s, name in names.items() if s in count)


def _timing(cells: pd.DataFrame) -> str:
    """How many cells had the machine to themselves while they were timed."""
    count = cells[cells.status == "ok"].alone.value_counts()
    return ", ".join(f"{count[words]:,} {words}" for words in ALONE.values() if words in count)


def _sampling(cells: pd.DataFrame) -> list[str]:
    full = cells[(cells.status == "ok") & (cells.kind != "steps")]
    found = full.sort_values("steps").drop_duplicates("model", keep="last").sort_values("model")
    return [f"{c.model}: {c.sampler}, {int(c.steps)} steps" for c in found.itertuples()]


def warnings(sources: list[Source], cells: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What a reader must know before comparing rows."""
    found = []
    codes = {source.metrics["provenance"]["code"] for source in sources}
    codes |= {stage["code"] for s in sources for stage in s.metrics.get("stages", {}).values()}
    if len(codes) > 1:
        found.append(f"The cells were made by {len(codes)} different versions of the code.")
    if len(hardware(sources)) > 1:
        found.append("The cells ran on different hardware: latencies do not compare across rows.")
    found += [f"{reason}." for reason in sorted(set(rows.unpublished) - {""})]
    gap = (cells.fid_cleanfid - cells.fid).abs() / cells.fid.abs()
    for cell in cells[gap > CLEANFID_TOLERANCE].itertuples():
        found.append(f"clean-fid disagrees with FID on {cell_name(cell)}: "
                     f"{cell.fid_cleanfid:.4f} against {cell.fid:.4f}.")  # fmt: skip
    return found


def cell_name(cell) -> str:
    return f"{cell.model}/{cell.method}/{cell.sparsity:g}/{cell.recovery}/seed{cell.seed}"
