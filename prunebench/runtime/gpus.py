"""Which GPUs a command of the workflow runs on, and torchrun where it has several. Free of torch.

Snakemake counts GPUs (`resources: gpu`) but hands none out: on one machine every job would take the
first. So a command claims as many as its rule gives it, by file locks that the kernel gives up with
the process, and hides the others through CUDA_VISIBLE_DEVICES, which CUDA reads when it is first
used. Under a cluster's scheduler nothing is claimed: the variable names what the job was granted.

A job that was given a GPU and can't use it fails at once (`require`), unless its track allows the
CPU: hours on the CPU, and numbers that are taken for a GPU's, are worse.
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
from collections.abc import Iterable
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
        claimed = claim(count)
        if claimed or not count:  # else the variable stays as it is, for `require` to judge
            os.environ[VISIBLE] = ",".join(claimed)
    elif not count:  # and none granted in another way (gres): not to take another job's
        os.environ.setdefault(VISIBLE, "")
    granted = _names(os.environ.get(VISIBLE, ""))
    if 0 < count < len(granted):  # the shell's or the whole node's: more than the rule asks for
        granted = granted[:count]
        os.environ[VISIBLE] = ",".join(granted)
    if parallel and len(granted) > 1:
        torchrun(len(granted), argv)


# ---- whether there are any, and whether they can be used


def devices() -> list[str]:
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names or would name them; [] without any.

    They are counted as CUDA counts them. Parts of a GPU (MIG) have no numbers and go by their UUID.
    """
    if VISIBLE in os.environ:
        return _names(os.environ[VISIBLE])
    listing = _listing()
    parts = re.findall(r"^\s+MIG .*\(UUID:\s*(\S+?)\)", listing, re.MULTILINE)
    return parts or re.findall(r"^GPU (\d+):", listing, re.MULTILINE)


def _listing() -> str:
    """What nvidia-smi says, be it that it can't reach the driver; "" where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return told.stdout or told.stderr or "nothing"


def absent() -> str | None:
    """Why no GPU is to be seen here, and the remedy; None if one is. Free of torch."""
    if devices():
        return None
    if VISIBLE in os.environ:
        return (
            f"{VISIBLE}={os.environ[VISIBLE]!r} hides every GPU; unset it, or name those that may "
            "be used"
        )
    told = _listing().strip().partition("\n")[0]
    if told:
        return f"nvidia-smi lists no GPU (it says {told!r}); mend the driver, or go elsewhere"
    return (
        "this machine has no GPU (there is no nvidia-smi); use one that has, or on a cluster a "
        f"partition; if there is one all the same, name it in {VISIBLE}"
    )


def trouble() -> str | None:
    """Why this process can't use CUDA, and the remedy; None if it can, and then it has begun to."""
    if reason := absent():
        return reason
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA"
    try:
        torch.zeros(1, device=f"cuda:{os.environ.get(RANK, '0')}").item()
    except (RuntimeError, AssertionError) as error:
        told = str(error).strip().partition("\n")[0]
        return (
            f"CUDA {torch.version.cuda} of torch {torch.__version__} fails with {told!r}; compare "
            "it with the driver's version and what else runs on the GPU, as nvidia-smi shows them"
        )
    return None


def trouble_of_a_job() -> str | None:
    """As `trouble`, asked of another process: this one does not touch CUDA, nor import torch."""
    if reason := absent():
        return reason
    code = "from prunebench.runtime import gpus; print(gpus.trouble() or '', end='')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if told.returncode:
        return f"asking torch ended with {told.stderr.strip().rpartition(chr(10))[2]!r}"
    return told.stdout or None


def require(count: int, stage: str, cpu_instead: bool) -> None:
    """Refuse to run on the CPU what asked for GPUs; called where CUDA is used, after `prepare`.

    Args:
        count: how many GPUs the rule gave.
        stage: whose rule it is.
        cpu_instead: the track allows the CPU, which is then used, and the log says why.

    Raises:
        UserError: CUDA can't be used; with the reason and the remedy.
    """
    reason = trouble() if count else None
    if reason and not cpu_instead:
        raise UserError(refusal(reason, [stage]))
    if reason:
        log.warning("on the CPU, as needs.%s.cpu_instead allows: %s", stage, reason)
        os.environ[VISIBLE] = ""


def refusal(reason: str, stages: Iterable[str]) -> str:
    """What is said where stages ask for GPUs that can't be used."""
    keys = ", ".join(f"needs.{stage}.gpu" for stage in stages)
    return (
        f"{keys}: a GPU is asked for and none can be used: {reason}. Where the CPU will do, say "
        "`cpu_instead: true` beside `gpu`"
    )


def _names(visible: str) -> list[str]:
    """The devices of a list, up to the first that is none (-1), where CUDA stops reading."""
    names = (name.strip() for name in visible.split(","))
    return list(itertools.takewhile(lambda name: not name.startswith("-"), filter(None, names)))


def claim(count: int) -> list[str]:
    """Wait until `count` of the machine's GPUs are free; they are this process's until it ends.

    Where the machine has fewer, all of them: the same work on fewer GPUs, or on the CPU.

    Raises:
        UserError: there are no locks to share them out by, and more of them than are asked for.
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
        path = LOCKS / f"{name.replace('/', '_')}.lock"  # old names of parts have slashes
        file = _locked(path, others=len(known) > count)
        if file is not None:
            locks[name] = file
        if len(locks) == count:
            return locks
    for file in locks.values():
        os.close(file)
    return {}


def _locked(path: Path, others: bool) -> int | None:
    """The locked file; None where another process has it. `others`: there are GPUs to choose from.

    Where the file system has no locks, all GPUs are taken as free if all are asked for.
    """
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
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        told = f"{path}: {error.strerror}: jobs share out GPUs by locks there"
        if others:
            os.close(file)
            raise UserError(
                f"{told}; show the run one GPU ({VISIBLE}=0) and let it use one at a time "
                "(snakemake --resources gpu=1)"
            ) from None
        log.warning("%s; let the run use one at a time (snakemake --resources gpu=1)", told)
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
