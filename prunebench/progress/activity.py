"""Which jobs are at work now: in Slurm's queue, and among the processes of this machine."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from prunebench.cli import CELL_STAGES
from prunebench.errors import UserError
from prunebench.records.artefacts import write_json
from prunebench.tracks import RUNS, Cell, Layout, Paths, Track

# The record of each stage that is not a cell's, of the layout and the command's options.
SHARED: dict[str, Callable[[Layout, Mapping[str, str]], str]] = {
    "extractor": lambda layout, _: layout.extractor,
    "encode": lambda layout, given: (
        layout.prompts(given["--text-encoder"])
        if "--text-encoder" in given
        else layout.latents(given["--autoencoder"])
    ),
    "dense": lambda layout, given: layout.trained(given["--model"]),
    "oracle": lambda layout, given: layout.oracle(
        *(given[f"--{name}"] for name in ("model", "recovery", "seed", "mask"))
    ),
}
STAGES = (*SHARED, *CELL_STAGES)
MARK = ".snakemake/prunebench.run"  # who runs the workflow of a folder
QUEUE = ["squeue", "--me", "--noheader", "--format", "%i|%T|%M|%N|%k|%Z"]
QUEUE_SECONDS = 20  # a controller that is busy or down may take for ever


@dataclass(frozen=True)
class Work:
    """A job that is at work, or in Slurm's queue for it.

    Attributes:
        where: the process, or the Slurm job and its node.
        seconds: for how long it has been running.
        queued: it waits for resources.
    """

    where: str
    seconds: float
    queued: bool = False


# ---- the workflow's own process


@dataclass(frozen=True)
class Run:
    """A running workflow, as it describes itself.

    Attributes:
        started: seconds since the epoch.
        local: its jobs are processes of its own machine, not of a cluster.
    """

    track: str
    host: str
    pid: int
    started: float
    local: bool
    cores: int | None

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def ended(self) -> bool:
        """Whether it certainly is no more; of another machine's process nothing is known."""
        try:
            return self.here and psutil.Process(self.pid).create_time() > self.started
        except psutil.NoSuchProcess:
            return True


def mark_run(track: str, local: bool, cores: int | None) -> None:
    """Say that this process runs the workflow of the current folder, unless another one does."""
    other = read_run(Path())
    if other and other.here and not other.ended and other.pid != os.getpid():
        return  # as beside `partial --nolock`
    run = Run(track, socket.gethostname(), os.getpid(), time.time(), local, cores)
    write_json(Path(MARK), asdict(run))


def unmark_run() -> None:
    """Take back what `mark_run` said, if it was this process that said it."""
    run = read_run(Path())
    if run and run.here and run.pid == os.getpid():
        Path(MARK).unlink(missing_ok=True)


