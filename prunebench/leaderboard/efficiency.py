"""The tables of an efficiency track: a pure function of its records."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from prunebench.leaderboard import writers
from prunebench.leaderboard.caption import commits, machine
from prunebench.leaderboard.publish import publish
from prunebench.leaderboard.tables import percent
from prunebench.leaderboard.writers import (
    NOTHING,
    Column,
    Document,
    Ending,
    Table,
    escape_markdown,
    plain_lines,
)
from prunebench.records import sealed, upgrade
from prunebench.records.parts import Costs
from prunebench.records.schema import Efficiency, ForwardTiming
from prunebench.tracks.settings_efficiency import Claim, Condition

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


def _fewer(size: Costs) -> str:
    return f"{size.dense_macs / size.macs:.2f}×"


def _fewer_without(size: Costs) -> str:
    dense = size.dense_macs_without_attention_products
    return f"{dense / size.macs_without_attention_products:.2f}×"


def _asked(record: Efficiency) -> str:
    asked = record.asked
    if asked.kind == "none":
        return NOTHING
    if asked.layers is not None:
        return f"{len(asked.layers)} named layers"
    share = f"{percent(asked.sparsity)} " if asked.sparsity is not None else ""
    units = f" ({len(record.layers)})" if record.layers else ""
    return f"{share}{KINDS[asked.kind]}{units}"


COUNTED = (  # of a record
    Column("Plan", lambda r: r.identity.plan, False),
    Column("Removed", _asked, False),
    Column("Reached", lambda r: f"{r.size.sparsity_reached:.1%}"),
    Column("Parameters", lambda r: f"{r.size.parameters:,}"),
    Column("GMACs", lambda r: f"{r.size.macs / 1e9:,.2f}"),
    Column("Fewer", lambda r: _fewer(r.size)),
    Column(
        "GMACs without attention products",
        lambda r: f"{r.size.macs_without_attention_products / 1e9:,.2f}",
    ),
    Column("Fewer without", lambda r: _fewer_without(r.size)),
)
MEASURED = (  # of a record and one of its timings
    Column("Plan", lambda rt: rt[0].identity.plan, False),
    Column("Precision", lambda rt: rt[1].precision, False),
    Column("Mode", lambda rt: rt[1].mode, False),
    Column("Batch", lambda rt: f"{rt[1].batch}"),
    Column("ms", lambda rt: f"{rt[1].ms:.3g}"),
    Column("IQR (ms)", lambda rt: f"{rt[1].iqr_ms:.2g}"),
    Column("Dense (ms)", lambda rt: f"{rt[1].dense_ms:.3g}"),
    Column("Speed-up", lambda rt: _speedup(rt[1])),
    Column("Images/s", lambda rt: f"{rt[1].images_per_s:.4g}"),
    Column("Peak memory (MB)", lambda rt: f"{rt[1].peak_memory_mb:,.0f}"),
    Column("Dense peak (MB)", lambda rt: f"{rt[1].dense_peak_memory_mb:,.0f}"),
    Column("Alone", lambda rt: {True: "yes", False: "no", None: NOTHING}[rt[1].alone], False),
)
CLAIMED = (  # of a claim of the track, its record (or None) and the timing beside it (or None)
    Column("Published", lambda c: c[0].title, False),
    Column("Speed-up", lambda c: f"{c[0].speedup:.2f}×"),
    Column("Measured here", lambda c: _speedup(c[2]) if c[2] else NOT_HERE),
    Column("Fewer MACs here", lambda c: _fewer(c[1].size) if c[1] else NOTHING),
    Column("Row", lambda c: f"{c[0].model}, {c[0].plan}", False),
    Column(
        "Measured at",
        lambda c: "{precision}, {mode}, batch {batch}".format_map(dict(c[0].beside)),
        False,
    ),
    Column("Source", lambda c: f"{c[0].paper}: {c[0].source}", False),
    Column("Their conditions", lambda c: c[0].conditions, False),
    Column("Why they may differ", lambda c: c[0].differs, False),
)


def _speedup(timing: ForwardTiming) -> str:
    return f"{1 / timing.ratio:.2f}×"


def build(track, files: Sequence[Path], out: Path, older: bool = False) -> None:
    """Write the tables of an efficiency track and copies of its records; same inputs, same bytes.

    Args:
        track: a `prunebench.tracks.efficiency.Track`.
        files: its records, or those that exist.
        out: a folder; what an earlier build wrote there and no longer belongs there is removed.
        older: whether records of schema 1, which nothing seals, are read too.

    Raises:
        UserError: a file is no record of such a row.
    """
    contents = [Path(file).read_bytes() for file in files]
    parse = (upgrade if older else sealed).parse
    records = [parse(file, content) for file, content in zip(files, contents, strict=True)]
    raw = {_raw_name(r): content for r, content in zip(records, contents, strict=True)}
    texts = {name: text.encode() for name, text in published(track, records).items()}
    publish(out, texts | raw)


def _raw_name(record: Efficiency) -> str:
    return f"raw/{record.identity.model}/{record.identity.plan}.json"


def published(track, records: Sequence[Efficiency]) -> dict[str, str]:
    """The texts by file name."""
    board = document(track, records)
    page = writers.to_html("efficiency.html.j2", board=board)
    return writers.formats(board, board, page, numbers(records))


def document(track, records: Sequence[Efficiency]) -> Document:
    """The board of a track's records."""
    found = [record for record in records if record.size]
    problems = [_name(r) + r.failure.error for r in records if r.failure] + _failed_timings(found)
    missing = len(track.rows()) - len(records)
    problems += [f"{missing} rows are not finished"] if missing else []
    claims = track.settings.published
    entries, warnings = writers.bibliography([claim.bibtex for claim in claims])
    if len({record.provenance.code for record in records}) > 1:
        warnings.append("The rows were made by different versions of the code.")
    return Document(
        title=track.settings.title,
        tables=[_claims(claims, found), *_of_models(found)],
        conditions=_conditions(records),
        legend=LEGEND,
        warnings=warnings,
        endings=[Ending("Not there", [escape_markdown(p) for p in problems])] if problems else [],
        wide=True,
        entries=entries,
    )


