"""The life of a workflow's run in a folder: its lock, its mark, and what a killed one left behind.

Live runs, of different tracks, share a lock, which the kernel gives up with their processes. A mark
says who runs the workflow, for `prunebench progress`. Both lie in Snakemake's own folder.
"""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from prunebench.errors import UserError
from prunebench.records.artefacts import write_json
from prunebench.runtime import gpus, slurm, warm

STATE = Path(".snakemake")
MARK = STATE / "prunebench.run"  # who runs the workflow of a folder
UNSEEN = STATE / "prunebench.unseen"  # records that adopt_unseen_records refused
PLANNED = "PRUNEBENCH_PLANNED"  # hash of the settings that a workflow planned its jobs by
Say = Callable[[str], None]


# ---- the lock


def take_lock(state: Path = STATE) -> TextIO:
    """Take the folder's lock and remove the marks of a killed run, so that its command goes on.

    If we get the lock for ourselves, no run is alive and Snakemake's own lock is stale. Its list of
    incomplete outputs is too, because records appear complete or not at all: a job cut short has
    left none. A run on a cluster writes its machine's name into the lock file and takes it back
    when it ends: on some file systems locks are seen on their own machine only.

    Returns:
        The lock, which is held, shared with other runs, until it is closed.

    Raises:
        UserError: the lock names another machine, whose run may be alive.
    """
    state.mkdir(exist_ok=True)
    lock = (state / "prunebench.lock").open("a+")
    if not only_run(lock):
        return lock
    lock.seek(0)
    if lock.read() not in ("", socket.gethostname()):
        raise UserError(
            f"A run on another machine was killed or is alive: see {lock.name}. Give the command "
            "there; or, if nothing runs there, delete the file and give it here."
        )
    atexit.register(lock.truncate, 0)
    for mark in (*state.glob("locks/*.lock"), *state.glob("incomplete/**/*")):
        if not mark.is_dir():
            mark.unlink(missing_ok=True)  # jobs that outlived the run remove their own
    share(lock)
    return lock


