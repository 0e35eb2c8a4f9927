"""From the scores of cells to one row per (model, dense seed, method, sparsity, recovery)."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import pandas as pd
from scipy.stats import ttest_ind_from_stats

from prunebench.errors import UserError
from prunebench.evaluation import metrics
from prunebench.leaderboard.measures import MEASURES
from prunebench.records import sealed, upgrade
from prunebench.records.parts import CellIdentity
from prunebench.records.schema import Failed, Score
from prunebench.tracks.cells import DEFAULT, PRECISIONS

# Of a cell's identity, as columns; "cell_precision", because precision is a metric too.
ROW = ["model", "dense_seed", "method", "sparsity", "recovery", "cell_precision", "sampling"]
CELL = [*ROW, "seed"]
REFERENCE_KINDS = ("none", "steps")  # the dense model, with all or fewer sampling steps
MINIMUM_SAMPLES = 2048  # fewer leave Inception's covariance rank-deficient: the row is "smoke"
SPEED_TOLERANCE = 0.02  # the interleaved protocol tells speeds apart to 1-3 %
SIGNIFICANCE = 0.05
CLEANFID_TOLERANCE = 1e-3  # relative
LABELS = ("family", "kind", "control", "reconstruction", "guessed", "title", "paper", "bibtex",
          "notes", "recovered_by")  # fmt: skip
ALONE = {True: "alone", False: "beside other load", None: "not recorded"}  # how it was timed
OUTCOMES = {"ok": 0, "failed": 1, "missing": 2}  # and the order inside a group
EXTRACTORS = {"domain": "domain classifier", "inception-v3-compat": "Inception"}  # as printed
HASH = 8  # digits of a hash that are printed


@dataclass(frozen=True)
class Comparison:
    """What differs between the rows of a board that are ranked against each other."""

    group: tuple[str, ...]  # columns in which such rows agree
    section: str  # the column that, with the model, makes one printed table
    words: str  # what the rows of a group share


# By a division's `compares`. "share" keeps plans that fix their own share (N:M, uniform) apart.
COMPARISONS = {
    "selections": Comparison(
        ("base", "sparsity", "share", "recovery"), "recovery", "model, sparsity and recovery"
    ),
    "methods": Comparison(
        ("base", "sparsity", "share", "budget"), "budget", "model, sparsity and budget"
    ),
    "recoveries": Comparison(
        ("base", "sparsity", "share", "method", "budget"),
        "method",
        "model, selection, sparsity and budget",
    ),
    "combinations": Comparison(
        ("base", "sparsity", "share", "recovery", "cell_precision", "sampling"),
        "recovery",
        "model, sparsity, recovery, precision and sampling",
    ),
}


@dataclass(frozen=True)
class Source:
    """One score.json as read: its place, bytes and content."""

    path: Path
    content: bytes
    record: Score | Failed

    @cached_property
    def cell(self) -> CellIdentity:
        return self.record.identity

    @property
    def key(self) -> tuple:
        return key_of(self.cell)

    @property
    def name(self) -> str:
        return cell_name(self.cell)


def key_of(cell: CellIdentity) -> tuple:
    """The values of CELL."""
    return tuple(getattr(cell, name.removeprefix("cell_")) for name in CELL)


def cell_key(cell: Mapping) -> tuple:
    """The key of a planned cell, as `Source.key` of a found one."""
    identity = CellIdentity(stage="score", **{**upgrade.SINGLE, **cell})
    return key_of(identity)


def cell_name(cell) -> str:
    """Of an identity or a line of a frame: what tells cells of one track apart."""
    precision = getattr(cell, "cell_precision", None) or cell.precision  # a metric, of a line
    axes = axes_folder(precision, cell.sampling)
    own = f"{cell.model}/{cell.method}/{cell.sparsity:g}/{cell.recovery}/{axes}seed{cell.seed}"
    return own if not cell.dense_seed else f"{own} (dense seed {cell.dense_seed})"


def axes_folder(precision: str, sampling: str) -> str:
    """A part of a path: "int8-few/"; "" of what most boards have only."""
    usual = (upgrade.SINGLE["precision"], upgrade.SINGLE["sampling"])
    return "" if (precision, sampling) == usual else f"{precision}-{sampling}/"


def first_precision(cells: pd.DataFrame) -> str:
    """The precision of a board that the others are compared with."""
    return min(cells.cell_precision, key=PRECISIONS.index)


def read_sources(
    files: Iterable[Path], expected: Iterable[Mapping] | None = None, older: bool = False
) -> list[Source]:
    """Read and check score.json files, in the order of their cells.

    Args:
        expected: the planned cells, of which each file has to be one; None takes any.
        older: whether records of schema 1, which nothing seals, are read too.

    Raises:
        UserError: a file is unreadable, no score, repeats a cell, is of a cell that was not
            planned, or was made from what makes it incomparable with another.
    """
    sources, planned = {}, None if expected is None else set(map(cell_key, expected))
    for file in map(Path, files):
        source = _read_source(file, older)
        if planned is not None and source.key not in planned:
            raise UserError(
                f"{file} is the record of {source.record.identity}, which is none of the planned "
                f"cells; was its folder copied? If not moved by you, {sealed.AGAIN}"
            )
        if source.key in sources:
            raise UserError(
                f"{file} and {sources[source.key].path} are the same cell; keep one of them"
            )
        sources[source.key] = source
    if not sources:
        raise UserError("no score.json to make a leaderboard of; run some cells first")
    found = [sources[key] for key in sorted(sources)]
    _check_comparable(found)
    return found


def content_of(file: Path) -> bytes:
    """The bytes of a record; UserError where it can't be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def dense_folder(dense_seed: int) -> str:
    """Where a board's copies of records of a dense training lie; "" for that of seed 0."""
    return f"dense{dense_seed}/" if dense_seed else ""


