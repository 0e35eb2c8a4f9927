"""The live view as plain text."""

import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from prunebench.errors import UserError
from prunebench.progress.jobs import SHOWN, STATES, Records, Survey, plan, survey
from prunebench.tracks import Track

EVERYTHING = "all"  # what `snakemake everything` makes
MOST = 20  # lines of one list
LENGTH = 160  # characters of a reason
CLEAR = "\033[H\033[2J\033[3J"  # a terminal's screen


def show(track: Track, division: str | None, runs: Path, records: Records | None = None) -> str:
    """How far the jobs of a division (None: the default one; "all") are, as lines of text."""
    return "\n".join(_lines(track, _survey(track, division, runs, records or Records()), division))


def watch(track: Track, division: str | None, runs: Path, seconds: float) -> None:
    """Print the view every `seconds` until nothing is left to wait for or Ctrl-C is pressed."""
    if not seconds > 0:
        raise UserError(f"--watch {seconds:g}: give the seconds between two looks, more than 0")
    records = Records()
    try:
        while True:
            seen = _survey(track, division, runs, records)
            text = "\n".join(_lines(track, seen, division))
            sys.stdout.write(f"{CLEAR if sys.stdout.isatty() else ''}{text}\n\n")
            sys.stdout.flush()
            if {finding.state for finding in seen.found.values()} <= {"done", "failed"}:
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return


def _survey(track: Track, division: str | None, runs: Path, records: Records) -> Survey:
    everything = division == EVERYTHING
    names = list(track.divisions) if everything else [division or track.default_division]
    return survey(track, plan(track, names, runs, oracle=everything), runs, records)


def _lines(track: Track, seen: Survey, division: str | None) -> list[str]:
    blocks = [
        _summary(track, seen, division or track.default_division),
        _stages(seen),
        _running(seen),
        _stopped(seen),
        _failed(seen),
    ]
    return [line for block in blocks if block for line in (*block, "")][:-1]


# ---- what is left


def _summary(track: Track, seen: Survey, division: str) -> list[str]:
    count = Counter(map(seen.cell_state, seen.plan.cells))
    total, done = len(seen.plan.cells), count["done"]
    name = "all divisions and the oracle" if division == EVERYTHING else division
    parts = [f"{count[state]:,} {state}" for state in STATES if state != "done" and count[state]]
    cells = f"{done:,} of {total:,} cells done ({done / total:.0%})"
    lines = [f"{track.name}, {name}: " + ", ".join([cells, *parts]), _run(seen)]
    if seen.blind:
        lines.append(f"  Not all of its jobs can be seen from here: {seen.blind}.")
    return [*lines, _hours(seen), *_estimate(seen)]


def _run(seen: Survey) -> str:
    run = seen.run
    if run is None or run.ended:
        working = any(finding.state in ("running", "queued") for finding in seen.found.values())
        return "No workflow is running" + (", but jobs of it are." if working else ".")
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
    known = "" if run.here else ", which can't be seen from here"
    place = f"on {run.host} at {began}: process {run.pid}{known}"
    return f"The workflow (track {run.track}) was started {place}."


def _hours(seen: Survey) -> str:
    gpu = cpu = 0.0
    for finding in seen.found.values():
        if finding.cost and finding.cost["gpu"]:
            gpu += finding.cost["wall_s"] * finding.cost["processes"]
        elif finding.cost:
            cpu += finding.cost["wall_s"]
    return f"Spent in finished jobs: {gpu / 3600:,.2f} GPU hours, {cpu / 3600:,.2f} hours on CPUs."


def _estimate(seen: Survey) -> list[str]:
    """Work that is left and for how long it lasts, from the mean times of finished jobs."""
    means, work, unknown, left = seen.means, 0.0, Counter(), 0
    for record, job in seen.plan.jobs.items():
        finding = seen.found[record]
        if finding.state in ("done", "failed"):
            continue
        left += 1
        mean = means.get((job.stage, job.model), means.get((job.stage, None)))
        if mean is None:
            unknown[job.stage] += 1
        else:
            spent = max((one.seconds for one in finding.work if not one.queued), default=0.0)
            work += max(0.0, mean - spent)
    if not left:
        return ["Nothing is left to do."]
    if not means:
        return [f"{left:,} jobs are left; no estimate before the first of them have finished."]
    lines = [
        f"{left:,} jobs are left, by estimate {_duration(work)} of work{_at_once(seen, work)}."
    ]
    if unknown:
        names = ", ".join(f"{count:,} {stage}" for stage, count in unknown.items())
        lines.append(f"  Not in the estimate, because none has finished: {names}.")
    return lines


