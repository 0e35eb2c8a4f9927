"""Which jobs are at work now: in Slurm's queue, and among the processes of this machine."""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from prunebench.errors import UserError
from prunebench.tracks import RUNS, Layout, Track
from prunebench.tracks.stages import NEEDY, STAGES

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
            found.setdefault(record, []).append((facts["create_time"], process.pid))
    now, first = time.time(), {record: min(processes) for record, processes in found.items()}
    return {r: [Work(f"process {pid}", now - start)] for r, (start, pid) in first.items()}


def stage_command(arguments: list[str]) -> dict[str, str]:
    """Options of a command line that runs a stage, {} of any other; "stage" names the stage."""
    for place, (word, stage) in enumerate(itertools.pairwise(arguments)):
        if Path(word).name == "prunebench" and stage in NEEDY:
            words = [part for word in arguments[place + 2 :] for part in word.split("=", 1)]
            return {**dict(itertools.pairwise([*words, ""])), "stage": stage}
    return {}


def record_of(options: Mapping[str, str], track: Track, runs: Path) -> str | None:
    """The record that a stage command writes; None if it is of another track or makes no sense."""
    if Path(options.get("--track", "embedded")).stem != track.name:
        return None
    words = {name: f"--{name.replace('_', '-')}" for name in STAGES[options["stage"]].names}
    names: dict[str, object] = {n: options[word] for n, word in words.items() if word in options}
    try:
        if "method" in words:
            names = {"recovery": "none", **names, "sparsity": float(options["--sparsity"])}
        return Layout(track, runs).record(options["stage"], **names)
    except (KeyError, ValueError, UserError):
        return None
