"""The columns and tables of a benchmark's board. Numbers become text here and nowhere else."""

import dataclasses
import math
from collections.abc import Iterator

import pandas as pd

from prunebench.leaderboard.collect import (
    ALONE,
    COMPARISONS,
    MINIMUM_SAMPLES,
    REFERENCE_KINDS,
    ROW,
    SIGNIFICANCE,
    is_reference,
    reference,
)
from prunebench.leaderboard.measures import MEASURES, Measure
from prunebench.leaderboard.writers import NOTHING, Cell, Column, Line, Table, bibtex_key

ARROWS = {"lower": "\u00a0↓", "higher": "\u00a0↑", "": ""}  # no line break before them
VERDICTS = {"better": "+", "worse": "−", "same": "≈", "": ""}

RANK = (
    "Rank: by mean FID inside one {words}; plans that fix their own share of the parameters (N:M; "
    "uniform, the same share of every width) are ranked apart. “2 (=3)” is second, and not "
    f"significantly different from 3 others of its group (Welch's t-test, p ≥ {SIGNIFICANCE}, "
    "uncorrected). A row with one seed is not significantly different from any. Seeds vary "
    "calibration, recovery, sampling noise and random masks, not the dense model."
)
LEGEND = (
    "Dense at equal latency: FID of the dense model with the most sampling steps (in parentheses) "
    "that is measured to be as fast as the row; + the pruned row is better, − worse, ≈ not "
    "significantly different. * no dense row is that fast, the fastest is shown.",
    "ref: the dense model, with all or fewer sampling steps; shown, not ranked.",
    "control: a baseline that a method ought to beat; ranked like a method.",
    "† reconstruction: parts of the paper were not available and had to be filled in.",
    "not alone: timed while other processes used the CPU or the GPU; its speed may be off.",
    "unpublished: the dense model does not reproduce its published FID; the rows of this model are "
    "not ranked and not to be cited.",
    f"smoke: fewer than {MINIMUM_SAMPLES:,} samples, too few for a FID to be cited.",
    f"{NOTHING}: not measured; failed and unfinished rows come last in their group.",
)


def legend(compares: str) -> list[str]:
    """What a reader of a board must know; `compares` is a key of collect.COMPARISONS."""
    return [RANK.format(words=COMPARISONS[compares].words), *LEGEND]


def assumptions(rows: pd.DataFrame) -> list[str]:
    """What the rows of a board assume that no publication states, for its legend."""
    guessed = rows[rows.guessed != ""].drop_duplicates("method")
    if guessed.empty:
        return []
    return [
        "criterion assumed: what goes follows a guess, because the paper's criterion itself was "
        "not available; shown, not ranked, and no paper is cited for it.",
        *(f"{row.title} assumes: {row.guessed}." for row in guessed.itertuples()),
    ]


def number(measure: Measure, value: float, sd: float = math.nan) -> str:
    """A mean, with its standard deviation where the measure prints one."""
    if math.isnan(value):
        return measure.null
    text = _digits(measure, value)
    return f"{text} ± {_digits(measure, sd)}" if measure.spread and not math.isnan(sd) else text


def _digits(measure: Measure, value: float) -> str:
    value *= measure.scale
    if measure.format != "sig":
        return format(value, measure.format)
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"


def heading(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.label}{unit}{ARROWS[measure.better]}"


def marks(row: pd.Series) -> list[str]:
    """What a reader must know about a row, in words."""
    found = [row.combination] if row.combination else []
    if ("steps" in row.kind.split("+") or row.taught_steps) and row.status == "ok":
        found.append(f"{int(row.steps)} steps")
    if row.control and not reference(row):
        found.append("control")
    if row.guessed:
        found.append("criterion assumed")
    if row.recovery not in ("none", row.section):
        found.append(row.recovered_by)
    if row.unpublished:
        found.append("unpublished")
    if row.smoke:
        found.append("smoke")
    if row.timed_beside:
        found.append(_share_of_seeds(row.timed_beside, row, "not alone"))
    if row.status != "ok":
        found.append({"failed": "failed", "missing": "not finished"}[row.status])
    elif row.seeds_ok < row.seeds_expected:
        found.append(f"{row.seeds_ok}/{row.seeds_expected} seeds")
    return found