def only_run(lock: TextIO) -> bool:
    """Whether no other run holds the folder's lock; if so none can start until it is shared."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        share(lock)
        return False
    except OSError:  # no locks here, as on a Lustre mounted without: as if another run lived
        return False
    return True


def share(lock: TextIO) -> None:
    """Hold the lock with the other live runs: when the first one ends, the rest are still known."""
    with contextlib.suppress(OSError):  # no locks here
        fcntl.flock(lock, fcntl.LOCK_SH)


def read_run(home: Path) -> Run | None:
    """The run that a folder was last marked with; it may have been killed since."""
    try:
        return Run(**json.loads((home / MARK).read_text()))
    except (OSError, ValueError, TypeError):
        return None


# ---- Slurm


@dataclass(frozen=True)
class Queued:
    """One line of squeue."""

    number: str
    state: str
    seconds: float
    nodes: str
    comment: str
    folder: str

    @property
    def work(self) -> Work:
        place = f" on {self.nodes}" if self.nodes else ""
        return Work(f"Slurm job {self.number}{place}", self.seconds, self.state == "PENDING")


def queue() -> tuple[list[Queued], str]:
    """The user's jobs in Slurm, and why they are not known ("" if they are)."""
    if not shutil.which(QUEUE[0]):
        return [], "squeue is not installed here"
    try:
        answer = subprocess.run(
            QUEUE, capture_output=True, text=True, timeout=QUEUE_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        return [], f"squeue did not answer within {QUEUE_SECONDS} s"
    except (OSError, subprocess.CalledProcessError) as error:
        words = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return [], f"squeue failed: {words[-1]}"
    return parse_queue(answer.stdout), ""


def parse_queue(text: str) -> list[Queued]:
    """Jobs of squeue's output in the format `QUEUE`; lines of another shape are left out."""
    lines = (line.split("|", 5) for line in text.splitlines())
    return [
        Queued(number, state, _seconds(elapsed), nodes, comment, folder)
        for number, state, elapsed, nodes, comment, folder in (x for x in lines if len(x) == 6)
    ]


def _seconds(elapsed: str) -> float:
    """Seconds of Slurm's [days-][hours:]minutes:seconds; 0 of anything else ("INVALID")."""
    days, _, clock = elapsed.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        total = sum(part * 60**power for power, part in enumerate(reversed(parts)))
        return 86_400 * int(days or 0) + total
    except ValueError:
        return 0.0


def in_slurm(
    entries: Iterable[Queued], comments: Mapping[str, str], runs: Path
) -> tuple[dict[str, list[Work]], int]:
    """Work by record, and how many jobs of the folder are not known by their comments (groups).

    Args:
        comments: the record that a job writes, by the comment that Snakemake's plugin gives it.
    """
    home, found, unknown = os.path.realpath(runs.parent), {}, 0
    for entry in entries:
        if os.path.realpath(entry.folder) != home:
            continue
        if entry.comment in comments:
            found.setdefault(comments[entry.comment], []).append(entry.work)
        else:
            unknown += 1
    return found, unknown


# ---- processes


def in_processes(track: Track, runs: Path) -> dict[str, list[Work]]:
    """Work by record of the `prunebench STAGE` commands on this machine that write into `runs`."""
    own, found = os.path.realpath(runs), {}
    for process in psutil.process_iter(["cmdline", "cwd", "create_time"]):
        facts = process.info
        options = stage_command(facts["cmdline"] or [])
        if not options or not facts["cwd"]:
            continue
        folder = os.path.realpath(Path(facts["cwd"], options.get("--runs", RUNS)))
        record = record_of(options, track, runs) if folder == own else None
        if record:
            # torchrun's processes have their parent's command line: one job, as old as the first.
            job = found.setdefault(record, {}).setdefault(options.get("--shard"), [])
            job.append((facts["create_time"], process.pid))
    now = time.time()
    return {
        record: [Work(f"process {pid}", now - start) for start, pid in map(min, jobs.values())]
        for record, jobs in found.items()
    }


def stage_command(arguments: list[str]) -> dict[str, str]:
    """Options of a command line that runs a stage, {} of any other; "stage" names the stage."""
    for place, (word, stage) in enumerate(itertools.pairwise(arguments)):
        if Path(word).name == "prunebench" and stage in STAGES:
            words = [part for word in arguments[place + 2 :] for part in word.split("=", 1)]
            return {**dict(itertools.pairwise([*words, ""])), "stage": stage}
    return {}


def record_of(options: Mapping[str, str], track: Track, runs: Path) -> str | None:
    """The record that a stage command writes; None if it is of another track or makes no sense."""
    layout, stage = Layout(track.name, runs), options["stage"]
    if Path(options.get("--track", "embedded")).stem != track.name:
        return None
    try:
        if stage in SHARED:
            return SHARED[stage](layout, options)
        place = (options["--model"], options["--method"], float(options["--sparsity"]))
        recovery, seed = options.get("--recovery", "none"), int(options["--seed"])
        paths = Paths(track, Cell(track.name, *place, recovery, seed), runs)
    except (KeyError, ValueError, UserError):
        return None
    return getattr(paths, CELL_STAGES[stage][0])
