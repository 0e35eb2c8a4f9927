"""A fork server: commands start from a process that has imported torch and the others already.

Those imports cost seconds, most stages of the embedded track compute for about as long, and there
are hundreds of stages. So the workflow starts one server, which imports everything once and forks a
child per command. The `prunebench` command of the shell line, the client, hands over its arguments,
folder, environment and standard streams and waits, so that for Snakemake it *is* the job: same
output, same exit status, and killing it kills the job.

One connection per command, over a socket in a private folder:
  client  a length with the three streams attached, then a request in JSON
  server  RUNNING, or STALE if the code on disk is not the code it imported: nothing is done
  client  later bytes are signals to pass on; a closed connection means: kill the job
  server  one byte, the exit status
Where nobody answers nothing was started, so the client does the work itself; after RUNNING, never.

Only light parts of the standard library are imported here: the client starts in milliseconds.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "PRUNEBENCH_WARM"  # names the server's socket to the client
PACKAGE = Path(__file__).parents[1]
RUNNING, STALE = b"r", b"s"
PRELOAD_SECONDS = 120  # imports from a cold network disk; after that the client works alone
FORWARDED = (signal.SIGTERM, signal.SIGINT)
MOST_CHARACTERS = 80  # of the folder of a socket, whose path holds 107
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def fingerprint(package: Path = PACKAGE) -> list:
    """Path, time and size of every source file: equal means that the code was not edited."""
    files = [(str(path), path.stat()) for path in sorted(package.rglob("*.py"))]
    return [[path, status.st_mtime_ns, status.st_size] for path, status in files]


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends."""
    prctl(PR_SET_PDEATHSIG, number)


def prctl(option: int, value: int) -> None:
    import ctypes  # not needed by the client

    ctypes.CDLL(None).prctl(option, value)


# ---- starting the server


def start(owner: int, preload: Iterable[str], main: str) -> str | None:
    """Start a server in the background and return its socket; None where that is impossible.

    The socket takes connections at once: clients that come during the imports wait for their end.
    The server ends, and its folder goes, when the process `owner` does, however that ends.
    It only saves time: where it cannot be started, on a full disk for one, the run goes without.

    Args:
        owner: process id, usually of the Snakemake main process.
        preload: modules to import before the first command.
        main: "module:function", called in the child with the argument list; returns the status.
    """
    try:
        lifeline = os.pidfd_open(owner)
    except (AttributeError, OSError):
        return None
    try:
        folder = _folder(owner)
        if owner == os.getpid():  # a server that is killed leaves it
            atexit.register(_remove, folder)
        return _serve(folder, owner, lifeline, preload, main)
    except OSError as error:
        sys.stderr.write(f"prunebench: no warm server ({error}); every job imports for itself\n")
        return None
    finally:
        os.close(lifeline)


def _folder(owner: int) -> str:
    """A new private folder, whose path leaves room for a socket's, which are short.

    Those that owners left which were killed, and their servers too, go.
    """
    import tempfile

    places = [place for place in ("/tmp", tempfile.gettempdir()) if len(place) < MOST_CHARACTERS]
    for place in places:
        with contextlib.suppress(OSError):
            _clear(Path(place))
            return tempfile.mkdtemp(prefix=f"prunebench-{owner}-", dir=place)  # mode 0700
    raise OSError(f"no folder can be made in {' or '.join(places)}")


def _clear(place: Path) -> None:
    """Remove the folders of killed owners in which nobody listens any more."""
    for folder in place.glob("prunebench-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(str(folder / "socket")):
                    _remove(folder)  # not another user's, whose folders are theirs alone


def _remove(folder: str | Path) -> None:
    import shutil  # not needed by the client

    shutil.rmtree(folder, ignore_errors=True)


def _serve(folder: str, owner: int, lifeline: int, preload: Iterable[str], main: str) -> str:
    import subprocess  # not needed by the client

    path = f"{folder}/socket"
    # Thread pools do not survive a fork, so none may start during the imports. Torch's number is
    # the command's to choose; numpy's stays at one, which is what Snakemake gives a one-thread job.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # Asking whether there is a GPU must not initialise CUDA, which does not survive it either.
    environment = os.environ | threads | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    with socket.socket(socket.AF_UNIX) as listener, Path(folder, "log").open("w") as log:
        listener.bind(path)
        listener.listen(128)
        fds = (listener.fileno(), lifeline)
        server = [sys.executable, "-P", "-m", "prunebench.runtime.warm_server"]
        process = subprocess.Popen(
            [*server, *map(str, fds), str(owner), main, *preload],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the commands, which get it from their clients
        )
    process.returncode = 0  # nobody waits for it: keeps Popen from warning that it still runs
    return path


# ---- the client


def delegate(argv: list[str]) -> int | None:
    """Run the command on the server; its exit status, or None: the caller has to do the work."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    there = Path(path).exists()
    try:
        connection = _submit(path, argv)
    except OSError as error:  # another machine, an earlier run's socket, or an import that failed
        if there and not Path(path).exists():  # the server went, as it does with the run
            return _refused("the run that this command belongs to has ended")
        return _alone(f"no warm server at {path} ({error})")
    if connection is None:  # results of two versions are not to lie side by side
        return _refused("the code of prunebench changed while it ran; give the same command again")
    with connection:
        for number in FORWARDED:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        try:
            status = connection.recv(1)
        except ConnectionError:
            status = b""
    if not status:
        sys.stderr.write("prunebench: the warm server died, and this command with it; run again\n")
        return 1
    return status[0]


def _refused(reason: str) -> int:
    sys.stderr.write(f"prunebench: {reason}; nothing was done\n")
    return 1


def _alone(reason: str) -> None:
    sys.stderr.write(f"prunebench: {reason}; importing everything here\n")


def _submit(path: str, argv: list[str]) -> socket.socket | None:
    """Connection to the running job, None if the server is stale; OSError if nobody answers."""
    code, environment = fingerprint(), dict(os.environ)
    fields = {"argv": argv, "cwd": str(Path.cwd()), "environ": environment, "fingerprint": code}
    request = json.dumps(fields).encode()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(PRELOAD_SECONDS)
        connection.connect(path)
        socket.send_fds(connection, [struct.pack("=I", len(request))], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(1)
        if not answer:
            raise ConnectionResetError("it ended while it was importing")
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    if answer == RUNNING:
        return connection
    connection.close()
    return None