def _share_of_seeds(count: int, row: pd.Series, words: str) -> str:
    return words if count == row.seeds_ok else f"{count}/{row.seeds_ok} {words}"


def title(row: pd.Series) -> str:
    return row.title + ("†" if row.reconstruction else "")


def _method(row: pd.Series) -> str:
    return title(row) + (f" ({', '.join(marks(row))})" if marks(row) else "")


def _rank(row: pd.Series) -> str:
    if row.status == "ok" and reference(row):
        return "ref"
    if pd.isna(row["rank"]):
        return NOTHING
    return f"{row['rank']}" + (f" (={row.ties})" if row.ties else "")


def _sparsity(row: pd.Series) -> str:
    if row.kind in REFERENCE_KINDS:
        return NOTHING
    return f"{percent(row.sparsity)} {row['share']}".strip()


def _alone(row: pd.Series) -> str:
    if row.status != "ok":
        return NOTHING
    if not row.timed_alone + row.timed_beside:
        return ALONE[None]
    return _share_of_seeds(row.timed_alone, row, "yes") if row.timed_alone else "no"


def _equal_latency(row: pd.Series) -> str:
    if math.isnan(row.equal_latency_fid):
        return NOTHING
    star = "" if row.equal_latency_reached else "*"
    fid = number(MEASURES["fid"], row.equal_latency_fid)
    return f"{fid} ({int(row.equal_latency_steps)}){star} {VERDICTS[row.equal_latency_verdict]}"


def _measure_column(name: str, key: bool) -> Column:
    measure = MEASURES[name]

    def text(row: pd.Series) -> str:
        if row.status != "ok":
            return NOTHING
        return number(measure, row[f"{name}_mean"], row[f"{name}_sd"])

    return Column(
        name=name, label=heading(measure), help=measure.help, text=text, key=key,
        value=lambda row: row[f"{name}_mean"],
    )  # fmt: skip


def _word(name: str, label: str, help_: str, key: bool = False) -> Column:
    def read(row: pd.Series) -> str:
        return row[name]

    return Column(name=name, label=label, help=help_, value=read, text=read, key=key, numeric=False)


def _columns() -> list[Column]:
    identity = [
        Column(name="rank", label="Rank", help="Rank by mean FID among the rows that it compares "
               "with (see the legend); (=k): not significantly different from k others",
               value=lambda row: row["rank"], text=_rank, key=True),
        Column(name="title", label="Method", help="What was removed by which rule",
               value=lambda row: row.title.lower(), text=_method, key=True, numeric=False),
        _word("base", "Model", "The dense model that was pruned"),
        _word("kind", "Unit", "What is removed: whole layers, widths (channels, heads, neurons), "
              "single weights (masks), sampling steps, or none; several joined by +", True),
        Column(name="sparsity", label="Sparsity", help="Target fraction of the parameters removed; "
               "with “uniform” of the channels of every width, with N:M of each masked matrix",
               value=lambda row: row.sparsity, text=_sparsity, key=True),
        _word("recovery", "Recovery", "How the pruned model was trained, and its budget"),
    ]  # fmt: skip
    equal = Column(
        name="equal_latency",
        label=f"Dense at equal latency (steps){ARROWS[MEASURES['fid'].better]}",
        help="FID of the dense model with as many sampling steps as fit into this row's latency; "
        "+ the pruned row is better, − worse, ≈ not significantly different, * even the fastest is "
        "slower",
        value=lambda row: row.equal_latency_fid,
        text=_equal_latency,
        key=True,
    )
    alone = Column(
        name="alone", label="Timed alone", help="Whether the machine was quiet while this row was "
        "timed: no other process used the CPU or the GPU", value=lambda row: row.timed_alone,
        text=_alone, numeric=False,
    )  # fmt: skip
    seeds = Column(
        name="seeds", label="Seeds", help="Finished of planned seeds",
        value=lambda row: row.seeds_ok, text=lambda row: f"{row.seeds_ok}/{row.seeds_expected}",
    )  # fmt: skip
    key = ("fid", "kid", "lpips", "sparsity_reached", "macs", "speedup", "student_images",
           "selection_images", "selection_wall_s", "oracle_beaten", "oracle_gap")  # fmt: skip
    measures = [_measure_column(name, name in key) for name in MEASURES]
    place = list(MEASURES).index("speedup") + 1
    return [*identity, *measures[:place], equal, *measures[place:], alone, seeds]


