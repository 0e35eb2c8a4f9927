"""What a run asks of Slurm beside its executor plugin: left-over jobs, and preempted ones.

Jobs that a killed controller left in the queue are found by name and folder, and cancelled.
"""

import functools
import getpass
import re
import subprocess
import time
from pathlib import Path
from types import ModuleType

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
    found = left = submitted(_queue("%i|%j|%Z"), prefix, folder)
    if not found:
        return [], []
    # One that has ended since it was listed makes scancel fail; who is still there counts.
    subprocess.run(["scancel", *found], capture_output=True, check=False)
    deadline = time.monotonic() + GONE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        queue = _queue("%i").split()
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
        # Not "CLUSTER: name", which stands above each cluster's jobs where there are several.
        job, name, place = (*line.strip().split("|", 2), "", "")[:3]
        if name_.fullmatch(name) and Path(place).resolve() == folder.resolve():
            found.append(job)
    return found


def _queue(fields: str) -> str:
    """This user's jobs. By name, because `squeue --me` is younger than some clusters."""
    command = ["squeue", "--user", getpass.getuser(), "--noheader", f"--format={fields}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"squeue can't be run here ({error.strerror}), so nothing was started: give the "
            "command on a machine from which jobs are submitted, such as a login node"
        ) from None
    if done.returncode:
        raise UserError(
            f"Slurm does not answer, so nothing was started: squeue: {done.stderr.strip()}; "
            "give the same command again when it does"
        )
    return done.stdout


def resubmit_preempted(plugin: ModuleType) -> None:
    """Have the Slurm executor plugin take preempted jobs for failed ones, which it submits again.

    The plugin waits until Slurm starts them again, which never happens under `slurm-no-requeue`.

    Args:
        plugin: the module snakemake_executor_plugin_slurm.
    """
    query = plugin.query_job_status

    @functools.wraps(query)
    async def query_job_status(command: str, logger: object) -> tuple:
        states, seconds = await query(command, logger)
        if states is not None:
            states = {job: _failed_if_preempted(state) for job, state in states.items()}
        return states, seconds

    plugin.query_job_status = query_job_status


def _failed_if_preempted(state: str) -> str:
    return "FAILED" if state.startswith("PREEMPTED") else state
