"""What a reader must know of a board: what was measured, where, by which code, what to mind."""

from collections.abc import Callable, Iterable

import pandas as pd

from prunebench.leaderboard.collect import ALONE, CLEANFID_TOLERANCE, Source, cell_name, features
from prunebench.leaderboard.measures import MEASURES
from prunebench.records.parts import Machine, Provenance
from prunebench.records.schema import Score
from prunebench.tracks.cells import DEFAULT


def caption(sources: list[Source], cells: pd.DataFrame) -> dict[str, str]:
    """What was measured, where and with which code, as label: text."""
    scores, made = _scores(sources), [source.record.provenance for source in sources]
    text = {
        "Track": sources[0].cell.track,
        "Cells": _progress(cells),
        "Date": max(one.date for one in made)[:10],
        "Commit": ", ".join(commits(made)),
        "Hardware": "; ".join(hardware(sources)),
        "Timing": _timing(cells),
        "Software": ", ".join(_torches(made)),
        "Features": "; ".join(sorted({features(score) for score in scores})),
        "Samples": _counts(scores, lambda score: score.samples) + " images per cell",
        "Reference": _counts(scores, lambda score: score.reference_samples) + " images",
        "Sampling": "; ".join(_sampling(cells)),
        "Dense models": _dense(cells),
        "Not available": "; ".join(_unavailable(scores)),
        "Not gated": "; ".join(_ungated(scores)),
    }
    return {label: value for label, value in text.items() if value}


def _scores(sources: Iterable[Source]) -> list[Score]:
    return [source.record for source in sources if isinstance(source.record, Score)]


def commits(made: Iterable[Provenance]) -> list[str]:
    """The commits that records were made at, "-dirty" where files differed from them."""
    return sorted({(one.commit or "unknown")[:10] + "-dirty" * one.dirty for one in made})


def _torches(made: Iterable[Provenance]) -> list[str]:
    return sorted({f"torch {one.packages.get('torch')}" for one in made})


def machine(one: Machine) -> str:
    return f"{one.cpu}, {one.cores} cores, {one.gpu or 'no GPU'}"


def hardware(sources: list[Source]) -> list[str]:
    """What latency was measured on; where it was not, what the record was written on."""
    return sorted({machine(_timed_on(source)) for source in sources})


def _timed_on(source: Source) -> Machine:
    stages = source.record.stages if isinstance(source.record, Score) else {}
    return stages["cost"].machine if "cost" in stages else source.record.provenance


def _counts(scores: list[Score], read: Callable[[Score], int]) -> str:
    return " or ".join(f"{count:,}" for count in sorted(set(map(read, scores)))) or "no"


def _dense(cells: pd.DataFrame) -> str:
    """On how many dense trainings the rows of a model rest."""
    seeds = cells.groupby("model").dense_seed.nunique()
    if (seeds == 1).all():
        return "one training each: another one may change the order of rows"
    return ", ".join(f"{name}: {count} trainings" for name, count in seeds.items())


def _unavailable(scores: list[Score]) -> list[str]:
    """Optional metrics that have no value in any record, and why."""
    reasons: dict[str, set[str]] = {}
    for score in scores:
        for name, quality in score.quality.items():
            if MEASURES[name].optional and quality.value is None:
                reasons.setdefault(name, set()).add(quality.reason)
    return sorted(
        f"{MEASURES[n].label}: {reason}" for n, told in reasons.items() for reason in told
    )


def _ungated(scores: list[Score]) -> list[str]:
    """Models as released whose dense FID was held against none."""
    names = {s.identity.model for s in scores if s.released and s.expected is None}
    return [f"{name}: ranked without a published FID to reach first" for name in sorted(names)]


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
    alike = ["model", "sampling"]
    found = full.sort_values("steps").drop_duplicates(alike, keep="last").sort_values(alike)
    names = ["" if name == DEFAULT else f" ({name})" for name in found.sampling]
    return [
        f"{c.model}{name}: {c.sampler}, {int(c.steps)} steps"
        for c, name in zip(found.itertuples(), names, strict=True)
    ]


def warnings(sources: list[Source], cells: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What a reader must know before comparing rows."""
    found = []
    made = [source.record.provenance for source in sources]
    codes = {one.code for one in made}
    codes |= {stage.code for score in _scores(sources) for stage in score.stages.values()}
    if len(codes) > 1:
        found.append(f"The cells were made by {len(codes)} different versions of the code.")
    if len(torches := _torches(made)) > 1:
        found.append(f"The cells were made with different versions: {', '.join(torches)}.")
    if len(hardware(sources)) > 1:
        found.append("The cells ran on different hardware: latencies do not compare across rows.")
    found += _other_settings(sources)
    found += [f"{reason}." for reason in sorted(set(rows.unpublished) - {""})]
    gap = (cells.fid_cleanfid - cells.fid).abs() / cells.fid.abs()
    for cell in cells[gap > CLEANFID_TOLERANCE].itertuples():
        found.append(f"clean-fid disagrees with FID on {cell_name(cell)}: "
                     f"{cell.fid_cleanfid:.4f} against {cell.fid:.4f}.")  # fmt: skip
    return found


def _other_settings(sources: list[Source]) -> list[str]:
    """Sections of the track in which records of one model differ."""
    found: dict[tuple[str, str], list[object]] = {}
    for score in _scores(sources):
        for section, content in score.settings.items():
            values = found.setdefault((score.identity.model, section), [])
            if content not in values:
                values.append(content)
    return [
        f"Cells of {model} were made with different settings: {section}."
        for (model, section), values in sorted(found.items()) if len(values) > 1
    ]  # fmt: skip
