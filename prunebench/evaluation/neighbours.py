"""Who else computes here: what other processes use of the CPU and the GPU that latency is timed on.

Everything is measured, not asked of a scheduler: a job of another user, a browser and a virtual
machine's stolen time slow a timing down alike. CPU is that of the whole machine, or with a GPU that
of the cores that this process may run on: an exclusive GPU may lie in a node that is shared.
"""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil
import torch

log = logging.getLogger(__name__)

# The services of an idle system use hundredths of a core, the smallest neighbour that computes a
# whole one. A look of WINDOW seconds is right to 0.1 cores, since the kernel counts ticks of 10 ms.
QUIET_CORES = 0.25
QUIET_GPU = 5  # percent of the time; an idle GPU shows 0, a desktop that is drawn some
WINDOW = 0.2
PAUSE = 0.8  # seconds between two looks while waiting
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # guests are in user already
SMI_SECONDS = 20  # nvidia-smi without its daemon initialises every GPU of the node


@dataclass(frozen=True)
class Load:
    """What others use; None: there is no GPU, or nothing says."""

    cpu: float  # cores
    gpu_processes: int | None = None  # that hold a context, whether they compute or not
    gpu_utilisation: float | None = None  # percent; None too while we compute ourselves

    @property
    def busy(self) -> bool:
        """Whether somebody else computes. An idle process may hold a GPU for days: not this."""
        return self.cpu > QUIET_CORES or (self.gpu_utilisation or 0) > QUIET_GPU

    def __str__(self) -> str:
        text = f"others use {self.cpu:.2f} cores"
        if self.gpu_processes is not None:
            text += f", {self.gpu_processes} processes hold the GPU"
        return text + (f", busy {self.gpu_utilisation:g} %" if self.gpu_utilisation else "")


class Watch:
    """Meters what others use from its making on."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        pinned = on_cuda and hasattr(os, "sched_getaffinity")
        self.cores = os.sched_getaffinity(0) if pinned else range(psutil.cpu_count())
        self.start = self._clock()

    def load(self, idle: bool = False) -> Load:
        """What others used on average, over WINDOW seconds at least.

        Args:
            idle: we did nothing meanwhile, so the GPU's work is theirs.
        """
        time.sleep(max(0.0, self.start[0] + WINDOW - time.perf_counter()))
        (start, used), (end, using) = self.start, self._clock()
        cpu = max(0.0, (using - used) / (end - start))
        processes, utilisation = gpu_use(self.device)
        return Load(round(cpu, 2), processes, utilisation if idle else None)

    def _clock(self) -> tuple[float, float]:
        """Seconds since some moment, and CPU seconds that all other processes have used."""
        times = enumerate(psutil.cpu_times(percpu=True))
        mine = [core for number, core in times if number in self.cores]
        busy = sum(getattr(core, name, 0.0) for core in mine for name in BUSY)
        return time.perf_counter(), busy - time.process_time()


def look(device: torch.device | str = "cpu") -> Load:
    """What others use now; takes WINDOW seconds, and on CUDA as long as nvidia-smi."""
    return Watch(device).load(idle=True)


def wait(seconds: float, observe: Callable[[], Load]) -> tuple[float, Load]:
    """Wait up to `seconds` until nobody else computes.

    Returns:
        The seconds waited, 0 where it was quiet at once, and the last load that was observed.
    """
    start = time.monotonic()
    load = observe()
    if not load.busy or seconds <= 0:
        return 0.0, load
    log.warning("%s: waiting up to %g s for a quiet machine", load, seconds)
    while load.busy and (left := start + seconds - time.monotonic()) > 0:
        time.sleep(min(PAUSE, left))
        load = observe()
    waited = time.monotonic() - start
    log.info("%s after %.0f s: %s", "not quiet" if load.busy else "quiet", waited, load)
    return round(waited, 1), load


def alone(loads: Iterable[Load], device: torch.device | str = "cpu") -> bool | None:
    """Whether nobody else computed and, on CUDA, held the GPU; None where nothing says."""
    loads = list(loads)
    if any(load.busy or load.gpu_processes for load in loads):
        return False
    blind = torch.device(device).type == "cuda" and any(x.gpu_processes is None for x in loads)
    return None if blind else True


def gpu_use(device: torch.device | str) -> tuple[int | None, float | None]:
    """Other processes on a CUDA device and its utilisation in percent; (None, None) without one."""
    device = torch.device(device)
    if device.type != "cuda":
        return None, None
    # Containers may hide processes of others; their work shows in the utilisation all the same.
    try:
        gpus = _nvidia_smi("--query-gpu=uuid,utilization.gpu")
        applications = _nvidia_smi("--query-compute-apps=gpu_uuid,pid")
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi does not tell who uses the GPU: %s", error)
        return None, None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return parse_gpu_use(uuid, gpus, applications, os.getpid())


def parse_gpu_use(
    uuid: str, gpus: str, applications: str, own: int
) -> tuple[int | None, float | None]:
    """Read what `gpu_use` asked nvidia-smi for: lines of "GPU-<uuid>, <number>".

    Args:
        uuid: the GPU as CUDA names it, without "GPU-". A slice of one (MIG) is not listed.
        gpus: uuid and utilisation of every GPU; "[N/A]" or the like where it is not known.
        applications: uuid and process id of every compute process.
        own: our process id, which does not count.
    """
    utilisation = dict(_pairs(gpus)).get(uuid)
    if utilisation is None:
        return None, None
    others = {pid for gpu, pid in _pairs(applications) if gpu == uuid and pid != str(own)}
    return len(others), float(utilisation) if utilisation.isdecimal() else None


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        gpu, comma, value = (part.strip() for part in line.partition(","))
        if comma:
            yield gpu.removeprefix("GPU-"), value


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=SMI_SECONDS
    ).stdout
