"""Efficiency tracks: loading and checking their YAML, their rows, and where each record lies.

Free of torch, like `prunebench.tracks`, because the Snakefile imports it. A track offers what the
rules ask of a benchmark track; what it has none of (assets, an oracle, shards) is empty.
"""

import functools
import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench.errors import UserError
from prunebench.tracks import checks, stages
from prunebench.tracks.files import read
from prunebench.tracks.layout import RUNS, Layout
from prunebench.tracks.settings import nearest, parse
from prunebench.tracks.settings_efficiency import Claim, EfficiencySettings, Network, Plan

NOTHING = Plan.model_construct(kind="none")
DENSE = "dense"  # the plan that removes nothing, a row of every model
DIVISION = "costs"  # the one table of such a track
# What of the track a row depends on besides its model and plan; editing anything else leaves it.
DEPENDS = ("seed", "device", "precisions", "modes", "rounds", "warmup")


@dataclass(frozen=True)
class Track:
    """A validated efficiency track.

    Attributes:
        settings: what its file says, with published configurations and defaults filled in.
    """

    name: str
    settings: EfficiencySettings
    kind = "efficiency"
    divisions = (DIVISION,)
    default_division = DIVISION
    shards = 1
    dense_seeds = (0,)
    axes = types.MappingProxyType({"dense_seed": (0,)})  # it has no cells
    warnings = ()

    @functools.cached_property
    def in_force(self) -> dict:
        """The settings that are not their defaults, as plain values."""
        return self.settings.model_dump(mode="json", exclude_defaults=True)

    @property
    def wait(self) -> float:
        """Seconds that a measurement waits for the machine to become quiet."""
        return self.settings.wait

    def assets(self) -> list[str]:
        return []

    def oracle(self) -> list:
        return []

    def needs(self, stage: str) -> dict[str, int]:
        """What a job of a stage needs: mem_mb, runtime (minutes), gpu, cpus."""
        return stages.needs_of(self.in_force, stage)

    def model(self, name: str) -> Network:
        return _named("model", name, self.settings.models, f"track {self.name}")

    def plan(self, model: str, plan: str) -> Plan:
        """A plan of the track that is asked of a model."""
        known = {DENSE: NOTHING, **self.settings.plans}
        wanted = _named("plan", plan, known, f"track {self.name}")
        self.model(model)
        if (model, plan) not in self.rows():
            raise UserError(
                f"plan '{plan}' of track {self.name} is not for model '{model}' (its `plans`, or "
                "the plan's `models`)"
            )
        return wanted

    def rows(self) -> list[tuple[str, str]]:
        """(model, plan) of every row, dense first."""
        return [
            (model, plan)
            for model, network in self.settings.models.items()
            for plan in (DENSE, *self._plans(model, network))
        ]

    def _plans(self, name: str, network: Network) -> list[str]:
        """The plans that a model and the plan itself both allow."""
        plans = self.settings.plans
        return [
            plan
            for plan, entry in plans.items()
            if plan in (plans if network.plans is None else network.plans)
            and (entry.models is None or name in entry.models)
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
        asked = (self.model(model), self.plan(model, plan)) if model else ()
        parts = [part.model_dump(mode="json", exclude_defaults=True) for part in asked]
        parts += [self.in_force.get(key) for key in DEPENDS]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _named(what: str, name: str, known: Mapping, where: str) -> object:
    if name not in known:
        raise UserError(f"unknown {what} '{name}' in {where}{nearest(name, known)}")
    return known[name]


def load(name: str) -> Track:
    """Load and check `config/<name>.yaml`, or the YAML file `name`.

    Raises:
        UserError: it is no efficiency track, or a key, name or plan is unknown or wrong.
    """
    return checked(*read(name))


def checked(file: Path, content: object) -> Track:
    """The track that a file's content makes; errors as `load`."""
    settings = parse(EfficiencySettings, content, file)
    networks = {
        name: _filled_in(file, f"models.{name}", model) for name, model in settings.models.items()
    }
    settings = settings.model_copy(update={"models": networks})
    _check_names(file, settings)
    checks.check_needs(file, settings.needs)
    track = Track(file.stem, settings)
    for number, claim in enumerate(settings.published):
        _check_claim(f"{file}: published.{number}", claim, track)
    return track


def _filled_in(file: Path, place: str, model: Network) -> Network:
    """The network with the published configuration, and that one's title, in their places."""
    config, entry = checks.published_config(file, place, model.family, model.config)
    title = model.title or (entry and entry.title)
    if title is None:
        raise UserError(f"{file}: {place}: a configuration of your own needs a 'title'")
    takes = checks.takes(model.family, config)
    channels, *sides = model.x
    if channels != takes.channels:
        raise UserError(f"{file}: {place}.x: the network takes {takes.channels} channels")
    for side in sides:
        if side != (takes.side or side) or side % takes.multiple:
            raise UserError(f"{file}: {place}.x: {side} is not a side that the network takes")
    _check_text(f"{file}: {place}.y", model, takes.text)
    return model.model_copy(update={"config": config, "title": title})


def _check_text(where: str, model: Network, width: int | None) -> None:
    """`y` is there where the network reads text, and as wide."""
    if (model.y is None) != (width is None):
        said = "the network reads no text; leave it out"
        if width is not None:
            said = f"this key is missing: the network reads text, [tokens, {width}]"
        raise UserError(f"{where}: {said}")
    tokens = model.y.get("context", ()) if isinstance(model.y, Mapping) else model.y
    if width is not None and (len(tokens) != 2 or tokens[1] != width):
        raise UserError(f"{where}: the network reads text (context) of the shape [tokens, {width}]")
    others = model.y if isinstance(model.y, Mapping) else {}
    for name, shape in others.items():
        if name != "context" and len(shape) != 1:
            raise UserError(f"{where}.{name}: one vector for an image: [length]")


def _check_names(file: Path, settings: EfficiencySettings) -> None:
    """Plans and models that name each other are there."""
    for name, model in settings.models.items():
        for plan in model.plans or ():
            if plan not in settings.plans:
                known = nearest(plan, settings.plans)
                raise UserError(f"{file}: models.{name}.plans: unknown plan '{plan}'{known}")
    for name, plan in settings.plans.items():
        if name == DENSE:
            raise UserError(
                f"{file}: plans.{name}: the name is taken by the rows that remove nothing"
            )
        for model in plan.models or ():
            if model not in settings.models:
                known = nearest(model, settings.models)
                raise UserError(f"{file}: plans.{name}.models: unknown model '{model}'{known}")


def _check_claim(where: str, claim: Claim, track: Track) -> None:
    """A published speed-up stands beside a row and a condition of the track."""
    try:
        track.plan(claim.model, claim.plan)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    settings = track.settings
    for key, known in (
        ("precision", settings.precisions),
        ("mode", settings.modes),
        ("batch", settings.models[claim.model].batches),
    ):
        if (asked := getattr(claim.beside, key)) not in known:
            said = ", ".join(map(str, known))
            plural = f"{key}es" if key == "batch" else f"{key}s"
            raise UserError(f"{where}.beside.{key}: {asked} is none of the {plural}: {said}")
