"""Work of which nobody knows what it does, in a child process that may crash, exit or never end."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from prunebench.errors import UserError
from prunebench.runtime import warm

POLL_SECONDS = 0.01
FORWARDED = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class End:
    """How a child ended.

    Attributes:
        status: what the work returned, as an exit status; None where it did not come to its end.
        reason: why it did not.
        killed: by a SIGKILL that was not ours: the system's, where memory is short, or somebody's.
        late: by us, when its time was over.
    """

    status: int | None
    reason: str = ""
    killed: bool = False
    late: bool = False


def run(work: Callable[[], int], seconds: float) -> End:
    """Run `work` in a fork of this process, for `seconds` at most.

    The child dies with this process and is handed its SIGTERM and SIGINT. A UserError is printed
    and is status 2, another exception 1, as for a command.
    """
    ears, mouth = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ears)
        _work(work, mouth)
    os.close(mouth)
    before = {number: signal.signal(number, _forward(pid)) for number in FORWARDED}
    try:
        code, late = _wait(pid, seconds)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    os.set_blocking(ears, False)  # a process that the work left behind may hold the other end
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(ears, 1)
    os.close(ears)
    return End(said[0]) if said and not late else _abnormal(code, late, seconds)


def _work(work: Callable[[], int], mouth: int) -> None:
    """In the child; does not return."""
    status = 1
    try:
        warm.die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Ends it at once: a KeyboardInterrupt is then the work's own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        status = work()
    except UserError as error:
        sys.stderr.write(f"prunebench: {error}\n")
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(mouth, bytes([status & 0xFF]))
        os._exit(status & 0xFF)


def _forward(pid: int) -> Callable:
    return lambda number, _: os.kill(pid, number)


def _wait(pid: int, seconds: float) -> tuple[int, bool]:
    """The exit code, negative for a signal, and whether it had to be killed for being late."""
    deadline, late = time.monotonic() + seconds, False
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), late
        if not late and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            late = True
        time.sleep(POLL_SECONDS)


def _abnormal(code: int, late: bool, seconds: float) -> End:
    if late:
        return End(None, f"it had not ended after {seconds / 60:g} minutes", late=True)
    if -code in FORWARDED:
        return End(128 - code)  # as a shell gives it
    if code < 0:
        name = signal.Signals(-code).name
        return End(None, f"it was ended by {name}", killed=-code == signal.SIGKILL)
    return End(None, f"it ended the process with status {code}")
