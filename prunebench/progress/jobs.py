"""The jobs a track's divisions ask for, and what is known of each: finished, at work or lost."""

import itertools
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from prunebench.progress import activity
from prunebench.progress.activity import Work
from prunebench.records import sealed
from prunebench.records.artefacts import training_folder
from prunebench.runtime.run import Run, read_run
from prunebench.tracks import RUNS, Cell, Layout, Paths, Track, as_dict
from prunebench.tracks.stages import NEEDY, STAGES

SHOWN = tuple(name for name in NEEDY if name not in ("shard", "efficiency"))  # as a job of its own
STATES = ("done", "failed", "running", "queued", "stopped", "waiting")
FRESH = 900  # s without a word, after which a job that can't be seen from here counts as stopped
TAIL = 4096  # bytes of a log that are read


@dataclass(frozen=True)
class Job:
    """One job of the workflow: a stage of a cell, or what several cells start from.

    Attributes:
        stage: its name, which its rule has too.
        name: the folders of its record, which are those of its log too.
        model: that it is about, "" without one.
        wildcards: as Snakemake's Slurm plugin names them in comments and folders of logs.
        shards: the jobs that draw the images which this one gathers, if several do. Their records
            go when they are gathered.
    """

    stage: str
    name: str
    model: str
    wildcards: str
    record: str
    log: str
    shards: tuple["Job", ...] = ()

    @property
    def comment(self) -> str:
        """The Slurm job's."""
        return f"rule_{self.stage}" + (f"_wildcards_{self.wildcards}" if self.wildcards else "")

    @property
    def parts(self) -> tuple["Job", ...]:
        return self, *self.shards


@dataclass
class Plan:
    """Jobs by record.

    Attributes:
        cells: of each cell the records of its own stages, its score's last.
        shared: of each cell the records that others start from too.
    """

    layout: Layout
    runs: Path
    jobs: dict[str, Job] = field(default_factory=dict)
    cells: dict[Cell, list[str]] = field(default_factory=dict)
    shared: dict[Cell, list[str]] = field(default_factory=dict)

    def add(self, stage: str, shards: Iterable[int] = (), **names: object) -> str:
        """Take up the job of a stage, given what it is called with; returns its record."""
        record = self.layout.record(stage, **names)
        if record not in self.jobs:
            self.jobs[record] = self._job(stage, record, names, shards)
        return record

    def _job(self, stage: str, record: str, names: Mapping, shards: Iterable[int]) -> Job:
        wildcards = self.layout.wildcards(stage, names)
        values = [str(wildcards[name]) for name in STAGES[stage].wildcards]
        folders = record[len(self.layout.root) + 1 :].rpartition("/")[0]
        parts = {i: self.layout.record("shard", **names, shard=i) for i in shards}
        return Job(
            stage,
            folders.removesuffix(f"/{stage}"),
            str(names.get("model", "")),
            "_".join(values).replace("/", "_"),
            record,
            self.layout.log(record),
            tuple(self._job("shard", r, {**names, "shard": i}, ()) for i, r in parts.items()),
        )

    def add_cell(self, cell: Cell) -> None:
        track, names = self.layout.track, as_dict(cell)
        paths = Paths(track, cell, self.runs)
        dense = self.add("dense", model=cell.model, dense_seed=cell.dense_seed)
        self.shared[cell] = [paths.extractor, dense, paths.dense_sample]
        stages = [name for name in SHOWN if STAGES[name].of_cells]
        if cell.recovery == "none":
            stages.remove("recover")
        several = range(track.shards if track.shards > 1 else 0)
        self.cells[cell] = [
            self.add(stage, several if stage == "sample" else (), **names) for stage in stages
        ]


def plan(track: Track, divisions: Iterable[str], runs: Path, oracle: bool = False) -> Plan:
    """What the divisions ask for, as the rules of the workflow make it."""
    made = Plan(Layout(track, runs), runs)
    made.add("extractor")
    coders = [m.coders.values() for m in track.settings.models.values()]
    for name in dict.fromkeys(itertools.chain.from_iterable(coders)):
        if track.coder(name)[1].own:
            made.add("coder", coder=name)
        made.add("encode", coder=name)
    for names in track.decoders():
        made.add("decoder", **names)
    for cell in itertools.chain.from_iterable(map(track.cells, divisions)):
        if cell not in made.cells:
            made.add_cell(cell)
    for place in track.oracle() if oracle else ():
        made.add("dense", model=place["model"], dense_seed=place["dense_seed"])
        made.add("oracle", **place)
    return made