def _at_once(seen: Survey, work: float) -> str:
    at_work = sum(len(f.work) for f in seen.found.values() if f.state == "running")
    local = seen.run is None or seen.run.local
    slots = at_work or (local and ((seen.run and seen.run.cores) or os.cpu_count()))
    if not slots:
        return ""
    words = "as now" if at_work else "which the cores allow"
    return f"; {slots} at a time, {words}: {_duration(work / slots)}"


# ---- tables and lists


def _stages(seen: Survey) -> list[str]:
    means, found = seen.means, {}
    for record, job in seen.plan.jobs.items():
        found.setdefault(job.stage, []).append(seen.found[record])
    shown = STATES[1:-1]
    rows = [["stage", "finished", *shown, "mean", "hours"]]
    for stage in (stage for stage in SHOWN if stage in found):
        count = Counter(finding.state for finding in found[stage])
        hours = sum(finding.cost["wall_s"] for finding in found[stage] if finding.cost) / 3600
        mean = _duration(means[stage, None]) if (stage, None) in means else "-"
        finished = f"{count['done'] + count['failed']:,}/{len(found[stage]):,}"
        counts = [f"{count[state]:,}" if count[state] else "-" for state in shown]
        rows.append([stage, finished, *counts, mean, f"{hours:,.2f}"])
    return _table(rows, numbers=True)


def _running(seen: Survey) -> list[str]:
    rows = []
    for record, finding in seen.found.items():
        if finding.state == "running":
            job, first = seen.plan.jobs[record], finding.work[0]
            more = f" and {len(finding.work) - 1} more" if len(finding.work) > 1 else ""
            age = _duration(first.seconds) if first.seconds else ""
            rows.append([f"  {job.stage}", job.name, age, first.where + more, finding.reason])
    return ["Running:", *_cut(_table(rows))] if rows else []


def _stopped(seen: Survey) -> list[str]:
    """Lost jobs by reason, with a log to read and how many cells wait for them."""
    stopped = {r: finding for r, finding in seen.found.items() if finding.state == "stopped"}
    waiting: dict[str, set] = {record: set() for record in stopped}
    for cell, records in seen.plan.cells.items() if stopped else ():
        for record in waiting.keys() & {*records, *seen.plan.shared[cell]}:
            waiting[record].add(cell)
    blocks = []
    for alike in _alike({r: (seen.plan.jobs[r].stage, f.reason) for r, f in stopped.items()}):
        cells = len(set().union(*(waiting[record] for record in alike)))
        finding = stopped[alike[0]]
        blocks.append([
            f"  {len(alike):,} x {seen.plan.jobs[alike[0]].stage}: {_short(finding.reason)}",
            f"      cells that wait for it: {cells:,}; for example {seen.plan.jobs[alike[0]].name}",
            *(f"      log: {log}" for log in finding.logs),
        ])  # fmt: skip
    return _list("Stopped without a result; the same snakemake command tries them again:", blocks)


def _failed(seen: Survey) -> list[str]:
    """Cells that failed by their own fault, by reason, with a log to read."""
    found = {records[-1]: seen.failure(cell) for cell, records in seen.plan.cells.items()}
    failures = {record: failure for record, failure in found.items() if failure}
    blocks = []
    for alike in _alike({r: (each["stage"], each["error"]) for r, each in failures.items()}):
        failure = failures[alike[0]]
        blocks.append([
            f"  {len(alike):,} x {failure['stage']}: {_short(failure['error'])}",
            f"      for example {seen.plan.jobs[alike[0]].name}",
            f"      log: {failure['log']}",
        ])  # fmt: skip
    return _list(
        "Failed cells; they are results, run again only when their method changes:", blocks
    )


def _alike(reasons: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    """Keys whose stage and reason are the same but for numbers; the largest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, (stage, reason) in reasons.items():
        groups.setdefault((stage, re.sub(r"\d+", "0", reason)), []).append(key)
    return sorted(groups.values(), key=len, reverse=True)


def _list(head: str, blocks: list[list[str]]) -> list[str]:
    if not blocks:
        return []
    lines = [head, *(line for block in blocks[:MOST] for line in block)]
    left = len(blocks) - MOST
    return lines + ([f"  and {left:,} more reasons"] if left > 0 else [])


def _cut(lines: list[str]) -> list[str]:
    return lines[:MOST] + ([f"  and {len(lines) - MOST:,} more"] if len(lines) > MOST else [])


def _table(rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """Aligned columns; all but the first to the right where they are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if numbers and place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _short(reason: str) -> str:
    """A reason on one line of a bearable length."""
    return textwrap.shorten(reason, LENGTH, placeholder=" ...")


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