def only_run(lock: TextIO) -> bool:
    """Whether no other run holds the folder's lock; if so none can start until it is shared.

    On a file system without locks, as a Lustre mounted without, the mark of the last run says
    whether that lives. Of two runs that are started in one instant neither knows the other then.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        share(lock)
        return False
    except OSError:
        last = read_run(Path(lock.name).parents[1])
        return last is None or last.ended or (last.here and last.pid == os.getpid())
    return True


def share(lock: TextIO) -> None:
    """Hold the lock with the other live runs: when the first one ends, the rest are still known."""
    with contextlib.suppress(OSError):  # no locks here
        fcntl.flock(lock, fcntl.LOCK_SH)


def cancel_leftover_jobs(lock: TextIO, prefix: str, say: Say) -> None:
    """Cancel a killed run's Slurm jobs, which go on without it and would work beside ours.

    Starts this process anew if there were any: some may have finished since it planned.

    Args:
        lock: the folder's, as take_lock gives it.
        prefix: of the jobs' names.
    """
    if not only_run(lock):
        say(
            "Another run of this folder is alive, or its file system has no locks: "
            "no left-over jobs are looked for."
        )
        return
    found, left = slurm.cancel(prefix, Path.cwd())
    lock.truncate(0)
    lock.write(socket.gethostname())
    lock.flush()
    share(lock)
    if left:
        say(f"Cancelled Slurm jobs of a killed run do not end, going on: {left}")
    elif found:
        say(f"Cancelled {len(found)} Slurm jobs of a killed run; planning anew.")
        os.execv(sys.executable, sys.orig_argv)


# ---- the mark


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
    write_json(MARK, asdict(run))


def unmark_run() -> None:
    """Take back what `mark_run` said, if it was this process that said it."""
    run = read_run(Path())
    if run and run.here and run.pid == os.getpid():
        MARK.unlink(missing_ok=True)


def read_run(home: Path) -> Run | None:
    """The run that a folder was last marked with; it may have been killed since."""
    try:
        return Run(**json.loads((home / MARK).read_text()))
    except (OSError, ValueError, TypeError):
        return None


# ---- planning


def plan_by(settings: str) -> None:
    """Have all jobs of this process refuse a track whose settings have another hash by then."""
    os.environ[PLANNED] = settings


def check_planned(settings: str, track: str) -> None:
    """Refuse a track that was edited since the workflow which runs this job was planned."""
    if os.environ.get(PLANNED, settings) != settings:
        raise UserError(
            f"track {track} was edited while its workflow ran; when that has ended, give the same "
            "snakemake command again, which makes anew what the edit changes"
        )


def plan_at_events_only(scheduler) -> None:
    """Drop Snakemake's default limit, 100 jobs a second, and with it steps that nothing calls for.

    In 9.27 every step of the scheduler sets a timer for another one as long as jobs are ready. So
    steps multiply until its process is always busy (snakemake issue 2967), beside measurements of
    latency or on a login node. A limit that somebody set is kept.
    """
    limiter = scheduler.job_rate_limiter
    if limiter and (limiter.max_jobs, limiter.timespan) == (100, 1):
        scheduler.job_rate_limiter = None


def unseen_jobs(dag) -> list:
    """Jobs that are done, whose end no run has seen: their controller was killed before."""
    return [
        job
        for job in dag.jobs
        if not dag.needrun(job)
        and dag.reason(job).no_metadata
        and Path(job.output[0]).exists()  # not a shard that was gathered, or was deleted
    ]


def adopt_unseen_records(
    jobs: Iterable, adopt: Callable, own: str, config_of: Callable, track: str
) -> None:
    """Take note of what records rest on that `unseen_jobs` left; else no change of it would count.

    Args:
        adopt: called with a job, takes note of it as Snakemake does when a job ends.
        own: hash of the track's settings; "" to adopt records of other settings as well.
        config_of: hash of the settings that a record was made with, None where it has none.
        track: as the command line names it.

    Raises:
        UserError: records were made with other settings than the track has now: the user decides.
    """
    others = []
    for job in jobs:
        if not own or config_of(job.output[0]) in (own, None):
            adopt(job)
        else:
            others.append(job.output[0])
    if others:
        UNSEEN.write_text("\n".join([*others, ""]))
        raise UserError(
            f"{len(others)} records, such as {others[0]}, were made with other settings of track "
            f"{track}, by jobs whose end no run has seen. `xargs rm < {UNSEEN}` has them made "
            f"anew; the same command with `--config track={track} keep=yes`, once, takes them."
        )


# ---- the machine


def check_gpus(dag, needs: Callable[[str], Mapping]) -> None:
    """Refuse a run on this machine whose jobs are to have GPUs and could not use them.

    Args:
        dag: Snakemake's, whose jobs are planned.
        needs: what the track says that a stage's jobs need.

    Raises:
        UserError: names the stages, the reason and the remedy.
    """
    first = {job.rule.name: job for job in dag.needrun_jobs()}
    asking = [
        name
        for name, job in sorted(first.items())
        if job.resources.get("gpu") and not needs(name)["cpu_instead"]
    ]
    if asking and (reason := gpus.trouble_of_a_job()):
        raise UserError(gpus.refusal(reason, asking))


def prepare_machine(
    needs: Iterable[Mapping[str, int]], preload: Iterable[str], track: str, say: Say
) -> None:
    """For jobs on this machine: its GPUs are shared out, and the imports done once for all.

    Args:
        needs: of the track's stages.
        preload: what short commands import.
    """
    os.environ[gpus.CLAIM] = "1"
    if gpus.devices() and not any(each["gpu"] for each in needs):
        say(f"Track {track} asks for no GPU (key `needs`): it runs on the CPU.")
    path = warm.start(os.getpid(), preload, "prunebench.cli:main")
    if path:
        os.environ[warm.VARIABLE] = path
