"""The tables of an efficiency track: a pure function of its records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

from prunebench.leaderboard.tables import NOTHING, escape_latex, escape_markdown, percent
from prunebench.records.artefacts import read_record, write_atomically

OWNED = "raw/**/*.json"
NOT_HERE = "not measured here"
KINDS = {"none": "dense", "layers": "layers", "widths": "widths", "uniform": "channels",
         "2:4": "2:4 mask"}  # fmt: skip
LEGEND = (
    "Parameters: elements of the state dict, as in docs/models.md. Reached: the share of trainable "
    "parameters removed, or with 2:4 zeroed.",
    "GMACs: billions of multiply-accumulates of one forward pass of one image, all of them, and "
    "without the products of two activations in attention, because papers use both. Fewer: dense "
    "divided by pruned. A 2:4 mask leaves the count as it is: kernels skip its zeros.",
    "Which blocks and channels go is drawn with the track's seed. For widths that does not change "
    "the cost; for layers it does where blocks differ in size (UNets).",
    "Speed-up: dense time divided by pruned time of one forward pass, the two taking turns. Peak "
    "memory: the weights and what one pass allocates. Not alone: other processes were at work.",
)


@dataclass(frozen=True)
class Column:
    label: str
    text: Callable[[Mapping], str]
    numeric: bool = True


def _fewer(size: Mapping, name: str) -> str:
    return f"{size[f'dense_{name}'] / size[name]:.2f}×"


def _asked(record: Mapping) -> str:
    asked = record["asked"]
    if asked["kind"] == "none":
        return NOTHING
    if "layers" in asked:
        return f"{len(asked['layers'])} named layers"
    share = f"{percent(asked['sparsity'])} " if "sparsity" in asked else ""
    units = f" ({len(record['layers'])})" if record["layers"] else ""
    return f"{share}{KINDS[asked['kind']]}{units}"


COUNTED = (
    Column("Plan", lambda r: r["row"]["plan"], False),
    Column("Removed", _asked, False),
    Column("Reached", lambda r: f"{r['size']['sparsity_reached']:.1%}"),
    Column("Parameters", lambda r: f"{r['size']['parameters']:,}"),
    Column("GMACs", lambda r: f"{r['size']['macs'] / 1e9:,.2f}"),
    Column("Fewer", lambda r: _fewer(r["size"], "macs")),
    Column(
        "GMACs without attention products",
        lambda r: f"{r['size']['macs_without_attention_products'] / 1e9:,.2f}",
    ),
    Column("Fewer without", lambda r: _fewer(r["size"], "macs_without_attention_products")),
)
MEASURED = (
    Column("Plan", lambda t: t["plan"], False),
    Column("Precision", lambda t: t["precision"], False),
    Column("Mode", lambda t: t["mode"], False),
    Column("Batch", lambda t: f"{t['batch']}"),
    Column("ms", lambda t: f"{t['ms']:.3g}"),
    Column("IQR (ms)", lambda t: f"{t['iqr_ms']:.2g}"),
    Column("Dense (ms)", lambda t: f"{t['dense_ms']:.3g}"),
    Column("Speed-up", lambda t: f"{1 / t['ratio']:.2f}×"),
    Column("Images/s", lambda t: f"{t['images_per_s']:.4g}"),
    Column("Peak memory (MB)", lambda t: f"{t['peak_memory_mb']:,.0f}"),
    Column("Dense peak (MB)", lambda t: f"{t['dense_peak_memory_mb']:,.0f}"),
    Column("Alone", lambda t: {True: "yes", False: "no", None: NOTHING}[t["alone"]], False),
)
CLAIMED = (
    Column("Published", lambda c: c["title"], False),
    Column("Speed-up", lambda c: f"{c['speedup']:.2f}×"),
    Column("Measured here", lambda c: c["measured"]),
    Column("Fewer MACs here", lambda c: c["fewer"]),
    Column("Row", lambda c: f"{c['model']}, {c['plan']}", False),
    Column("Measured at", lambda c: "{precision}, {mode}, batch {batch}".format_map(c["beside"]),
           False),
    Column("Source", lambda c: f"{c['paper']}: {c['source']}", False),
    Column("Their conditions", lambda c: c["conditions"], False),
    Column("Why they may differ", lambda c: c["differs"], False),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A heading, a line of text (or none) and rows of texts under columns."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""


def _table(title: str, columns: Sequence[Column], content: Sequence[Mapping], note="") -> Table:
    return Table(title, columns, [[c.text(entry) for c in columns] for entry in content], note)


def build(track, files: Sequence[Path], out: Path) -> None:
    """Write the tables of an efficiency track and copies of its records; same inputs, same bytes.

    Args:
        track: a `prunebench.tracks.efficiency.Track`.
        files: its records, or those that exist.
        out: a folder; copies of records that no longer belong there are removed.
    """
    records = [read_record(file) for file in files]
    texts = published(track, records)
    raw = {_raw_name(r): Path(f).read_bytes() for r, f in zip(records, files, strict=True)}
    for file in Path(out).glob(OWNED):
        if file.relative_to(out).as_posix() not in raw:
            file.unlink()
    for name, content in {**{k: v.encode() for k, v in texts.items()}, **raw}.items():
        write_atomically(Path(out) / name, lambda path, content=content: path.write_bytes(content))


def _raw_name(record: Mapping) -> str:
    return f"raw/{record['row']['model']}/{record['row']['plan']}.json"


def published(track, records: Sequence[Mapping]) -> dict[str, str]:
    """The texts by file name."""
    title, found = track.content["title"], [r for r in records if r["status"] == "ok"]
    tables = [_claims(track, found), *_of_models(found)]
    notes = [*_conditions(records), *LEGEND]
    problems = [
        f"{r['row']['model']}, {r['row']['plan']}: {r['failure']}" for r in records
        if r["status"] != "ok"
    ]  # fmt: skip
    problems += _failed_timings(found)
    missing = len(track.rows()) - len(records)
    problems += [f"{missing} rows are not finished"] if missing else []
    entries = [claim["bibtex"].strip() for claim in track.content.get("published", ())
               if "bibtex" in claim]  # fmt: skip
    return {
        "leaderboard.csv": to_csv(records),
        "leaderboard.md": to_markdown(title, tables, notes, problems),
        "leaderboard.tex": to_latex(title, tables, notes),
        "leaderboard.html": to_html(title, tables, notes, problems),
        "leaderboard.bib": "".join(f"{entry}\n\n" for entry in entries),
    }


def _claims(track, records: Sequence[Mapping]) -> Table:
    """Published speed-ups beside what was measured of the row that comes closest."""
    rows = {(r["row"]["model"], r["row"]["plan"]): r for r in records}
    claims = []
    for claim in track.content.get("published", ()):
        record = rows.get((claim["model"], claim["plan"]), {})
        times = [t for t in record.get("timings", ()) if _is_at(t, claim["beside"]) and "ms" in t]
        measured = f"{1 / times[0]['ratio']:.2f}×" if times else NOT_HERE
        fewer = _fewer(record["size"], "macs") if record else NOTHING
        claims.append({**claim, "measured": measured, "fewer": fewer})
    return _table("Published speed-ups", CLAIMED, claims)


def _is_at(timing: Mapping, place: Mapping) -> bool:
    return all(timing[key] == value for key, value in place.items())


def _of_models(records: Sequence[Mapping]) -> list[Table]:
    """Per model one table of what was counted and, where it was, one of what was measured."""
    tables = []
    for model in dict.fromkeys(r["row"]["model"] for r in records):
        own = [r for r in records if r["row"]["model"] == model]
        title = f"{own[0]['title']} ({model})"
        reasons = sorted({r["not_measured"] for r in own if r["not_measured"]})
        note = f"Latency, throughput, peak memory: not measured: {', '.join(reasons)}."
        tables.append(_table(title, COUNTED, own, note if reasons else ""))
        times = [{**t, "plan": r["row"]["plan"]} for r in own for t in r["timings"] if "ms" in t]
        if times:
            tables.append(_table(f"{title}, measured", MEASURED, times))
    return tables


def _failed_timings(records: Sequence[Mapping]) -> list[str]:
    return [
        f"{r['row']['model']}, {r['row']['plan']}: not timed in {t['precision']}, {t['mode']}, "
        f"batch {t['batch']}: {t['failure']}"
        for r in records for t in r["timings"] if "failure" in t
    ]  # fmt: skip


def _conditions(records: Sequence[Mapping]) -> list[str]:
    """Where and with what the records were made."""
    made = [r["provenance"] for r in records]
    lines = []
    for label, texts in {
        "Machine": {f"{p['gpu'] or 'no GPU'}; {p['cpu']}, {p['cores']} cores" for p in made},
        "Versions": {f"torch {p['packages']['torch']}, diffusers {p['packages']['diffusers']}, "
                     f"timm {p['packages']['timm']}, Python {p['python']}" for p in made},
        "Commit": {(p["commit"] or "none")[:12] + (", edited" if p["dirty"] else "")
                   for p in made},
        "Date": {p["date"][:10] for p in made},
        "Seed": {str(r["seed"]) for r in records},
    }.items():  # fmt: skip
        lines.append(f"{label}: {'; '.join(sorted(texts))}.")
    if len({p["code"] for p in made}) > 1:
        lines.append("Warning: the rows were made by different versions of the code.")
    return lines


def to_csv(records: Sequence[Mapping]) -> str:
    """A line per row and condition of measurement; a row that was not measured has one, and why."""
    lines = []
    for record in records:
        common = {**record["row"], "kind": record["asked"]["kind"],
                  "sparsity": record["asked"].get("sparsity"), "status": record["status"],
                  "failure": record["failure"], **record.get("size", {})}  # fmt: skip
        reason = record.get("not_measured")
        common["not_measured"] = f"not measured: {reason}" if reason else None
        for timing in record.get("timings") or [{}]:
            numbers = {k: v for k, v in timing.items() if k not in ("kernels", "failure")}
            lines.append({**common, **numbers, "timing_failure": timing.get("failure")})
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def to_markdown(title: str, tables: Sequence[Table], notes: Sequence[str],
                problems: Sequence[str]) -> str:  # fmt: skip
    blocks = [f"# {escape_markdown(title)}", _markdown_list(notes)]
    for table in tables:
        lines = [[column.label for column in table.columns],
                 ["---:" if column.numeric else ":---" for column in table.columns]]  # fmt: skip
        lines += [[escape_markdown(cell) for cell in row] for row in table.rows]
        blocks += [f"## {escape_markdown(table.title)}", escape_markdown(table.note)]
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if problems:
        blocks += ["## Not there", _markdown_list(problems)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _markdown_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def to_latex(title: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables to \\input; the document needs booktabs and graphicx. The first carries the notes."""
    blocks = ["% \\usepackage{booktabs,graphicx}; entries in leaderboard.bib"]
    for number, table in enumerate(tables):
        text = " ".join([f"{title}: {table.title}.", table.note, *(notes if not number else ())])
        form = "".join("r" if column.numeric else "l" for column in table.columns)
        lines = [[column.label for column in table.columns], *table.rows]
        head, *body = (" & ".join(map(escape_latex, line)) + r" \\" for line in lines)
        blocks.append("\n".join([
            r"\begin{table*}[t]", r"\centering", rf"\caption{{{escape_latex(text)}}}",
            r"\smallskip", r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{@{{}}{form}@{{}}}}", r"\toprule", head, r"\midrule", *body,
            r"\bottomrule", r"\end{tabular}}", r"\end{table*}",
        ]))  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def to_html(title: str, tables: Sequence[Table], notes: Sequence[str],
            problems: Sequence[str]) -> str:  # fmt: skip
    """One self-contained page; all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("efficiency.html.j2").render(
        title=title, tables=tables, notes=notes, problems=problems
    )
