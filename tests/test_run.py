"""The life of a run: its lock, what killed runs leave, and what of it Snakemake is told."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from prunebench.errors import UserError
from prunebench.runtime import gpus, run, warm


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.atexit, "register", lambda *_: None)
    folder = tmp_path / ".snakemake"
    for file in ("locks/0.input.lock", "locks/0.output.lock", "incomplete/a/b", "metadata/c"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def _files(state: Path) -> set[str]:
    return {str(file.relative_to(state)) for file in state.rglob("*") if file.is_file()}


def test_a_killed_runs_marks_go(state):
    with run.take_lock(state):
        assert _files(state) == {"metadata/c", "prunebench.lock"}


def test_a_live_runs_marks_stay(state):
    with (state / "prunebench.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        before = _files(state)
        with run.take_lock(state) as lock:
            assert _files(state) == before and not run.only_run(lock)
        other.close()
        with run.take_lock(state) as lock:
            assert "incomplete/a/b" not in _files(state) and run.only_run(lock)


NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", NO_LOCKS)
@pytest.mark.parametrize("lives", [True, False, None])
def test_without_locks_the_mark_of_the_last_run_says_whether_it_lives(
    state, monkeypatch, number, lives
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(run, "MARK", state / "prunebench.run")
    sleeper = subprocess.Popen(["sleep", "60"])
    if lives is not None:
        marked = run.Run("mine", socket.gethostname(), sleeper.pid, time.time() + 1, True, 2)
        (state / "prunebench.run").write_text(json.dumps(asdict(marked)))
    if not lives:
        sleeper.kill()
        sleeper.wait()
    try:
        with run.take_lock(state) as lock:
            assert ("incomplete/a/b" in _files(state)) == bool(lives)
            assert run.only_run(lock) == (not lives)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_run_of_another_machine_is_not_taken_for_dead(state):
    (state / "prunebench.lock").write_text("login9")
    with pytest.raises(UserError, match="A run on another machine was killed or is alive"):
        run.take_lock(state)
    assert "incomplete/a/b" in _files(state)
    (state / "prunebench.lock").write_text(socket.gethostname())
    run.take_lock(state).close()


@pytest.mark.parametrize(
    ("found", "left", "said"),
    [([], [], []), (["7"], [], ["Cancelled 1 Slurm"]), (["7"], ["7"], ["do not end"])],
)
def test_left_over_jobs_are_cancelled_and_the_run_begins_anew(
    state, monkeypatch, found, left, said
):
    words, begun = [], []
    monkeypatch.setattr(run.slurm, "cancel", lambda prefix, folder: (found, left))
    monkeypatch.setattr(run.os, "execv", lambda *command: begun.append(command))
    with run.take_lock(state) as lock:
        run.cancel_leftover_jobs(lock, "prunebench", words.append)
        assert (state / "prunebench.lock").read_text() == socket.gethostname()
    assert len(words) == len(said) and all(part in words[0] for part in said)
    assert len(begun) == (found != [] and not left)


def test_beside_another_run_no_left_over_jobs_are_looked_for(state, monkeypatch):
    words = []
    monkeypatch.setattr(run.slurm, "cancel", None)
    with (state / "prunebench.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with run.take_lock(state) as lock:
            run.cancel_leftover_jobs(lock, "prunebench", words.append)
    assert "no left-over jobs are looked for" in words[0]


def test_jobs_refuse_a_track_that_was_edited_since_they_were_planned(monkeypatch):
    known = {name: value for name, value in os.environ.items() if name != run.PLANNED}
    monkeypatch.setattr(os, "environ", known)
    run.check_planned("b", "mine")  # by hand, beside no workflow
    run.plan_by("a")
    run.check_planned("a", "mine")
    with pytest.raises(UserError, match="track mine was edited while its workflow ran; when that"):
        run.check_planned("b", "mine")


@pytest.mark.parametrize(("limit", "kept"), [((100, 1), False), ((10, 1), True), (None, False)])
def test_only_snakemakes_own_limit_is_dropped(limit, kept):
    limiter = limit and SimpleNamespace(max_jobs=limit[0], timespan=limit[1])
    scheduler = SimpleNamespace(job_rate_limiter=limiter)
    run.plan_at_events_only(scheduler)
    assert bool(scheduler.job_rate_limiter) == kept


class Dag:
    """Of jobs by their outputs: whether each has to run, and whether its end was noted."""

    def __init__(self, **jobs: tuple[bool, bool]):
        self.known = jobs
        self.jobs = [SimpleNamespace(output=[name]) for name in jobs]

    def needrun(self, job) -> bool:
        return self.known[job.output[0]][0]

    def reason(self, job) -> SimpleNamespace:
        return SimpleNamespace(no_metadata=not self.known[job.output[0]][1])


def test_unseen_jobs_are_those_whose_end_nobody_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dag = Dag(new=(True, False), noted=(False, True), unseen=(False, False), gone=(False, False))
    for name in ("new", "noted", "unseen"):
        Path(name).touch()
    assert [job.output for job in run.unseen_jobs(dag)] == [["unseen"]]


def test_unseen_records_of_other_settings_are_the_users_to_judge(state):
    jobs = [SimpleNamespace(output=[name]) for name in ("same", "none", "other")]
    made_with = {"same": "own", "none": None, "other": "others"}
    taken = []
    with pytest.raises(UserError, match="1 records, such as other, were made with other settings"):
        run.adopt_unseen_records(jobs, taken.append, "own", made_with.get, "mine")
    assert taken == jobs[:2] and run.UNSEEN.read_text() == "other\n"
    taken.clear()
    run.adopt_unseen_records(jobs, taken.append, "", made_with.get, "mine")
    assert taken == jobs


def test_a_machine_is_prepared(monkeypatch):
    words, started = [], []
    monkeypatch.setattr(gpus, "devices", lambda: ["0"])
    monkeypatch.setattr(warm, "start", lambda *given: started.append(given) or "/tmp/socket")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    run.prepare_machine([{"gpu": 0}], ["a"], "mine", words.append)
    assert started == [(os.getpid(), ["a"], "prunebench.cli:main")]
    assert os.environ[warm.VARIABLE] == "/tmp/socket" and os.environ[gpus.CLAIM]
    assert "mine asks for no GPU" in words[0]
    run.prepare_machine([{"gpu": 1}], ["a"], "mine", words.append)
    assert len(words) == 1
