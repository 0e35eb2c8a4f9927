"""Work in a child process: whatever ends it, the parent says how and goes on."""

import faulthandler
import os
import signal
import subprocess
import sys
import time

import pytest

from prunebench.errors import UserError
from prunebench.runtime import child


def test_work_that_ends_gives_its_status(capfd):
    assert child.run(lambda: 0, 60) == child.End(0)
    assert child.run(lambda: 7, 60) == child.End(7)

    def refuse():
        raise UserError("mend it")

    assert child.run(refuse, 60) == child.End(2)
    assert "prunebench: mend it" in capfd.readouterr().err
    assert child.run(lambda: 1 // 0, 60) == child.End(1)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert child.run(sys.exit, 60) == child.End(1)


@pytest.mark.parametrize(
    ("work", "reason", "killed"),
    [
        (lambda: os._exit(0), "it ended the process with status 0", False),
        (lambda: os._exit(9), "it ended the process with status 9", False),
        (lambda: (faulthandler.disable(), os.abort()), "it was ended by SIGABRT", False),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "it was ended by SIGKILL", True),
    ],
)
def test_work_that_does_not_end_says_why(work, reason, killed):
    assert child.run(work, 60) == child.End(None, reason, killed)


def test_processes_that_the_work_leaves_behind_hold_nobody_up():
    def work():
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    begun = time.monotonic()
    assert child.run(work, 60).killed
    assert time.monotonic() - begun < 10


def test_work_without_end_is_ended():
    begun = time.monotonic()
    end = child.run(lambda: time.sleep(60), 0.3)
    assert end.status is None and end.reason == "it had not ended after 0.005 minutes"
    assert time.monotonic() - begun < 10


def test_a_signal_of_ours_is_handed_on_and_no_failure_of_the_work(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time; from prunebench.runtime import child\n"
        "def work():\n    print('begun', flush=True)\n    time.sleep(60)\n"
        "sys.exit(child.run(work, 60).status)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
