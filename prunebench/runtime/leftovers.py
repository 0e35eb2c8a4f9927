"""Jobs that a killed controller left in Slurm's queue: found by name and folder, and cancelled."""

import re
import subprocess
import time
from pathlib import Path

from prunebench.errors import UserError

GONE_SECONDS = 120  # a job that ends takes its node's KillWait, 30 s by default
POLL_SECONDS = 1.0


def cancel(prefix: str, folder: Path) -> tuple[list[str], list[str]]:
    """Cancel the jobs of earlier runs in `folder` and wait until they are gone.

    To be called only where no run of the folder is alive.

    Args:
        prefix: of the jobs' names, the profile's `slurm-jobname-prefix`.
        folder: the runs' working directory.

    Returns:
        Ids of the cancelled jobs, and of those that are still there after GONE_SECONDS, as on a
        node that doesn't answer.

    Raises:
        UserError: Slurm doesn't answer.
    """
    found = submitted(_slurm("squeue", "--me", "--noheader", "--format=%i|%j|%Z"), prefix, folder)
    if not found:
        return [], []
    _slurm("scancel", *found)
    deadline, left = time.monotonic() + GONE_SECONDS, found
    while left and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        queue = _slurm("squeue", "--me", "--noheader", "--format=%i").split()
        left = [job for job in found if job in queue]
    return found, left


def submitted(queue: str, prefix: str, folder: Path) -> list[str]:
    """Ids of the jobs in squeue's lines "id|name|folder" that Snakemake submitted from `folder`.

    It names jobs "<prefix>_<uuid of the run>". A job of the same folder with another name, such as
    one in which Snakemake itself runs, is not among them.
    """
    name_ = re.compile(
        (f"{re.escape(prefix)}_" if prefix else "") + r"[0-9a-f]{8}(-[0-9a-f]{4,12}){4}"
    )
    found = []
    for line in queue.splitlines():
        job, name, place = line.strip().split("|", 2)
        if name_.fullmatch(name) and Path(place).resolve() == folder.resolve():
            found.append(job)
    return found


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"Slurm does not answer, so nothing was started: {command[0]}: {done.stderr.strip()}; "
            "give the same command again when it does"
        )
    return done.stdout