def _claims(claims: Sequence[Claim], records: Sequence[Efficiency]) -> Table:
    """Published speed-ups beside what was measured of the row that comes closest."""
    rows = {(record.identity.model, record.identity.plan): record for record in records}
    lines = []
    for claim in claims:
        record = rows.get((claim.model, claim.plan))
        timings = [t for r, t in _timings([record] if record else []) if _is_at(t, claim.beside)]
        lines.append((claim, record, timings[0] if timings else None))
    return Table("Published speed-ups", CLAIMED, plain_lines(CLAIMED, lines), label="claims")


def _is_at(timing: ForwardTiming, place: Condition) -> bool:
    return all(getattr(timing, key) == value for key, value in place)


def _timings(records: Sequence[Efficiency]) -> Iterator[tuple[Efficiency, ForwardTiming]]:
    return ((record, t) for record in records for t in record.timings if t.failure is None)


def _of_models(records: Sequence[Efficiency]) -> Iterator[Table]:
    """Per model one table of what was counted and, where it was, one of what was measured."""
    for model in dict.fromkeys(record.identity.model for record in records):
        own = [record for record in records if record.identity.model == model]
        title = f"{own[0].title} ({model})"
        reasons = sorted({record.not_measured for record in own if record.not_measured})
        note = f"Latency, throughput, peak memory: not measured: {', '.join(reasons)}."
        lines = plain_lines(COUNTED, own)
        yield Table(title, COUNTED, lines, note if reasons else "", label=model)
        times = list(_timings(own))
        if times:
            lines = plain_lines(MEASURED, times)
            yield Table(f"{title}, measured", MEASURED, lines, label=f"{model}:measured")


def _name(record: Efficiency) -> str:
    return f"{record.identity.model}, {record.identity.plan}: "


def _failed_timings(records: Sequence[Efficiency]) -> list[str]:
    return [
        f"{_name(record)}not timed in {t.precision}, {t.mode}, batch {t.batch}: {t.failure}"
        for record in records for t in record.timings if t.failure
    ]  # fmt: skip


def _conditions(records: Sequence[Efficiency]) -> dict[str, str]:
    """Where and with what the records were made."""
    made = [record.provenance for record in records]
    told = {
        "Machine": {machine(one) for one in made},
        "Versions": {
            ", ".join(f"{name} {one.packages[name]}" for name in ("torch", "diffusers", "timm"))
            + f", Python {one.python}"
            for one in made
        },
        "Commit": commits(made),
        "Date": {one.date[:10] for one in made},
        "Seed": {str(record.seed) for record in records},
    }
    return {label: "; ".join(sorted(texts)) for label, texts in told.items()}


def numbers(records: Sequence[Efficiency]) -> pd.DataFrame:
    """A line per row and condition of measurement; a row that was not measured has one, and why."""
    lines = []
    for record in records:
        own = record.identity
        common = {"track": own.track, "model": own.model, "plan": own.plan,
                  "kind": record.asked.kind, "sparsity": record.asked.sparsity,
                  "status": record.status,
                  "failure": record.failure.error if record.failure else None,
                  **(record.size.model_dump() if record.size else {})}  # fmt: skip
        reason = record.not_measured
        common["not_measured"] = f"not measured: {reason}" if reason else None
        for timing in record.timings or (None,):
            found = timing.model_dump(exclude={"kernels", "failure"}) if timing else {}
            lines.append({**common, **found, "timing_failure": timing and timing.failure})
    return pd.DataFrame(lines)
