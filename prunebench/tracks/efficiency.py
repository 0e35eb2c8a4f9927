"""Efficiency tracks: loading and checking their YAML, their rows, and where each record lies.

Free of torch, like `prunebench.tracks`, because the Snakefile imports it. A track offers what the
rules ask of a benchmark track; what it has none of (assets, an oracle, shards) is empty.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench import models
from prunebench.errors import UserError
from prunebench.tracks import checks, stages
from prunebench.tracks.files import read
from prunebench.tracks.layout import RUNS, Layout

SCHEMA = checks.SCHEMA.with_name("efficiency.schema.yaml")
DENSE = "dense"  # the plan that removes nothing, a row of every model
DIVISION = "costs"  # the one table of such a track
# What of the track a row depends on besides its model and plan; editing anything else leaves it.
DEPENDS = ("seed", "device", "precisions", "modes", "rounds", "warmup")


@dataclass(frozen=True)
class Track:
    """A validated efficiency track; `content` is the YAML, published configurations filled in."""

    name: str
    content: Mapping
    kind = "efficiency"
    divisions = (DIVISION,)
    default_division = DIVISION
    shards = 1
    dense_seeds = (0,)

    def assets(self) -> list[str]:
        return []

    def oracle(self) -> list:
        return []

    def needs(self, stage: str) -> dict[str, int]:
        """What a job of a stage needs: mem_mb, runtime (minutes), gpu, cpus."""
        return stages.needs_of(self.content, stage)

    def model(self, name: str) -> Mapping:
        return _named("model", name, self.content["models"], f"track {self.name}")

    def plan(self, model: str, plan: str) -> Mapping:
        """A plan of the track that is asked of a model."""
        known = {DENSE: {"kind": "none"}, **self.content["plans"]}
        wanted = _named("plan", plan, known, f"track {self.name}")
        self.model(model)
        if (model, plan) not in self.rows():
            raise UserError(f"plan '{plan}' of track {self.name} is not for model '{model}'")
        return wanted

    def rows(self) -> list[tuple[str, str]]:
        """(model, plan) of every row, dense first."""
        plans = self.content["plans"]
        return [
            (model, plan)
            for model, settings in self.content["models"].items()
            for plan in (DENSE, *plans)
            if plan == DENSE
            or (
                plan in settings.get("plans", plans) and model in plans[plan].get("models", [model])
            )
        ]

    def record(self, model: str, plan: str, runs: Path = RUNS) -> str:
        return Layout(self, runs).record("efficiency", model=model, plan=plan)

    def records(self, division: str = DIVISION, runs: Path = RUNS) -> list[str]:
        """What the table is made of."""
        if division != DIVISION:
            raise UserError(
                f"unknown division '{division}' in track {self.name}; known: {DIVISION}"
            )
        return [self.record(*row, runs) for row in self.rows()]

    def fingerprint(self, stage: str, model: str = "", plan: str = "") -> str:
        """Hash of the settings that a row depends on; a change of it recomputes the row."""
        parts = [self.model(model), self.plan(model, plan)] if model else []
        parts += [self.content[key] for key in DEPENDS]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _named(what: str, name: str, known: Mapping, where: str) -> Mapping:
    if name not in known:
        raise UserError(f"unknown {what} '{name}' in {where}; known: {', '.join(known)}")
    return known[name]


def load(name: str) -> Track:
    """Load and check `config/<name>.yaml`, or the YAML file `name`.

    Raises:
        UserError: it is no efficiency track, or a key, name or plan is unknown or wrong.
    """
    return checked(*read(name))


def checked(file: Path, content: object) -> Track:
    """The track that a file's content makes; errors as `load`."""
    checks.check_schema(file, content, SCHEMA)
    for key, model in content["models"].items():
        _fill_in(f"{file}: models.{key}", model)
        for plan in model.get("plans", ()):
            _named("plan", plan, content["plans"], f"{file}: models.{key}.plans")
    for key, plan in content["plans"].items():
        _check_plan(f"{file}: plans.{key}", key, plan, content["models"])
    checks.check_needs(file, content.get("needs", {}))
    track = Track(file.stem, content)
    for number, claim in enumerate(content.get("published", ())):
        _check_claim(f"{file}: published.{number}", claim, track)
    return track


def _fill_in(where: str, model: dict) -> None:
    """Put the published configuration, its title and a batch of one in their places."""
    named = model["config"] if isinstance(model["config"], str) else None
    checks.take_published(where, model)
    if named:
        model.setdefault("title", models.published(model["family"])[named].title)
    if "title" not in model:
        raise UserError(f"{where}: a configuration of your own needs a 'title'")
    if model["batches"][0] != 1:
        raise UserError(f"{where}.batches: begins with 1, the batch that latency is read at")


def _check_plan(where: str, name: str, plan: Mapping, known: Mapping) -> None:
    if name == DENSE:
        raise UserError(f"{where}: the name is taken by the rows that remove nothing")
    for model in plan.get("models", ()):
        if model not in known:
            raise UserError(f"{where}.models: unknown model '{model}'; known: {', '.join(known)}")


def _check_claim(where: str, claim: Mapping, track: Track) -> None:
    """A published speed-up stands beside a row and a condition of the track."""
    try:
        track.plan(claim["model"], claim["plan"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    beside = claim["beside"]
    for key, known in (
        ("precision", track.content["precisions"]),
        ("mode", track.content["modes"]),
        ("batch", track.model(claim["model"])["batches"]),
    ):
        if beside[key] not in known:
            raise UserError(f"{where}.beside.{key}: {beside[key]} is not measured; known: {known}")