def _read_source(file: Path, older: bool) -> Source:
    content = content_of(file)
    record = (upgrade if older else sealed).parse(file, content)
    if record.identity.stage != "score":
        raise UserError(f"{file} is the record of {record.identity}, not of a score")
    if isinstance(record, Score):
        _check_metrics(file, record)
    return Source(file, content, record)


def _check_metrics(file: Path, score: Score) -> None:
    """Its qualities are those that metrics of this suite have: all of them, and no others."""
    known = metrics.metrics()
    for name in score.quality:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{file}: quality.{name} is of no metric{hint}; {sealed.AGAIN}")
    for name, entry in known.items():
        if name not in score.quality and not entry.optional:
            raise UserError(f"{file}: quality.{name} is missing; {sealed.AGAIN}")
    if score.quality["fid"].value is None:
        raise UserError(
            f"{file}: quality.fid has no value ({score.quality['fid'].reason}); {sealed.AGAIN}"
        )


# What may not stand in one table: by name, how it is read of a score.
ALIKE = {
    "track": lambda score: score.identity.track,
    "feature extractor": lambda score: score.extractor.sha256,
    "count of images": lambda score: score.samples,
    "count of reference images": lambda score: score.reference_samples,
}
ALIKE_IN_A_MODEL = {
    "dense model": lambda score: score.inputs.get("dense/model.safetensors"),
    "recovery settings": lambda score: score.settings.get("model", {}).get("recovery"),
}


def _check_comparable(sources: list[Source]) -> None:
    """Refuse what no table may mix.

    Raises:
        UserError: names two records and what differs.
    """
    scores = [source for source in sources if isinstance(source.record, Score)]
    _check_alike(sources, {"track": ALIKE["track"]})
    _check_alike(scores, ALIKE)
    for base in {(source.cell.model, source.cell.dense_seed) for source in scores}:
        own = [s for s in scores if (s.cell.model, s.cell.dense_seed) == base]
        _check_alike(own, ALIKE_IN_A_MODEL)


