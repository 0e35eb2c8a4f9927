"""What others use: noticed on the real machine, waited for and told under loads made up."""

import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from prunebench.evaluation import latency, neighbours
from prunebench.evaluation.neighbours import Load

QUIET, LOUD = Load(0.02), Load(1.3)


@pytest.fixture
def burner():
    """A process that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.3)  # let it start up
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def paces(monkeypatch):
    """No pause between looks."""
    monkeypatch.setattr(neighbours, "PAUSE", 0.01)


def test_a_busy_process_is_noticed(burner):
    found = max((neighbours.look() for _ in range(3)), key=lambda load: load.cpu)
    assert found.busy and found.cpu > 0.5  # it gets half a core even if two others want it
    assert neighbours.alone([found]) is False


def test_a_machine_that_is_never_quiet_is_measured_all_the_same(burner):
    start = time.monotonic()
    with latency.conditions(wait=1.0) as found:
        time.sleep(0.3)
    assert 1.0 <= found["waited_s"] <= time.monotonic() - start
    assert found["alone"] is False
    assert found["others"]["before"]["cpu"] > 0.25 and found["others"]["during"]["cpu"] > 0.25


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_our_own_work_is_not_others(monkeypatch, others):
    """A clock of two cores that shows what this process uses, and so many cores more."""

    def clock(percpu):
        return [
            SimpleNamespace(user=time.process_time(), idle=7.0),
            SimpleNamespace(system=others * time.perf_counter(), iowait=7.0),
        ]

    monkeypatch.setattr(psutil, "cpu_times", clock)
    watch, until = neighbours.Watch(), time.perf_counter() + 0.1
    while time.perf_counter() < until:
        pass
    assert watch.load().cpu == pytest.approx(others, abs=0.02)


def test_waiting_ends_when_the_load_goes(paces):
    loads = iter([LOUD, LOUD, QUIET])
    waited, last = neighbours.wait(60, lambda: next(loads))
    assert last is QUIET and 0 < waited + 0.1 < 5
    assert next(loads, None) is None


def test_a_quiet_machine_is_looked_at_once(caplog):
    loads = iter([QUIET])
    assert neighbours.wait(60, lambda: next(loads)) == (0.0, QUIET)
    assert not caplog.records


def test_waiting_is_told_and_ends_in_time(paces, caplog):
    waited, last = neighbours.wait(0.2, lambda: LOUD)
    assert last is LOUD and 0.2 <= waited < 2
    assert "others use 1.30 cores: waiting up to 0.2 s" in caplog.text


def test_without_patience_there_is_one_look_and_no_wait():
    loads = iter([LOUD])
    assert neighbours.wait(0, lambda: next(loads)) == (0.0, LOUD)


def test_a_quiet_look_is_cheap():
    start = time.process_time()
    neighbours.look()
    assert time.process_time() - start + neighbours.WINDOW < 0.3


def test_alone_means_that_nobody_came_later():
    assert neighbours.alone([QUIET, QUIET]) is True
    assert neighbours.alone([QUIET, LOUD]) is False


@pytest.mark.parametrize(
    ("load", "busy", "alone"),
    [
        (Load(0.02, 0, 0.0), False, True),
        (Load(0.02, 1, 0.0), False, False),  # somebody holds the GPU and does nothing
        (Load(0.02, 0, 37.0), True, False),  # a process that a container hides from us
        (Load(0.02, 0, None), False, True),  # while we compute ourselves
        (Load(0.02, None, None), False, None),
        (Load(1.0, None, None), True, False),
    ],
)
def test_on_a_gpu(load, busy, alone):
    assert load.busy is busy
    assert neighbours.alone([load], "cuda") is alone


# nvidia-smi's format as its manual gives it; written by hand, since no GPU was at hand.
OURS, OTHER = "5f0e64e1-3ac1-7b2f-9d10-0c6e3d1f2a77", "b7a4c0de-92d4-11ee-8c99-0242ac120002"
GPUS = f"GPU-{OTHER}, 98\nGPU-{OURS}, 0\n"
APPLICATIONS = f"GPU-{OTHER}, 4711\nGPU-{OURS}, 1234\nGPU-{OURS}, 815\nGPU-{OURS}, 815\n"


@pytest.mark.parametrize(
    ("uuid", "gpus", "applications", "expected"),
    [
        (OURS, GPUS, APPLICATIONS, (1, 0.0)),
        (OURS, GPUS, "", (0, 0.0)),
        (OURS, GPUS.replace(", 0", ", [N/A]"), APPLICATIONS, (1, None)),
        ("a-slice", GPUS, APPLICATIONS, (None, None)),
        (OURS, "No devices were found\n", "", (None, None)),
    ],
)
def test_gpu_use_is_read_from_nvidia_smi(uuid, gpus, applications, expected):
    assert neighbours.parse_gpu_use(uuid, gpus, applications, own=1234) == expected


def test_without_nvidia_smi_a_gpu_is_not_known(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert neighbours.gpu_use(torch.device("cuda")) == (None, None)
    assert "nvidia-smi does not tell" in caplog.text
    assert neighbours.gpu_use("cpu") == (None, None)


def test_conditions_are_told_after_the_block():
    with latency.conditions(observe=lambda: QUIET) as found:
        sum(range(1000))
    assert (found["threads"], found["device"], found["waited_s"]) == (1, "cpu", 0.0)
    assert found["load_average"] >= 0
    assert found["others"]["before"] == {
        "cpu": 0.02,
        "gpu_processes": None,
        "gpu_utilisation": None,
    }
    assert found["alone"] is (found["others"]["during"]["cpu"] <= neighbours.QUIET_CORES)
