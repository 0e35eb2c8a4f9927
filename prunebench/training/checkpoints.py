"""Trainings that go on where they were when their stage is killed.

A stage that starts again does what it did before, with the same seeds; of its trainings, which take
the time, each *part* (one call of `loop.train`) is taken up where it was last saved. Methods
that score and train by turns so need no code of their own, and the result is that of a stage that
was never interrupted: on a CPU, to the bit.

A part is saved every so many seconds, when it ends, and on SIGTERM, which Slurm sends before it
kills for a time limit. The files lie beside the stage's record and go when that is written.
"""

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from prunebench.errors import UserError
from prunebench.records import artefacts, sealed
from prunebench.records.schema import Checkpoint
from prunebench.training import parallel
from prunebench.training.budget import BudgetMeter

log = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # exit status, as a shell gives it


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...
    def fits(self, state: dict) -> bool: ...


class Checkpoints:
    """The parts that a stage trains, in order.

    Args:
        folder: where they are saved; None: nowhere.
        identity: what the training depends on (JSON types): saved parts of another are not used.
        seconds: how often a part is saved; the last state is saved at its end in any case.

    Attributes:
        resumed: how many parts were taken up from a file.
        earlier_s: seconds that went into these before this process.
    """

    def __init__(
        self, folder: Path | None = None, identity: dict | None = None, seconds: float = math.inf
    ):
        self.folder, self.seconds = folder, seconds
        self.resumed, self.earlier_s = 0, 0.0
        self.identity = json.loads(json.dumps(identity))  # as it reads back
        self.began = self.saved = time.monotonic()
        self._parts = 0

    def part(self, run: Stateful, meter: BudgetMeter) -> "Part":
        """The next part; a context in which `run` is trained from where it was saved."""
        self._parts += 1
        return Part(self, self._parts, run, meter)


class Part:
    """One training of a stage: `with` restores it and saves its end, `step_done` saves between."""

    def __init__(self, owner: Checkpoints, number: int, run: Stateful, meter: BudgetMeter):
        self.owner, self.run, self.meter = owner, run, meter
        self.name = f"part{number}"
        self.spent_before, self.start = Counter(meter.counts), time.perf_counter()
        self.earlier_s, self.stopping, self.file = 0.0, False, None

    def __enter__(self) -> Self:
        state = self._read()
        if state is not None and not self.run.fits(state["run"]):
            log.warning("%s began with other weights or masks: training anew", self.file)
            state = None
        # A late twin may have saved again while the processes read.
        if not parallel.agreed(state["wall_s"] if state else -1.0):
            log.warning("the processes read different saved trainings: training anew")
            state = None
        if state is not None:
            self._restore(state)
        if self.owner.folder and threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "handler"):
            signal.signal(signal.SIGTERM, self.handler)
        # A training shorter than the interval is cheaper done again than written at every end; but
        # on a GPU, done again, its last bits differ, and what follows would not be known again.
        late = time.monotonic() - self.owner.began >= self.owner.seconds
        if kind is None and (late or self.stopping or parallel.device().type == "cuda"):
            self.save()
        # Every process has counted its own share of the batches, which are equal.
        for key, count in self._spent().items():
            self.meter.counts[key] += count * (parallel.world() - 1)
        if kind is None and self.stopping:  # while the last step was saved
            self._end()

    def step_done(self) -> None:
        """Save if it is time; on SIGTERM save and end the process."""
        if not self.owner.folder:
            return
        stopping = parallel.total(float(self.stopping)) > 0  # all processes end at one step
        if stopping or time.monotonic() - self.owner.saved >= self.owner.seconds:
            self.save()
        if stopping:
            self._end()

    def save(self) -> None:
        """Write everything that the rest of the part depends on; a failure is only logged."""
        self.owner.saved = time.monotonic()
        if not self.owner.folder or parallel.rank():
            return
        state = {
            "run": self.run.state_dict(),
            "spent": {key: count * parallel.world() for key, count in self._spent().items()},
            "wall_s": self.earlier_s + time.perf_counter() - self.start,
        }
        # A name of its own: the record goes on vouching for the file before until it is replaced.
        file = self.owner.folder / f"{self.name}-{os.getpid()}-{time.time_ns()}.pt"
        try:
            artefacts.write_atomically(file, lambda temporary: _write(state, temporary))
            sealed.write(self._record, Checkpoint(identity=self.owner.identity), [file])
        # No reason to stop a training that may still end well. OSError: read back for its hash.
        except (UserError, OSError) as error:
            log.warning("not saved: %s", error)
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            return
        if self.file:
            self.file.unlink(missing_ok=True)
        self.file = file

    def _end(self) -> None:
        log.warning("stopped by SIGTERM; the same command goes on from here")
        raise SystemExit(STOPPED)

    def _spent(self) -> dict[str, int]:
        """Images that this process has sent through the models in this part."""
        return {k: count - self.spent_before[k] for k, count in self.meter.counts.items()}

    def _stop(self, *_: object) -> None:
        self.stopping = True

    @property
    def _record(self) -> Path:
        return self.owner.folder / f"{self.name}.json"

    def _read(self) -> dict | None:
        """What was saved of this part by a run of the same training, if it is whole."""
        if not self.owner.folder or not self._record.exists():
            return None
        try:
            record = sealed.read(self._record, Checkpoint)
            if record.identity != self.owner.identity:
                log.info("%s is of another code, track or input: training anew", self._record)
                return None
            self.file = self._record.parent / next(iter(record.files))
            return torch.load(self.file, map_location="cpu", weights_only=True)
        except (UserError, KeyError, StopIteration, RuntimeError, OSError) as error:
            log.warning("a saved training can't be used and is done anew: %s", error)
            return None

    def _restore(self, state: dict) -> None:
        self.run.load_state_dict(state["run"])
        for key, count in state["spent"].items():
            self.meter.counts[key] += count // parallel.world()
        self.earlier_s = state["wall_s"]
        self.meter.wall_s += self.earlier_s
        self.owner.resumed += 1
        self.owner.earlier_s += self.earlier_s
        log.info("going on with a saved training: %s", self.file)


def _write(state: dict, file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # how torch's writer reports a full disk
        raise OSError(str(error)) from error
