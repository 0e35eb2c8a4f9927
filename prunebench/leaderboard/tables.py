"""The rows as csv, Markdown, LaTeX and BibTeX. Numbers become text here and nowhere else."""

import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from prunebench.leaderboard.collect import (
    ALONE,
    COMPARISONS,
    METRICS,
    MINIMUM_SAMPLES,
    REFERENCE_KINDS,
    ROW,
    SIGNIFICANCE,
    Metric,
    is_reference,
)

NOTHING = "—"
ARROWS = {"lower": "\u00a0↓", "higher": "\u00a0↑", "": ""}  # no line break before them
VERDICTS = {"better": "+", "worse": "−", "same": "≈", "": ""}

RANK = (
    "Rank: by mean FID inside one {words}; plans that fix their own share of the parameters (N:M; "
    "uniform, the same share of every width) are ranked apart. “2 (=3)” is second, and Welch's "
    f"t-test (p ≥ {SIGNIFICANCE}, uncorrected) can't tell it from 3 others of its group. A row "
    "with one seed can't be told from any. Seeds vary calibration, recovery, sampling noise and "
    "random masks; there is one dense model, so nothing is said of other trainings."
)
LEGEND = (
    "Dense at equal latency: FID of the dense model with the most sampling steps (in parentheses) "
    "that is measured to be as fast as the row; + the pruned row is better, − worse, ≈ can't be "
    "told. * no dense row is that fast, the fastest is shown.",
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


@dataclass(frozen=True)
class Column:
    """One column of every printed table."""

    name: str
    label: str
    help: str
    value: Callable[[pd.Series], float | str]  # what it sorts by
    text: Callable[[pd.Series], str]  # what it shows, in plain Unicode
    key: bool = False  # part of the readable subset
    numeric: bool = True


def number(metric: Metric, value: float, sd: float = math.nan) -> str:
    """A mean, with its standard deviation where the metric prints one."""
    if math.isnan(value):
        return metric.null
    text = _digits(metric, value)
    return f"{text} ± {_digits(metric, sd)}" if metric.spread and not math.isnan(sd) else text


def _digits(metric: Metric, value: float) -> str:
    value *= metric.scale
    if metric.format != "sig":
        return format(value, metric.format)
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"


def heading(metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.label}{unit}{ARROWS[metric.better]}"


def marks(row: pd.Series) -> list[str]:
    """What a reader must know about a row, in words."""
    found = []
    if row.kind == "steps" and row.status == "ok":
        found.append(f"{int(row.steps)} steps")
    if row.control and row.kind not in REFERENCE_KINDS:
        found.append("control")
    if row.recovery not in ("none", row.section):
        found.append(row.healing)
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
    if row.status == "ok" and row.kind in REFERENCE_KINDS:
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
    fid = number(METRICS["fid"], row.equal_latency_fid)
    return f"{fid} ({int(row.equal_latency_steps)}){star} {VERDICTS[row.equal_latency_verdict]}"


def _metric_column(name: str, key: bool) -> Column:
    metric = METRICS[name]

    def text(row: pd.Series) -> str:
        if row.status != "ok":
            return NOTHING
        return number(metric, row[f"{name}_mean"], row[f"{name}_sd"])

    return Column(
        name, heading(metric), metric.help, lambda row: row[f"{name}_mean"], text, key
    )  # fmt: skip


def _word(name: str, label: str, help_: str, key: bool = False) -> Column:
    return Column(name, label, help_, lambda row: row[name], lambda row: row[name], key, False)


def _columns() -> list[Column]:
    identity = [
        Column("rank", "Rank", "Rank by mean FID among the rows that it compares with (see the "
               "legend); (=k): can't be told from k others", lambda row: row["rank"], _rank, True),
        Column("title", "Method", "What was removed by which rule",
               lambda row: row.title.lower(), _method, True, False),
        _word("model", "Model", "The dense model that was pruned"),
        _word("kind", "Unit", "What is removed: whole layers, widths (channels, heads, neurons), "
              "single weights (masks), sampling steps, or none", True),
        Column("sparsity", "Sparsity", "Target fraction of the parameters removed; with “uniform” "
               "of the channels of every width, with N:M of each masked matrix",
               lambda row: row.sparsity, _sparsity, True),
        _word("recovery", "Recovery", "How the pruned model was healed, and its budget"),
    ]  # fmt: skip
    equal = Column(
        "equal_latency", f"Dense at equal latency (steps){ARROWS[METRICS['fid'].better]}",
        "FID of the dense model with as many sampling steps as fit into this row's latency; "
        "+ the pruned row is better, − worse, ≈ can't be told, * even the fastest is slower",
        lambda row: row.equal_latency_fid, _equal_latency, True,
    )  # fmt: skip
    alone = Column(
        "alone", "Timed alone", "Whether the machine was quiet while this row was timed: no other "
        "process used the CPU or the GPU", lambda row: row.timed_alone, _alone, numeric=False,
    )  # fmt: skip
    seeds = Column(
        "seeds", "Seeds", "Finished of planned seeds", lambda row: row.seeds_ok,
        lambda row: f"{row.seeds_ok}/{row.seeds_expected}",
    )  # fmt: skip
    key = ("fid", "kid", "lpips", "sparsity_reached", "macs", "speedup", "student_images",
           "selection_images", "selection_wall_s", "oracle_beaten", "oracle_gap")  # fmt: skip
    metrics = [_metric_column(name, name in key) for name in METRICS]
    place = list(METRICS).index("speedup") + 1
    return [*identity, *metrics[:place], equal, *metrics[place:], alone, seeds]


COLUMNS = _columns()
KEY_COLUMNS = [column for column in COLUMNS if column.key]
# What fits a conference's 5.5 inches; sparsity stands in the lines between groups.
PRINTED = [column for column in KEY_COLUMNS
           if column.name not in ("kind", "sparsity", "kid", "lpips", "sampling_ms",
                                  "selection_images", "selection_wall_s",
                                  "oracle_gap")]  # fmt: skip


def short_text(column: Column, row: pd.Series) -> str:
    """A cell of a narrow table: only FID keeps its standard deviation."""
    text = column.text(row)
    return text if column.name == "fid" else text.partition(" ± ")[0]


def one_line(text: str) -> str:
    """Without line breaks; non-breaking spaces stay."""
    return re.sub(r"[ \t\r\n]+", " ", str(text)).strip(" ")


def printed(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """One printed table per model and section, each opening with the model's references."""
    for model, of_model in rows.groupby("model"):
        references = of_model[is_reference(of_model)]
        pruned = of_model[~is_reference(of_model)]
        for section in pruned.section.unique():
            yield model, section, pd.concat([references, pruned[pruned.section == section]])
        if pruned.empty:
            yield model, "none", references


def section_name(model: str, section: str) -> str:
    return f"{model}, {'no recovery' if section == 'none' else section}"


def present(columns: list[Column], rows: pd.DataFrame) -> list[Column]:
    """The columns without those optional ones that no row of the board has."""
    return [column for column in columns if column.name not in _absent(rows)]


def _absent(rows: pd.DataFrame) -> set[str]:
    return {n for n, m in METRICS.items() if m.optional and rows[f"{n}_mean"].isna().all()}


def to_csv(rows: pd.DataFrame) -> str:
    """Every row at full precision, in the units of metrics.json; absent numbers are empty."""
    found = [name for name in METRICS if name not in _absent(rows)]
    first = [*ROW, "healing", "share", "title", "kind", "control", "reconstruction", "status",
             "seeds_ok", "seeds_expected", "samples", "smoke", "unpublished", "sampler", "steps",
             "rank", "ties", "timed_alone", "timed_beside"]  # fmt: skip
    numbers = [f"{name}_{part}" for name in found for part in ("mean", "sd")]
    equal = [name for name in rows.columns if name.startswith("equal_latency_")]
    return rows[[*first, *numbers, *equal, "paper", "notes", "details"]].to_csv(
        index=False, lineterminator="\n"
    )


def is_best(row: pd.Series) -> bool:
    return bool(pd.notna(row["rank"]) and row["rank"] == 1)


# Markdown


def escape_markdown(text: str) -> str:
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _markdown_table(rows: pd.DataFrame, columns: list[Column]) -> list[str]:
    lines = [[column.label for column in columns]]
    lines.append(["---:" if column.numeric else ":---" for column in columns])
    for _, row in rows.iterrows():
        cells = [escape_markdown(short_text(column, row)) for column in columns]
        if is_best(row):
            place = [column.name for column in columns].index("fid")
            cells[place] = f"**{cells[place]}**"
        lines.append(cells)
    return ["| " + " | ".join(line) + " |" for line in lines]


def to_markdown(title: str, rows: pd.DataFrame, caption: dict[str, str], warnings: list[str],
                failed: list[dict], missing: list[str],
                compares: str = "selections") -> str:  # fmt: skip
    """The readable subset, one table per model and section; leaderboard.csv holds everything."""
    columns = present(KEY_COLUMNS, rows)
    blocks = [f"# {escape_markdown(title)}"]
    blocks += [f"> **Warning:** {escape_markdown(text)}" for text in warnings]
    blocks.append("\n".join(f"- **{k}:** {escape_markdown(v)}" for k, v in caption.items()))
    for model, section, part in printed(rows):
        blocks.append(f"## {escape_markdown(section_name(model, section))}")
        blocks.append("\n".join(_markdown_table(part, columns)))
    blocks.append("## Legend")
    blocks.append("\n".join(f"- {escape_markdown(text)}" for text in legend(compares)))
    if failed:
        blocks += ["## Failed cells", "\n".join(_markdown_failure(cell) for cell in failed)]
    if missing:
        blocks += ["## Cells not finished", unfinished(len(missing), caption["Track"])]
        blocks.append("\n".join(f"- `{name}`" for name in missing))
    return "\n\n".join(blocks) + "\n"


def unfinished(count: int, track: str) -> str:
    """Where to look for the reasons: logs of this moment are no part of a leaderboard."""
    return (
        f"{count:,} cells wait for jobs that have not run, are running or were lost to the "
        f"machine; `prunebench progress --track {track} --division all` says which, why and names "
        "the logs."
    )


def _markdown_failure(cell: dict) -> str:
    where = f"`{cell['name']}` failed in {escape_markdown(cell['stage'])}"
    return f"- {where}: {escape_markdown(cell['error'])} (log: {escape_markdown(cell['log'])})"


# LaTeX and BibTeX

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&",
    "#": r"\#", "$": r"\$", "~": r"\textasciitilde{}", "\u00a0": "~", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "—": "---", "±": r"$\pm$",
    "×": r"$\times$", "†": r"$^\dagger$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$",
    "≈": r"$\approx$", "≥": r"$\ge$", "∞": r"$\infty$", "⁻": "$^-$", "³": "$^3$", "“": "``",
    "”": "''", "*": r"$^*$", "é": r"\'e",
}  # fmt: skip


def escape_latex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in one_line(text))