def _check_alike(sources: list[Source], readers: Mapping) -> None:
    for name, read in readers.items():
        first = sources[0] if sources else None
        for source in sources:
            if (found := read(source.record)) != (wanted := read(first.record)):
                raise UserError(
                    f"one table can't hold {first.path} and {source.path}: their {name} differs "
                    f"({_short(wanted)} and {_short(found)}); delete the one that is not of this "
                    "run and run again"
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def cell_frame(sources: list[Source], expected: Iterable[Mapping] | None = None) -> pd.DataFrame:
    """One line per cell, found or expected; `status` is "ok", "failed" or "missing"."""
    titles = {source.cell.method: _labels(source.record) for source in sources}
    cells = {source.key: _cell(source) for source in sources}
    for key in sorted({cell_key(cell) for cell in expected or ()} - set(cells)):
        cell = dict(zip(CELL, key, strict=True))
        unknown = dict.fromkeys(LABELS, "") | {"title": cell["method"]}
        cells[key] = cell | {"status": "missing"} | titles.get(cell["method"], unknown)
    columns = [*CELL, "status", *LABELS, "expected", "share", "details", "samples", "features",
               "sampler", "steps", "taught_steps", "alone", *MEASURES]  # fmt: skip
    frame = pd.DataFrame([cells[key] for key in sorted(cells)], columns=columns)
    several = frame.dense_seed.nunique() > 1
    frame["base"] = [
        f"{cell.model}-dense{cell.dense_seed}" if several else cell.model
        for cell in frame.itertuples()
    ]
    frame["combination"] = _combinations(frame)
    return frame.astype(dict.fromkeys(MEASURES, float))


def _combinations(cells: pd.DataFrame) -> list[str]:
    """What tells the combinations of a board apart: "int8, few"; "" where there is one."""
    axes = [name for name in ("cell_precision", "sampling") if cells[name].nunique() > 1]
    return [", ".join(values) for values in cells[axes].itertuples(index=False)]


def _labels(record: Score | Failed) -> dict:
    labels = {name: getattr(record.labels, name) for name in LABELS}
    if labels["guessed"]:
        labels["notes"] = f"criterion assumed: {labels['guessed']}. {labels['notes']}".strip()
    return labels


def _cell(source: Source) -> dict:
    record = source.record
    cell = dict(zip(CELL, source.key, strict=True))
    cell |= {"status": record.status} | _labels(record)
    if isinstance(record, Failed):
        return cell
    cell |= {name: _number(measure.read(record)) for name, measure in MEASURES.items()}
    cell |= {"share": _share(record), "details": _details(record), "expected": record.expected}
    cell |= {"samples": record.samples, "features": features(record)}
    cell |= {"alone": ALONE[record.latency.alone]}
    cell |= {"sampler": record.sampling.sampler, "steps": record.sampling.steps}
    return cell | {"taught_steps": record.student.steps is not None}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def features(score: Score) -> str:
    """Whose features a FID is of: "domain classifier 7e76b078"."""
    name = EXTRACTORS.get(score.extractor.name, score.extractor.name)
    return f"{name} {score.extractor.sha256[:HASH]}"


def _share(score: Score) -> str:
    """How a plan fixes its own share of the parameters: "2:4", "uniform"; "" where it does not."""
    return "" if score.plan.pattern in (None, "unstructured") else score.plan.pattern


def _details(score: Score) -> str:
    """What a method and the timing want said beside the row, in one line."""
    kernels = score.latency.kernels
    reason = kernels.reason if kernels else ""
    summary = str(score.plan.notes.get("summary", ""))
    return "; ".join(filter(None, (summary, reason, _training(score))))


def _training(score: Score) -> str:
    """How training differed from whole batches on one device, if it did."""
    words = {}
    for how in score.trainings.values():
        if how.micro_batch and how.batch and how.micro_batch * how.processes < how.batch:
            words[f"micro-batches of {how.micro_batch} for a batch of {how.batch}"] = None
        if how.processes > 1:
            words[f"trained on {how.processes} GPUs"] = None
    return ", ".join(words)


def aggregate(cells: pd.DataFrame, compares: str = "selections") -> pd.DataFrame:
    """One line per row with `<measure>_mean` and `<measure>_sd` (ddof 1), ranked and ordered."""
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
    row = dict(zip(ROW, key, strict=True)) | {"status": best.status, "base": best.base}
    row["combination"] = best.combination
    row |= {name: best[name] for name in (*LABELS, "expected")}
    row |= {"control": bool(best.control), "reconstruction": bool(best.reconstruction)}
    row |= {"seeds_ok": len(ok), "seeds_expected": len(cells)}
    row |= {"samples": ok.samples.min(), "sampler": best.sampler, "steps": ok.steps.max()}
    row |= {"taught_steps": (ok.taught_steps == True).any()}  # noqa: E712 - missing is not
    told = ("share", "details", "features")
    row |= {name: best[name] if best.status == "ok" else "" for name in told}
    row |= {"timed_alone": (ok.alone == ALONE[True]).sum()}
    row |= {"timed_beside": (ok.alone == ALONE[False]).sum()}
    row["budget"] = row["recovery"].rpartition("-")[2]
    row["smoke"] = bool((ok.samples < MINIMUM_SAMPLES).any())
    for name in MEASURES:
        row[f"{name}_mean"], row[f"{name}_sd"] = _spread(ok[name].dropna().tolist())
    return row


def _unpublished(rows: pd.DataFrame) -> pd.Series:
    """Why nothing may be cited of a row's model; "" where the dense model is as it should be."""
    reasons = dict.fromkeys(rows.base, "")
    for row in rows[rows.expected.notna()].drop_duplicates("base").itertuples():
        dense = rows[(rows.base == row.base) & (rows.kind == "none") & is_reference(rows)]
        dense = dense[dense.status == "ok"]
        usual = (dense.cell_precision == first_precision(rows)) & (dense.sampling == DEFAULT)
        dense = dense[usual]
        found = dense.fid_mean.iloc[0] if len(dense) else math.nan
        wanted = row.expected
        if not abs(found - wanted.fid) <= wanted.tolerance:
            words = f"is {found:.2f}" if len(dense) else "is not known"
            reasons[row.base] = (
                f"{row.base} is unpublished: the dense model's FID {words}, not "
                f"{wanted.fid:g} ± {wanted.tolerance:g} ({wanted.source})"
            )
    return rows.base.map(reasons)


def _spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, correctly rounded: equal values have exactly none."""
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def is_reference(rows: pd.DataFrame) -> pd.Series:
    """Which rows are the dense model as it was trained, with all or fewer sampling steps."""
    return rows.kind.isin(REFERENCE_KINDS) & (rows.recovery == "none")


def reference(row: pd.Series) -> bool:
    """As `is_reference`, of one row."""
    return row.kind in REFERENCE_KINDS and row.recovery == "none"


def worse_by(name: str, value: float, other: float) -> float:
    """How much worse `value` is than `other`: positive whichever way the measure points."""
    return value - other if MEASURES[name].better == "lower" else other - value


def _ranks(rows: pd.DataFrame, group: tuple[str, ...]) -> pd.Series:
    citable = (rows.unpublished == "") & (rows.guessed == "")
    ranked = rows[(rows.status == "ok") & ~is_reference(rows) & citable]
    cost = worse_by("fid", ranked.fid_mean, 0.0)
    groups = cost.groupby([ranked[name] for name in group])
    ranks = groups.rank(method="min").astype("Int64")
    return ranks.where(groups.transform("size") > 1)  # alone in its group, a row is not first


def p_value(row: pd.Series, other: pd.Series) -> float:
    """Of Welch's t-test of two mean FIDs; 1 where one has a single seed, which tells nothing."""
    if min(row.seeds_ok, other.seeds_ok) < 2:
        return 1.0
    if row.fid_sd == other.fid_sd == 0:
        return float(row.fid_mean == other.fid_mean)
    test = ttest_ind_from_stats(
        row.fid_mean, row.fid_sd, row.seeds_ok,
        other.fid_mean, other.fid_sd, other.seeds_ok,
        equal_var=False,
    )  # fmt: skip
    return float(test.pvalue)


def indistinguishable(row: pd.Series, other: pd.Series) -> bool:
    """Whether two mean FIDs are not significantly different."""
    return p_value(row, other) >= SIGNIFICANCE


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
    dense = rows[is_reference(rows) & (rows.base == row.base) & (rows.status == "ok")]
    dense = dense[dense.cell_precision == row.cell_precision]
    dense = dense[dense.speedup_mean.notna()].sort_values(["steps", "speedup_mean"])
    if row.status != "ok" or reference(row) or dense.empty:
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
    """By model: references, then each group by rank, with failed and missing rows last.

    Rows whose criterion is a guess are a group of their own behind those of their kind.
    """
    order = {name: place for place, name in enumerate(recovery_order(rows))}
    keys = pd.DataFrame({
        "base": rows.base, "pruned": ~is_reference(rows),
        "section": rows.section.map(lambda name: order.get(name, 0)), "name": rows.section,
        "sparsity": rows.sparsity, "share": rows["share"],
        "budget": rows.groupby("budget").recovery_images_mean.transform("max").fillna(0),
        "guessed": rows.guessed != "",
        "precision": rows.cell_precision.map(PRECISIONS.index),
        "way": rows.sampling.where(rows.sampling != DEFAULT, ""),
        "status": rows.status.map(OUTCOMES), "rank": rows["rank"].astype(float),
        "steps": -rows.steps.astype(float), "method": rows.method, "recovery": rows.recovery,
    })  # fmt: skip
    keys.loc[~keys.pruned, ["section", "sparsity", "budget"]] = 0
    keys.loc[~keys.pruned, "name"] = ""
    return rows.loc[keys.sort_values(list(keys.columns)).index].reset_index(drop=True)