# ---- what is known of a job


@dataclass(frozen=True)
class Finding:
    """What is known of one job.

    Attributes:
        state: one of STATES.
        cost: what a finished job's record says, see sealed.skim.
        work: the jobs of a running or queued one, several where it is drawn in shards.
        reason: why a stopped one stopped, or the last word of a running one.
        logs: where to read on.
    """

    state: str
    cost: dict | None = None
    work: tuple[Work, ...] = ()
    reason: str = ""
    logs: tuple[str, ...] = ()


WAITING = Finding("waiting")


@dataclass
class Survey:
    """Everything that a view shows.

    Attributes:
        run: the workflow that was last started in the folder.
        blind: why jobs may be at work that can't be seen from here, "" if none can.
    """

    plan: Plan
    found: dict[str, Finding]
    run: Run | None
    blind: str

    @cached_property
    def means(self) -> dict[tuple[str, str | None], float]:
        """Mean seconds of jobs that went well by (stage, model); by (stage, None) over models."""
        times: dict[tuple[str, str | None], list[float]] = {}
        for record, job in self.plan.jobs.items():
            if self.found[record].state == "done":
                for key in ((job.stage, job.model), (job.stage, None)):
                    times.setdefault(key, []).append(self.found[record].cost["wall_s"])
        return {key: statistics.fmean(values) for key, values in times.items()}

    def cell_state(self, cell: Cell) -> str:
        """A cell is done with its score, and else what of its own jobs catches the eye first."""
        records = self.plan.cells[cell]
        if self.found[records[-1]].state == "done":
            return "done"
        own = {self.found[record].state for record in records}
        shown = ("failed", "running", "stopped")  # a failure is only passed on by later stages
        return next((state for state in shown if state in own), "waiting")

    def failure(self, cell: Cell) -> dict | None:
        """Stage, error and log of a failed cell."""
        found = (self.found[record] for record in self.plan.cells[cell])
        return next((each.cost["failure"] for each in found if each.state == "failed"), None)


