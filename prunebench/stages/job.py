"""What every stage is called with: a job, which knows what to read and writes one record."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

from prunebench import models
from prunebench.errors import CellError
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Identity, Labels
from prunebench.records.provenance import provenance
from prunebench.records.schema import RECORDS, Record
from prunebench.tracks import RUNS, Cell, Layout, Paths, Track, plain
from prunebench.tracks.cells import DEFAULT
from prunebench.tracks.settings_benchmark import Model, Sampling


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
    def settings(self) -> Model:
        """What the track says of the model."""
        return self.track.model(self.model)

    @property
    def family(self) -> ModuleType:
        return models.family(self.settings.family)

    @property
    def sampling(self) -> Sampling:
        """How the job's images are drawn, or would be."""
        return self.settings.drawn(self.names.get("sampling", DEFAULT))

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

    @property
    def fingerprint(self) -> str:
        """Of the settings that the stage depends on."""
        return self.track.fingerprint(self.stage, **self.names)

    def identity(self, stage: str, **changes: object) -> Identity:
        """Which result of a stage has this job's names but for `changes`."""
        kind = RECORDS[stage].model_fields["identity"].annotation
        names = {**self.names, **changes}
        known = {**names, **self._implied(stage, names), "stage": stage, "track": self.track.name}
        return kind(**{name: known[name] for name in kind.model_fields})

    def _implied(self, stage: str, names: Mapping) -> dict:
        """What a job is not called with, but its record says."""
        found = {}
        if stage in ("select", "cost"):
            found["selection"] = self.layout.wildcards(stage, names)["selection"]
        if stage == "shard":
            found["shards"] = self.track.shards
        if stage == "oracle":
            found["sparsity"] = self.track.settings.oracle.sparsity
        return found

    def path(self, stage: str, **changes: object) -> Path:
        """Where the record of a stage lies that has this job's names but for `changes`."""
        return Path(self.layout.record(stage, **{**self.names, **changes}))

    def read(self, stage: str, payload: bool = True, **changes: object) -> Record:
        """The verified record of a stage that this one rests on.

        Args:
            payload: whether what it vouches for is read, and so is verified.
            changes: where its names are not this job's.

        Raises:
            CellError: it is that of a failure, which is this stage's too.
        """
        identity = self.identity(stage, **changes)
        record = sealed.read(self.path(stage, **changes), RECORDS[stage], identity, payload=payload)
        if record.failure:
            raise CellError(record.failure.error, inherited=record.failure)
        return record

    def finish(
        self,
        payload: list[Path],
        made_from: Mapping[str, str],
        earlier_s: float = 0.0,
        **content: object,
    ) -> None:
        """Write the record of the stage.

        Args:
            payload: files that the record vouches for.
            made_from: what it rests on, as `sealed.made_from` names it.
            earlier_s: seconds of work that other starts or other jobs did for it.
        """
        record = RECORDS[self.stage](
            identity=self.identity(self.stage),
            wall_s=time.perf_counter() - self.start + earlier_s,
            provenance=provenance(self.track.in_force),
            fingerprint=self.fingerprint,
            inputs=dict(made_from),
            **content,
        )
        sealed.write(self.record, record, payload)
        artefacts.forget_training(self.record)


# ---- what records say


def labels(job: Job) -> Labels:
    """What a table says of a cell's method and model."""
    method, settings = job.track.method(job.cell.method), job.settings
    names = ("kind", "control", "reconstruction", "guessed", "title", "paper", "bibtex", "notes")
    return Labels(
        family=settings.family,
        recovered_by=job.track.recovered_by(job.cell),
        objective=settings.objective.name,
        **{name: getattr(method, name) for name in names},
        idea=method.idea,
    )


def shared_settings(job: Job) -> dict:
    """What of the track made every cell of a model."""
    common = ("dataset", "extractor", "budgets", "sampling", "latency", "evaluation")
    named = {kind: job.track.coder(name)[1] for kind, name in job.settings.coders.items()}
    coders = {kind: plain(coder) for kind, coder in named.items()}
    track = plain(job.track.settings)
    return {"model": plain(job.settings), **coders, **{name: track[name] for name in common}}
