"""The server half of `runtime.warm`, which describes the protocol; run by `warm.start`."""

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from prunebench.runtime.warm import RUNNING, STALE, die_with_parent, fingerprint, prctl

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def serve(
    listener: socket.socket, lifeline: int, owner: int, main: str, preload: Iterable[str]
) -> None:
    """Import, then fork a child per request until `lifeline`, the owner's pidfd, says it ended."""
    code = fingerprint()  # before the imports: an edit during them must not pass unnoticed
    module, function = main.split(":")
    with _ending_with(owner, lifeline, listener):
        for name in (*preload, module):
            importlib.import_module(name)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what jobs leave behind comes to this process
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page of the parent
    server = _Server(listener, code, getattr(sys.modules[module], function))
    server.selector.register(lifeline, selectors.EVENT_READ)
    try:
        server.loop()
    finally:  # in the parent only: children leave by os._exit
        for pid in server.jobs:
            os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)


@contextlib.contextmanager
def _ending_with(owner: int, lifeline: int, listener: socket.socket) -> Iterator[None]:
    """End at once with the owner, during imports too, which take seconds."""

    def end(*_: object) -> None:
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
        os._exit(1)

    if os.getppid() == owner:
        signal.signal(signal.SIGTERM, end)
        die_with_parent(signal.SIGTERM)
    if select.select([lifeline], [], [], 0)[0]:  # it ended before the lines above
        end()
    yield
    die_with_parent(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Server:
    def __init__(self, listener: socket.socket, code: list, main: Callable[[list[str]], int]):
        self.listener, self.code, self.main = listener, code, main
        self.jobs = set()  # process ids, each the leader of its own group
        self.pid = os.getpid()
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)

    def loop(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.data is None:  # the lifeline
                    return
                key.data()

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        streams = []
        try:
            request = _receive(connection, streams)
            fresh = request["fingerprint"] == self.code
            connection.sendall(RUNNING if fresh else STALE)
            if fresh:
                self.run(connection, request, streams)
            else:
                connection.close()
        except OSError:  # the client went away while it waited, or there is no memory to fork
            traceback.print_exc()
            connection.close()
        finally:
            for stream in streams:
                os.close(stream)

    def run(self, connection: socket.socket, request: dict, streams: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self.detach(connection)
                status = _job(self.main, request, streams)
            finally:  # whatever happens, a child never comes back into the server's loop
                os._exit(status)
        with contextlib.suppress(OSError):  # here too: either side may come first
            os.setpgid(pid, pid)
        self.jobs.add(pid)
        child = os.pidfd_open(pid)
        register = partial(self.selector.register, events=selectors.EVENT_READ)
        register(connection, data=partial(self.forward, connection, pid))
        register(child, data=partial(self.finish, connection, pid, child))

    def detach(self, connection: socket.socket) -> None:
        """In the child: die with the server, lead a group of its own, let go of other jobs."""
        die_with_parent()
        if os.getppid() != self.pid:  # the server died before the line above
            os._exit(1)
        os.setpgid(0, 0)
        connection.close()
        for key in list(self.selector.get_map().values()):
            os.close(key.fd)

    def forward(self, connection: socket.socket, pid: int) -> None:
        """Pass the client's signals on to the job; kill the job if the client is gone."""
        if pid not in self.jobs:  # it ended in this very round of events
            return
        try:
            signals = connection.recv(64)
        except ConnectionError:
            signals = b""
        if not signals:
            self.selector.unregister(connection)
        for number in signals or [signal.SIGKILL]:
            os.killpg(pid, number)

    def finish(self, connection: socket.socket, pid: int, child: int) -> None:
        """Send the exit status, as a shell would give it: 128 + n for a job ended by signal n."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.jobs.remove(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # processes that a method started and left
        self.end_orphans()
        self.selector.unregister(child)
        os.close(child)
        with contextlib.suppress(KeyError):  # already done if the client is gone
            self.selector.unregister(connection)
        with connection, contextlib.suppress(OSError):
            connection.sendall(bytes([code if code >= 0 else 128 - code]))

    def end_orphans(self) -> None:
        """Kill what jobs left in groups of their own, and take in all that have ended."""
        for pid in set(_children(self.pid)) - self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:  # a kernel without this file
        return []


def _receive(connection: socket.socket, streams: list[int]) -> dict:
    """The request; fills `streams` with the client's three standard streams."""
    connection.settimeout(10)  # a client sends all at once or is stopped: do not wait with it
    size, fds, _, _ = socket.recv_fds(connection, 4, 3)
    streams.extend(fds)
    if len(size) != 4 or len(fds) != 3:
        raise ConnectionError("a client left before it had sent its request")
    length, request = struct.unpack("=I", size)[0], bytearray()
    while len(request) < length:
        part = connection.recv(length - len(request))
        if not part:
            raise ConnectionError("a client left before it had sent its request")
        request += part
    connection.settimeout(None)
    return json.loads(request)


def _job(main: Callable[[list[str]], int], request: dict, streams: list[int]) -> int:
    """Become the client's command, run it, return its exit status; nothing escapes."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=True)  # keep the object: loggers hold it
    sys.argv = ["prunebench", *request["argv"]]
    os.environ.clear()
    os.environ.update(request["environ"])
    try:
        os.chdir(request["cwd"])
        status = main(request["argv"]) or 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            sys.stderr.write(f"{status}\n")
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):  # the reader of the streams may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    return status & 0xFF


if __name__ == "__main__":
    listening, lifeline_, owner_ = map(int, sys.argv[1:4])
    serve(socket.socket(fileno=listening), lifeline_, owner_, sys.argv[4], sys.argv[5:])
