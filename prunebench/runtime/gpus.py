"""Which GPUs a command of the workflow runs on, and torchrun where it has several. Free of torch.

Snakemake counts GPUs (`resources: gpu`) but hands none out: on one machine every job would take the
first. So a command claims as many as its rule gives it, by file locks that the kernel gives up with
the process, and hides the others through CUDA_VISIBLE_DEVICES, which CUDA reads when it is first
used. Under a cluster's scheduler nothing is claimed: the variable names what the job was granted.
"""

import fcntl
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from prunebench.errors import UserError
from prunebench.runtime import warm

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
CLAIM = "PRUNEBENCH_CLAIM_GPUS"  # set by a Snakefile that runs its jobs on this machine
RANK = "LOCAL_RANK"  # set by torchrun for its processes
# Of this user. Not in TMPDIR, which may differ between runs: all on the machine must see the same.
LOCKS = Path(f"/tmp/prunebench-gpus-{os.getuid()}")
POLL_SECONDS = 1.0


def prepare(count: int, argv: list[str], parallel: bool = False) -> None:
    """Make this process run on the GPUs that its rule gave it; called before CUDA is first used.

    Args:
        count: how many the rule gave. 0 on one machine: none is seen, the command runs on the CPU.
        argv: the command line, which torchrun is given.
        parallel: whether the command can use several, one process each, which torchrun then starts
            in place of this process.
    """
    if RANK in os.environ:  # one of torchrun's: it must not outlive it, wherever the kill hits
        warm.die_with_parent()
        return
    if CLAIM in os.environ:
        os.environ[VISIBLE] = ",".join(claim(count))
    elif not count:  # and none granted in another way (gres): not to take another job's
        os.environ.setdefault(VISIBLE, "")
    granted = _names(os.environ.get(VISIBLE, ""))
    if 0 < count < len(granted):  # the shell's or the whole node's: more than the rule asks for
        granted = granted[:count]
        os.environ[VISIBLE] = ",".join(granted)
    if parallel and len(granted) > 1:
        torchrun(len(granted), argv)


def devices() -> list[str]:
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names or would name them; [] without any.

    They are counted as CUDA counts them. Parts of a GPU (MIG) have no numbers and go by their UUID.
    """
    if VISIBLE in os.environ:
        return _names(os.environ[VISIBLE])
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    parts = re.findall(r"^\s+MIG .*\(UUID:\s*(\S+?)\)", listing.stdout, re.MULTILINE)
    return parts or re.findall(r"^GPU (\d+):", listing.stdout, re.MULTILINE)


def _names(visible: str) -> list[str]:
    """The devices of a list, up to the first that is none (-1), where CUDA stops reading."""
    names = (name.strip() for name in visible.split(","))
    return list(itertools.takewhile(lambda name: not name.startswith("-"), filter(None, names)))


def claim(count: int) -> list[str]:
    """Wait until `count` of the machine's GPUs are free; they are this process's until it ends.

    Where the machine has fewer, all of them: the same work on fewer GPUs, or on the CPU.
    """
    known = devices() if count else []
    count = min(count, len(known))
    locks = _lock(known, count)
    if len(locks) < count:
        log.info("waiting for %d of %d GPUs to be free", count, len(known))
    while len(locks) < count:
        time.sleep(POLL_SECONDS)
        locks = _lock(known, count)
    return list(locks)


def _lock(known: list[str], count: int) -> dict[str, int]:
    """Lock `count` devices, or none, so that two commands never wait for each other's.

    Returns:
        The open lock files by device. Closing one, or the end of the process, gives its device up.
    """
    locks = {}
    for name in known if count else ():
        file = _locked(LOCKS / f"{name.replace('/', '_')}.lock")  # old names of parts have slashes
        if file is not None:
            locks[name] = file
        if len(locks) == count:
            return locks
    for file in locks.values():
        os.close(file)
    return {}


def _locked(path: Path) -> int | None:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: jobs share out GPUs by lock files there; free some space, "
            "or make it writable"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    os.set_inheritable(file, True)  # torchrun takes the place of this process
    return file


def torchrun(processes: int, argv: list[str]) -> None:
    """Become torchrun, which starts this command once per GPU. Does not return."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "prunebench", *argv]
    log.info("%d GPUs: %s", processes, " ".join(command[1:]))
    os.environ.pop(warm.VARIABLE, None)  # the processes are not for the warm server to start
    sys.stdout.flush()
    os.execv(sys.executable, command)