def bibtex_key(entry: str) -> str:
    """The citation key of a BibTeX entry, "" when there is none."""
    found = re.match(r"\s*@\w+\s*\{\s*([^,\s{}]+)\s*,", entry)
    return found.group(1) if found else ""


def bibliography(rows: pd.DataFrame) -> tuple[dict[str, str], list[str]]:
    """Entries by key, and a warning for each key that two methods define differently."""
    entries, problems = {}, []
    for entry in sorted({text.strip() for text in rows.bibtex if bibtex_key(text)}):
        key = bibtex_key(entry)
        if key in entries:
            problems.append(f"Two methods give the BibTeX key {key} different entries.")
        entries.setdefault(key, entry)
    return dict(sorted(entries.items())), problems


def to_bibtex(entries: dict[str, str]) -> str:
    return "".join(f"{entry}\n\n" for entry in entries.values())


def _latex_cell(column: Column, row: pd.Series) -> str:
    text = escape_latex(short_text(column, row))
    if column.name == "fid" and is_best(row):
        return rf"\textbf{{{text}}}"
    if column.name == "title" and bibtex_key(row.bibtex):
        return rf"{text}~\cite{{{bibtex_key(row.bibtex)}}}"
    return text


def _latex_head(label: str) -> str:
    lines = textwrap.wrap(label, 9, break_long_words=False, break_on_hyphens=False)
    return r"\shortstack[r]{" + r" \\ ".join(map(escape_latex, lines)) + "}"