class Records:
    """Costs of finished jobs; a record is read again only when it has changed."""

    def __init__(self):
        self.known: dict[str, tuple] = {}

    def read(self, records: Iterable[str]) -> dict[str, dict | str]:
        """By record, of those that are there: its cost, or in words why it can't be read."""
        found = ((record, self._cost(record)) for record in records)
        return {record: cost for record, cost in found if cost is not None}

    def _cost(self, record: str) -> dict | str | None:
        try:
            status = os.stat(record)  # noqa: PTH116 (of tens of thousands; Path takes as long again)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if self.known.get(record, (None,))[0] != stamp:
                self.known[record] = stamp, sealed.skim(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return f"its record {record} can't be read ({error}); delete it and run again"
        return self.known[record][1]


def survey(track: Track, planned: Plan, runs: Path, records: Records) -> Survey:
    """Look at everything once."""
    costs = records.read(planned.jobs)
    run = read_run(runs.parent)
    work, blind = _work(track, planned, runs, run)
    slurm = SlurmLogs(runs.parent)
    found = {}
    for record, job in planned.jobs.items():
        if record in costs:
            found[record] = _finished(costs[record])
        elif record in work:
            found[record] = _at_work(job, work[record])
        else:
            found[record] = _unseen(job, slurm, blind)
    # A job that ended while we looked had no record before and was not at work after.
    suspects = [record for record, finding in found.items() if finding.state == "stopped"]
    found |= {record: _finished(cost) for record, cost in records.read(suspects).items()}
    return Survey(planned, found, run, blind)


def _work(
    track: Track, planned: Plan, runs: Path, run: Run | None
) -> tuple[dict[str, list[Work]], str]:
    """Work by record, and why there may be more than can be seen from here."""
    work, (entries, problem) = activity.in_processes(track, runs), activity.queue()
    if entries and (run is None or run.track == track.name):  # comments do not name the track
        comments = {part.comment: job.record for job in planned.jobs.values() for part in job.parts}
        queued, unknown = activity.in_slurm(entries, comments, runs)
        work |= queued
        problem = problem or (f"{unknown} Slurm jobs do not tell what they run" if unknown else "")
    if run is None or (run.ended and run.local):
        return work, ""
    if run.local:
        return work, "" if run.here else f"its jobs run on {run.host}"
    if run.track != track.name and not run.ended:
        return work, f"a run of track {run.track} is marked, which may hide one of this track"
    return work, problem


def _finished(cost: dict | str) -> Finding:
    if isinstance(cost, str):
        return Finding("stopped", reason=cost)
    return Finding("done" if cost["status"] == "ok" else "failed", cost)


def _at_work(job: Job, work: list[Work]) -> Finding:
    running = tuple(one for one in work if not one.queued)
    if not running:
        return Finding("queued", work=tuple(work))
    log = max((part.log for part in job.parts), key=_touched)
    return Finding("running", work=running, reason=last_word(read_tail(log)))


def _unseen(job: Job, slurm: "SlurmLogs", blind: str) -> Finding:
    """A job without a record that is not seen at work: lost, or out of sight, or not yet begun."""
    for part in job.parts:
        if part.stage == "shard" and Path(part.record).exists():
            continue  # drawn, and not yet gathered
        log = part.log
        touched, official = _touched(log), slurm.newest(part)
        if not touched and not official:
            continue
        saved = _touched(training_folder(job.record))
        own, silent = read_tail(log), time.time() - max(touched, saved)
        if blind and silent < FRESH:
            work = Work(f"seen {silent:.0f} s ago", 0.0)
            return Finding("running", work=(work,), reason=last_word(own))
        reason = why_stopped(own, read_tail(official) if official else "")
        logs = tuple(map(str, filter(None, (log if touched else "", official))))
        return Finding("stopped", reason=reason, logs=logs)
    return WAITING


def _touched(path: str | Path) -> float:
    """When a file or folder was last written, seconds since the epoch; 0 without it."""
    try:
        return os.stat(path).st_mtime  # noqa: PTH116 (as above)
    except OSError:
        return 0.0


# ---- logs


class SlurmLogs:
    """What Slurm wrote of the jobs; the plugin deletes the logs of those that went well."""

    def __init__(self, home: Path):
        self.home, self.folder = f"{home}/", home / ".snakemake" / "slurm_logs"
        self.names: dict[str, set[str]] = {}  # of the folders, by rule

    def newest(self, part: Job) -> Path | None:
        """The part's last log, if it is of the same track, which the folders do not tell."""
        rule = self.folder / f"rule_{part.stage}"
        if part.stage not in self.names:
            self.names[part.stage] = {path.name for path in rule.glob("*")}
        names = self.names[part.stage]
        if not names or (part.wildcards and part.wildcards not in names):
            return None
        logs = sorted((rule / part.wildcards).glob("*.log"), key=_touched, reverse=True)
        return next((log for log in logs if self._concerns(_text(log), part)), None)

    def _concerns(self, text: str, part: Job) -> bool:
        """A log names the records of its job, unless that was killed before it could write them."""
        return part.record.removeprefix(self.home) in text or f" {RUNS}/" not in text


def _text(log: str | Path, most: int | None = None) -> str:
    """A log, or its last `most` bytes; "" without one."""
    try:
        with Path(log).open("rb") as handle:
            if most:
                handle.seek(max(0, os.fstat(handle.fileno()).st_size - most))
            return handle.read().decode(errors="replace")
    except OSError:
        return ""


def read_tail(log: str | Path) -> str:
    return _text(log, TAIL)


STAMP = re.compile(r"^\d\d:\d\d:\d\d ")
ERROR = re.compile(
    r"^(prunebench: (?!.*importing everything here$)|[\w.]*(Error|Exception|Interrupt)\b)"
    r"|\b(Killed|Terminated|Segmentation fault|Bus error)\b"
)
STEP = re.compile(r"^slurmstepd\S*: error: ")
SLURM = re.compile(STEP.pattern + r"|DUE TO|CANCELLED|oom.kill|out.of.memory", re.IGNORECASE)


def last_word(text: str) -> str:
    """The last line of a running job's log, without its time: "train 40/400"."""
    lines = [line for line in text.splitlines() if STAMP.match(line)]
    return STAMP.sub("", lines[-1]).strip() if lines else ""


def why_stopped(own: str, slurm: str = "") -> str:
    """The line that says best why a job ended, from the ends of its own log and of Slurm's."""
    for text, pattern in ((own, ERROR), (slurm, SLURM), (slurm, ERROR)):
        lines = [line.strip() for line in text.splitlines() if pattern.search(line)]
        if lines:
            return STEP.sub("", lines[-1]).strip("* ")
    word = last_word(own)
    return "killed, or its machine lost: the log ends without an error" + (
        f", after “{word}”" if word else ""
    )
