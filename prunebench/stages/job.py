"""What a stage is called with, and how it is run: each reads artefacts and writes one record.

A record's status is "ok" or "failed". A cell fails where its method or its training breaks; the
failure is recorded and passed on, so that it costs its own cells only. Anything else that goes
wrong (disk, memory, corrupt files) stops the command and is tried again by the next run.
"""

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from prunebench import models
from prunebench.errors import CellError, machine_fault
from prunebench.evaluation import cost
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts
from prunebench.records.provenance import PACKAGE, code_hash, provenance
from prunebench.tracks import RUNS, Cell, Layout, Paths, Track, as_dict
from prunebench.training import loop, parallel
from prunebench.training.checkpoints import SECONDS, Checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of a stage.

    Attributes:
        stage: name of the stage.
        track: whose settings it follows.
        names: what it is called with besides, by name: see Stage.names; and its options.
        runs: folder of all tracks' artefacts.
        log: where the output goes; named on the row of a failed cell.
        start: time.perf_counter() at the beginning.
    """

    stage: str
    track: Track
    names: Mapping[str, object] = field(default_factory=dict)
    runs: Path = RUNS
    log: str | None = None
    start: float = field(default_factory=time.perf_counter)

    @property
    def model(self) -> str:
        return self.names["model"]

    @property
    def settings(self) -> Mapping:
        """What the track says of the model."""
        return self.track.model(self.model)

    @property
    def family(self) -> ModuleType:
        return models.family(self.settings["family"])

    @property
    def content(self) -> Mapping:
        """All that the track says."""
        return self.track.content

    @cached_property
    def cell(self) -> Cell:
        axes = {name: self.names[name] for name in Cell.__dataclass_fields__ if name in self.names}
        return Cell(**{**axes, "track": self.track.name})

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.track, self.runs)

    @cached_property
    def paths(self) -> Paths:
        """Of the cell."""
        return Paths(self.track, self.cell, self.runs)

    @cached_property
    def record(self) -> Path:
        """Where the stage's own record goes."""
        return Path(self.layout.record(self.stage, **self.names))

    def file(self, name: str) -> Path:
        """A file beside the stage's own record."""
        return self.record.with_name(name)

    def dense(self) -> nn.Module:
        """The verified dense model, on the CPU."""
        record = self.layout.record("dense", **self.names)
        artefacts.read_record(record)
        return surgery.load(Path(record).parent)[0]

    def save(self, network: nn.Module, plan: Plan) -> list[Path]:
        """Write a network beside the record; returns its files."""
        folder, settings = self.record.parent, self.settings
        return surgery.save(folder, network, plan, settings["family"], settings["config"])

    def checkpoints(self, *inputs: str | Path) -> Checkpoints:
        """Where the trainings are saved, for a later start of the same job on the same inputs."""
        identity = {
            "code": code_hash(PACKAGE),
            "torch": torch.__version__,
            "track": self.track.fingerprint(self.stage, **self.names),
            "names": dict(self.names),
            "inputs": {str(file): artefacts.sha256(file) for file in inputs},
        }
        seconds = self.content.get("checkpoint_seconds", SECONDS)
        return Checkpoints(artefacts.training_folder(self.record), identity, seconds)

    def finish(self, payload: list[Path], earlier_s: float = 0.0, **content: object) -> None:
        """Write the record of a stage that went well.

        Args:
            payload: files that the record vouches for.
            earlier_s: seconds of work that other starts or other jobs did for it.
        """
        seconds = time.perf_counter() - self.start + earlier_s
        source = {"wall_s": seconds, "provenance": provenance(dict(self.content))}
        artefacts.write_record(self.record, {"status": "ok", **content, **source}, payload)
        Checkpoints(artefacts.training_folder(self.record)).discard()


def upstream(record: str | Path) -> dict:
    """A verified input record; a failed one fails this stage with the same failure."""
    content = artefacts.read_record(record)
    if content["status"] == "failed":
        raise CellError(content["failure"]["error"], inherited=content["failure"])
    return content


def guarded(stage: Callable[[Job], None], job: Job) -> bool:
    """Run a stage of a cell; record a failure of the cell instead of raising it.

    Returns:
        True if the cell is well.
    """
    try:
        stage(job)
        return True
    except (CellError, RuntimeError) as error:  # RuntimeError: the pruned model does not run
        if machine_fault(error):
            raise
        traceback.print_exc()
        own = {"stage": job.stage, "error": str(error), "log": job.log}
        failure = getattr(error, "inherited", None) or own
        if parallel.rank() and not isinstance(error, CellError):
            raise  # the other processes may not have failed with this one
    log.error("cell failed in %s: %s", failure["stage"], failure["error"])
    if parallel.rank():
        return False  # the first process writes
    content = {"schema": 1, "status": "failed", "cell": as_dict(job.cell), "failure": failure}
    content |= {"labels": labels(job), "provenance": provenance(dict(job.content))}
    artefacts.write_record(job.record, content)
    Checkpoints(artefacts.training_folder(job.record)).discard()
    return False


# ---- what records say


def labels(job: Job) -> dict:
    """What a table says of a cell's method and model."""
    method, settings = job.track.method(job.cell.method), job.settings
    names = ("kind", "control", "reconstruction", "title", "paper", "bibtex", "notes")
    return {
        "family": settings["family"],
        "healing": job.track.healing(job.cell),
        "objective": settings["objective"]["name"],
        **{name: getattr(method, name) for name in names},
        "idea": method.idea,
    }


def shared_settings(job: Job) -> dict:
    """What of the track made every cell of a model."""
    common = ("dataset", "extractor", "budgets", "sampling", "latency", "evaluation")
    kinds = ("autoencoder", "text_encoder")
    coders = {kind: job.track.coder(job.settings[kind])[1] for kind in kinds if kind in job.settings}
    return {"model": job.settings, **coders, **{name: job.content[name] for name in common}}


def training_report(progress: loop.Progress, checkpoints: Checkpoints) -> dict:
    """Under what conditions a stage trained."""
    return {
        "micro_batch": progress.micro_batch,
        "processes": parallel.world(),
        "resumed": checkpoints.resumed,
    }


def sizes(whole: nn.Module, pruned: nn.Module, plan: Plan) -> dict:
    """Parameters of a pruned model and of the dense one."""
    return {
        "parameters": cost.count_parameters(pruned),
        "nonzero_parameters": cost.count_nonzero(pruned),
        "dense_parameters": cost.count_parameters(whole),
        "sparsity_reached": targets.reached(whole, pruned, plan),
    }