def _latex_rows(rows: pd.DataFrame, columns: list[Column]) -> list[str]:
    lines, previous = [], "references"
    for _, row in rows.iterrows():
        group = "references" if row.kind in REFERENCE_KINDS else _sparsity(row)
        if group != previous:
            text = escape_latex(f"sparsity {_sparsity(row)}")
            lines += [
                r"\midrule",
                rf"\multicolumn{{{len(columns)}}}{{@{{}}l}}{{\emph{{{text}}}}} \\",
            ]
        previous = group
        lines.append(" & ".join(_latex_cell(column, row) for column in columns) + r" \\")
    return lines


def _latex_table(name: str, rows: pd.DataFrame, text: str, columns: list[Column]) -> str:
    form = "".join("r" if column.numeric else "l" for column in columns)
    head = " & ".join(_latex_head(column.label) for column in columns) + r" \\"
    return "\n".join([
        r"\begin{table*}[t]", r"\centering", rf"\caption{{{text}}}",
        rf"\label{{tab:prunebench:{name}}}", r"\smallskip\scriptsize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{@{{}}{form}@{{}}}}", r"\toprule", head, r"\midrule",
        *_latex_rows(rows, columns), r"\bottomrule", r"\end{tabular}", r"\end{table*}",
    ])  # fmt: skip


def to_latex(title: str, rows: pd.DataFrame, caption: dict[str, str], warnings: list[str],
             compares: str = "selections") -> str:  # fmt: skip
    """Tables to \\input; the document needs booktabs and leaderboard.bib.

    The first caption carries the legend and the conditions of measurement.
    """
    conditions = " ".join(f"{label}: {text}." for label, text in caption.items())
    notes = " ".join([*warnings, *legend(compares)])
    tables = ["% \\usepackage{booktabs}; entries in leaderboard.bib"]
    columns = present(PRINTED, rows)
    for model, section, part in printed(rows):
        text = f"{title}: {section_name(model, section)}."
        if len(tables) == 1:
            text = f"{text} {conditions} {notes}"
        name = f"{model}:{section}"
        tables.append(_latex_table(name, part, escape_latex(text), columns))
    return "\n\n".join(tables) + "\n"
