"""GPUs of one machine: real processes that claim them, with no GPU in sight, and jobs without."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prunebench import tracks
from prunebench.errors import UserError
from prunebench.runtime import gpus, run
from prunebench.tracks.stages import NEEDY

# Claims like a command of the workflow, says what it got, and holds it until it is killed.
COMMAND = """
import logging, sys, time
from pathlib import Path
from prunebench.runtime import gpus
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
gpus.LOCKS, gpus.POLL_SECONDS = Path(sys.argv[1]), 0.05
"""
HOLD = (
    COMMAND
    + """
gpus.prepare(int(sys.argv[2]), [])
print("got", gpus.os.environ[gpus.VISIBLE], flush=True)
time.sleep(60)
"""
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Starts commands on a machine with GPUs 0 and 1; ends them."""
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    monkeypatch.setenv(gpus.CLAIM, "1")
    started = []

    def start(*arguments, code=HOLD):
        command = [sys.executable, "-c", code, str(tmp_path), *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def said(process) -> str:
    return process.stdout.readline().strip()


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_each_command_has_a_gpu_of_its_own(machine):
    assert {said(machine(1)), said(machine(1))} == {"got 0", "got 1"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_waits_until_one_is_free(machine, number):
    first, _ = machine(1), said(machine(1))
    assert said(first).startswith("got ")
    third = machine(1)
    assert said(third) == "waiting for 1 of 2 GPUs to be free"
    first.send_signal(number)
    assert said(third).startswith("got ")  # and no second line about waiting


def test_who_waits_for_two_holds_none(machine):
    assert said(machine(1)) == "got 0"
    assert said(machine(2)) == "waiting for 2 of 2 GPUs to be free"
    time.sleep(0.2)  # some rounds of its waiting
    third = machine(1)
    first_line = said(third)  # of waiting, if it came in the instant in which the second looks
    assert (first_line if first_line.startswith("got") else said(third)) == "got 1"


def test_torchrun_keeps_the_claim_of_the_command_it_replaces(machine):
    code = COMMAND + "print(gpus.claim(1), flush=True); gpus.os.execvp('sleep', ['sleep', '60'])"
    holders = [machine(code=code), machine(code=code)]
    assert {said(holder) for holder in holders} == {"['0']", "['1']"}
    waiting = machine(1)
    assert said(waiting) == "waiting for 1 of 2 GPUs to be free"
    holders[0].kill()
    assert said(waiting).startswith("got ")


def test_fewer_gpus_than_asked_for_are_all_taken(machine):
    assert said(machine(4)) == "got 0,1"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_one_gpu_is_taken_and_of_several_none(monkeypatch, tmp_path, caplog, number):
    """It was taken for a GPU that is busy, and waited for without end."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(gpus.fcntl, "flock", flock)
    monkeypatch.setattr(gpus, "LOCKS", tmp_path)
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    with pytest.raises(UserError, match=r"show the run one GPU .* use one at a time"):
        gpus.claim(1)
    monkeypatch.setenv(gpus.VISIBLE, "1")
    assert gpus.claim(1) == ["1"]
    assert "let the run use one at a time" in caplog.text


def test_a_command_without_gpus_sees_none(machine):
    assert [said(machine(0)) for _ in range(3)] == ["got"] * 3


def test_several_gpus_start_the_command_once_each(machine, monkeypatch):
    code = COMMAND + "gpus.prepare(2, ['--version'], parallel=True); print('not reached')"
    version = subprocess.check_output([sys.executable, "-m", "prunebench", "--version"], text=True)
    output, _ = machine(code=code).communicate(timeout=120)
    assert output.startswith("2 GPUs: -m torch.distributed.run --standalone --nproc-per-node 2 ")
    assert output.count(version) == 2
    assert "not reached" not in output


def test_a_process_of_torchrun_claims_nothing_and_ends_with_it(machine, monkeypatch):
    monkeypatch.setenv(gpus.RANK, "1")
    code = (
        COMMAND + "import subprocess\n"
        "worker = subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1], '1'])\n"
        "print(worker.pid, flush=True); worker.wait()"
    )
    torchrun = machine(HOLD, code=code)
    worker = int(said(torchrun))
    assert said(torchrun) == "got 0,1"  # as torchrun hands it down; the rank says which
    torchrun.kill()
    assert ended(worker)


def test_on_a_cluster_the_scheduler_has_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv(gpus.CLAIM, raising=False)
    monkeypatch.setenv(gpus.VISIBLE, "3")
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")
    gpus.prepare(1, [], parallel=True)
    assert os.environ[gpus.VISIBLE] == "3"
    assert not gpus.LOCKS.exists()


def test_on_a_cluster_a_command_without_gpus_sees_none_but_those_granted(monkeypatch):
    """Where Slurm does not hide them, the first would be another job's."""
    monkeypatch.setattr(os, "environ", {})
    gpus.prepare(0, [])
    assert os.environ[gpus.VISIBLE] == ""
    os.environ[gpus.VISIBLE] = "3"  # by `gres`, of which the rule's `gpu` knows nothing
    gpus.prepare(0, [])
    assert os.environ[gpus.VISIBLE] == "3"


def test_a_machine_without_gpus_starts_nothing_and_locks_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")
    assert gpus.devices() == gpus.claim(1) == []
    assert not gpus.LOCKS.exists()


WHOLE = """GPU 0: NVIDIA H200 (UUID: GPU-5c7f)
GPU 1: NVIDIA H200 (UUID: GPU-9d1e)
"""
PARTS = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c7f)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaa)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbb)
"""


@pytest.mark.parametrize(
    ("listing", "names"),
    [(WHOLE, ["0", "1"]), (PARTS, ["MIG-aaaa", "MIG-bbbb"]), ("No devices found.", [])],
)
def test_the_machines_gpus_are_listed(monkeypatch, tmp_path, listing, names):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat << END\n{listing}END\n")
    tool.chmod(0o755)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus.devices() == names


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", []),
        ("1", ["1"]),
        ("GPU-5c7f, GPU-9d1e", ["GPU-5c7f", "GPU-9d1e"]),
        ("-1", []),
        ("1,-1,0", ["1"]),
    ],
)
def test_what_the_user_shows_is_all_there_is(monkeypatch, visible, names):
    monkeypatch.setenv(gpus.VISIBLE, visible)
    assert gpus.devices() == names


HIDDEN = "CUDA_VISIBLE_DEVICES='-1' hides every GPU; unset it"
NO_TOOL = "this machine has no GPU (there is no nvidia-smi)"


def fake_nvidia_smi(folder, monkeypatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_that_cannot_use_its_gpu_fails_at_once_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv(gpus.VISIBLE, "-1")
    with pytest.raises(UserError, match=f"needs.dense.gpu: a GPU is asked for .*{HIDDEN}"):
        gpus.require(1, "dense", cpu_instead=False)
    gpus.require(0, "dense", cpu_instead=False)
    monkeypatch.delenv(gpus.VISIBLE)
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        assert NO_TOOL in gpus.absent() and gpus.trouble() == gpus.absent()
    failed = "echo NVIDIA-SMI has failed because it could not reach the driver; exit 9"
    fake_nvidia_smi(tmp_path, monkeypatch, failed)
    assert "it says 'NVIDIA-SMI has failed because it could not reach the driver'" in gpus.absent()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
def test_what_torch_says_is_handed_on(monkeypatch, tmp_path):
    """A GPU is listed, and torch has no CUDA, or no driver that it could use."""
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'GPU 0: NVIDIA H200 (UUID: GPU-5c7f)'")
    told = gpus.trouble()
    assert "is a build without CUDA" in told or "fails with" in told
    assert gpus.trouble_of_a_job() == told
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; install one with CUDA" in gpus.trouble()


def test_a_track_may_be_content_with_the_cpu_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setenv(gpus.VISIBLE, "-1")
    gpus.require(1, "select", cpu_instead=True)
    assert os.environ[gpus.VISIBLE] == ""
    assert "on the CPU, as needs.select.cpu_instead allows: " + HIDDEN in caplog.text


def test_a_claim_of_nothing_leaves_the_reason_to_be_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {gpus.CLAIM: "1", "PATH": str(tmp_path)})
    gpus.prepare(1, [])
    assert NO_TOOL in gpus.absent()


def planned(**gpu: int) -> SimpleNamespace:
    jobs = [
        SimpleNamespace(rule=SimpleNamespace(name=name), resources={"gpu": count})
        for name, count in gpu.items()
    ]
    return SimpleNamespace(needrun_jobs=lambda: iter(jobs))


def test_a_run_without_gpus_ends_before_its_first_job(monkeypatch):
    """Of the jobs that are left to do: fetching on a laptop what a GPU will need is no reason."""
    monkeypatch.setenv(gpus.VISIBLE, "")
    imagenet, smoke = (tracks.load(name) for name in ("imagenet256", "smoke"))
    with pytest.raises(
        UserError, match=r"^needs\.dense\.gpu, needs.select.gpu: a GPU is asked for"
    ):
        run.check_gpus(planned(select=1, dense=1, sample=0), imagenet.needs)
    run.check_gpus(planned(assets=0, leaderboard=0), imagenet.needs)
    run.check_gpus(planned(select=1, dense=1), smoke.needs)


def test_only_tracks_that_measure_nothing_or_say_so_allow_the_cpu_instead():
    root = Path(__file__).parents[1]
    allowing = {
        file.stem
        for file in (root / "config").glob("*.yaml")
        if any(tracks.load_any(str(file)).needs(stage)["cpu_instead"] for stage in NEEDY)
    }
    assert allowing == {"smoke", "efficiency"}
