"""What every stage is called with: a job, which knows what to read and writes one record."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

from prunebench import models
from prunebench.errors import CellError
from prunebench.records import artefacts
from prunebench.records.provenance import provenance
from prunebench.tracks import RUNS, Cell, Layout, Paths, Track


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

    def finish(self, payload: list[Path], earlier_s: float = 0.0, **content: object) -> None:
        """Write the record of a stage that went well.

        Args:
            payload: files that the record vouches for.
            earlier_s: seconds of work that other starts or other jobs did for it.
        """
        seconds = time.perf_counter() - self.start + earlier_s
        source = {"wall_s": seconds, "provenance": provenance(dict(self.content))}
        artefacts.write_record(self.record, {"status": "ok", **content, **source}, payload)
        artefacts.forget_training(self.record)


def upstream(record: str | Path) -> dict:
    """A verified input record; a failed one fails this stage with the same failure."""
    content = artefacts.read_record(record)
    if content["status"] == "failed":
        raise CellError(content["failure"]["error"], inherited=content["failure"])
    return content


# ---- what records say


def labels(job: Job) -> dict:
    """What a table says of a cell's method and model."""
    method, settings = job.track.method(job.cell.method), job.settings
    names = ("kind", "control", "reconstruction", "title", "paper", "bibtex", "notes")
    return {
        "family": settings["family"],
        "healing": job.track.recovered_by(job.cell),
        "objective": settings["objective"]["name"],
        **{name: getattr(method, name) for name in names},
        "idea": method.idea,
    }


def shared_settings(job: Job) -> dict:
    """What of the track made every cell of a model."""
    common = ("dataset", "extractor", "budgets", "sampling", "latency", "evaluation")
    kinds = [kind for kind in ("autoencoder", "text_encoder") if kind in job.settings]
    coders = {kind: job.track.coder(job.settings[kind])[1] for kind in kinds}
    return {"model": job.settings, **coders, **{name: job.content[name] for name in common}}