COLUMNS = _columns()
# What does not fit a conference's 5.5 inches; sparsity stands in the lines between groups.
UNPRINTED = ("kind", "sparsity", "kid", "lpips", "sampling_ms", "selection_images",
             "selection_wall_s", "oracle_gap")  # fmt: skip


def columns(rows: pd.DataFrame) -> list[Column]:
    """Every column of a board, but those optional ones that no row has; FID names its features."""
    shown = [column for column in COLUMNS if column.name not in _absent(rows)]
    return [_named(column, rows) if column.name == "fid" else column for column in shown]


def _absent(rows: pd.DataFrame) -> set[str]:
    return {n for n, m in MEASURES.items() if m.optional and rows[f"{n}_mean"].isna().all()}


def fid_label(rows: pd.DataFrame) -> str:
    """FID and whose: "FID (domain classifier 7e76b078, 2,048)"."""
    ok = rows[rows.status == "ok"]
    found = sorted({f"{row.features}, {row.samples:,}" for row in ok.itertuples()})
    return f"FID ({'; '.join(found)})" if found else "FID"


def _named(column: Column, rows: pd.DataFrame) -> Column:
    return dataclasses.replace(column, label=f"{fid_label(rows)}{ARROWS[MEASURES['fid'].better]}")


def readable(rows: pd.DataFrame) -> list[Column]:
    """The readable subset of a board's columns."""
    return [column for column in columns(rows) if column.key]


def printed(rows: pd.DataFrame) -> list[Column]:
    """What of it fits a paper."""
    return [column for column in readable(rows) if column.name not in UNPRINTED]


def sections(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """One printed table per model and section, each opening with the model's references."""
    for base, own in rows.groupby("base"):
        references, pruned = own[is_reference(own)], own[~is_reference(own)]
        for section in pruned.section.unique():
            yield base, section, pd.concat([references, pruned[pruned.section == section]])
        if pruned.empty:
            yield base, "none", references


def tables(rows: pd.DataFrame, shown: list[Column]) -> list[Table]:
    """The printed tables with these columns; leaderboard.csv holds everything."""
    return [
        Table(
            title=f"{base}, {'no recovery' if section == 'none' else section}",
            columns=shown,
            lines=[_line(row, shown) for _, row in part.iterrows()],
            label=f"{base}:{section}",
        )
        for base, section, part in sections(rows)
    ]


def _line(row: pd.Series, shown: list[Column]) -> Line:
    assumed = ", criterion assumed" if row.guessed else ""
    group = "" if row.kind in REFERENCE_KINDS else f"sparsity {_sparsity(row)}{assumed}"
    return Line([_cell(column, row) for column in shown], group)


def _cell(column: Column, row: pd.Series) -> Cell:
    """A cell of a narrow table: only FID keeps its standard deviation."""
    text = column.text(row)
    if column.name == "fid":
        return Cell(text, bold=is_best(row))
    cite = bibtex_key(row.bibtex) if column.name == "title" else ""
    return Cell(text.partition(" ± ")[0], cite=cite)


def is_best(row: pd.Series) -> bool:
    return bool(pd.notna(row["rank"]) and row["rank"] == 1)


def numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """What leaderboard.csv holds: every row at full precision, in the units of score.json."""
    found = [name for name in MEASURES if name not in _absent(rows)]
    first = [*ROW, "recovered_by", "share", "title", "kind", "control", "reconstruction", "status",
             "seeds_ok", "seeds_expected", "samples", "features", "smoke", "unpublished", "sampler",
             "steps", "rank", "ties", "timed_alone", "timed_beside"]  # fmt: skip
    parts = [f"{name}_{part}" for name in found for part in ("mean", "sd")]
    equal = [name for name in rows.columns if name.startswith("equal_latency_")]
    return rows[[*first, *parts, *equal, "paper", "notes", "details"]]
