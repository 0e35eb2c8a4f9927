"""A benchmark track: the cells it asks for."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench import recovery as recoveries
from prunebench.errors import UserError
from prunebench.tracks import methods, phases
from prunebench.tracks.cells import DEFAULT, RECIPE, UNPRUNED, Cell
from prunebench.tracks.checks import asset_names, check_recovery
from prunebench.tracks.layout import RUNS, Paths
from prunebench.tracks.settings import LEAST_SPARSITY, MOST_SPARSITY, nearest
from prunebench.tracks.settings_benchmark import (
    Autoencoder,
    BenchmarkSettings,
    Division,
    Model,
    Phase,
    TextEncoder,
)
from prunebench.tracks.stages import STAGES, needs_of

ROW = ("model", "method", "sparsity", "recovery")
Row = tuple[str, str, float, str]


def _recipe_sparsities(method: methods.Method) -> tuple[float, ...]:
    """The sparsities of a method's own recipe, () without a recipe."""
    if method.recipe is None:
        return ()
    return method.sparsities or tuple(method.recipe.get("sparsities", ()))


@dataclass(frozen=True)
class Track:
    """A validated track.

    Attributes:
        settings: what its file says, with published configurations and defaults filled in.
        methods: the methods it runs.
        warnings: what was left out of its folders of methods, a line each.
    """

    name: str
    settings: BenchmarkSettings
    methods: Mapping[str, methods.Method]
    warnings: tuple[str, ...] = ()
    kind = "benchmark"

    @functools.cached_property
    def in_force(self) -> dict:
        """The settings that are not their defaults, as plain values."""
        return self.settings.model_dump(mode="json", exclude_defaults=True)

    def _named(self, what: str, entries: Mapping, name: str) -> object:
        if name not in entries:
            raise UserError(f"unknown {what} '{name}' in track {self.name}{nearest(name, entries)}")
        return entries[name]

    def model(self, name: str) -> Model:
        return self._named("model", self.settings.models, name)

    @property
    def dense_seeds(self) -> tuple[int, ...]:
        """Seeds of the dense models' trainings; every cell is run on each."""
        return self.settings.dense_seeds

    @functools.cached_property
    def axes(self) -> dict[str, tuple]:
        """Values of the axes that have a folder only where there are several; the first is base."""
        named = (name for model in self.settings.models.values() for name in model.samplings)
        return {
            "dense_seed": self.dense_seeds,
            "precision": self.settings.precisions,
            "sampling": tuple(dict.fromkeys((DEFAULT, *named))),
        }

    @functools.cached_property
    def undisturbed(self) -> dict:
        """Of the cell that a model's others are compared with: what is not theirs too."""
        base = {axis: self.axes[axis][0] for axis in ("precision", "sampling")}
        return {"method": "dense", "sparsity": 0.0, "recovery": "none", **base}

    def dense_seed(self, given: int | None) -> int:
        """Check a dense seed that was given by hand; None stands for the only one."""
        known = ", ".join(map(str, self.dense_seeds))
        if given is None and len(self.dense_seeds) > 1:
            raise UserError(f"--dense-seed: track {self.name} has several; give one of {known}")
        if given not in (None, *self.dense_seeds):
            raise UserError(
                f"--dense-seed {given}: not a dense seed of {self.name}; known: {known}"
            )
        return self.dense_seeds[0] if given is None else given

    def coder(self, name: str) -> tuple[str, Autoencoder | TextEncoder]:
        """The kind, "autoencoder" or "text_encoder", and the settings of what encodes data."""
        for kind in ("autoencoder", "text_encoder"):
            if name in (entries := getattr(self.settings, f"{kind}s")):
                return kind, entries[name]
        entries = {**self.settings.autoencoders, **self.settings.text_encoders}
        return self._named("coder", entries, name)

    def method(self, name: str) -> methods.Method:
        return self._named("method", self.methods, name)

    def parameters(self, cell: Cell) -> dict:
        """What `select` is called with: a variant's values, the track's, then the recipe's."""
        method = self.method(cell.method)
        recipe = method.recipe if cell.by_recipe else None
        given = self.settings.methods.parameters.get(cell.method, {})
        return {**method.given, **given, **(recipe or {}).get("parameters", {})}

    def recovered_by(self, cell: Cell) -> str:
        """The module, or the track's own recovery, that a cell recovers with, or "none"."""
        return self._recovered_by(cell.method, cell.recovery)

    def _recovered_by(self, method: str, recovery: str) -> str:
        name, _, _ = recovery.rpartition("-")
        if name == RECIPE:
            return (self.method(method).recipe or {}).get("recovery", "finetune")
        return name or recovery

    def phases_of(self, method: str, recovery: str) -> tuple[Phase, ...]:
        """The trainings of a recovery, one after the other, with all parameters; () of "none".

        Args:
            method: whose recipe counts where `recovery` is one.
            recovery: with its budget.
        """
        return phases.phases_of(self.settings, self._recovered_by(method, recovery))

    def fold(self, method: str, recovery: str) -> int:
        """How many of the sampler's steps are one of the student's after a recovery; 1: as many."""
        return self._folds.get(self._recovered_by(method, recovery), 1)

    @functools.cached_property
    def _folds(self) -> dict[str, int]:
        """What `fold` is of every recovery by name; the layout asks for it many thousand times."""
        names = (*recoveries.recovery_names(), *self.settings.recoveries)
        return {name: phases.fold_of(phases.phases_of(self.settings, name)) for name in names}

    def cell(
        self,
        model: str,
        method: str,
        sparsity: float,
        recovery: str,
        seed: int,
        dense_seed: int | None = None,
        precision: str | None = None,
        sampling: str | None = None,
    ) -> Cell:
        """A cell given by hand, which need not be one of the track's own.

        Args:
            precision, sampling: None stands for the track's first.

        Raises:
            UserError: one of the names is unknown to the track, or the sparsity impossible.
        """
        samplings = (DEFAULT, *self.model(model).samplings)
        kind = self.method(method).kind
        inside = LEAST_SPARSITY <= sparsity <= MOST_SPARSITY
        if not inside and not (kind == "none" and sparsity == 0):
            raise UserError(f"sparsity {sparsity} is impossible for {method}: it must be in (0, 1)")
        check_recovery("--recovery", recovery, self.settings)
        given = {"precision": precision, "sampling": sampling}
        for axis, known in (("precision", self.settings.precisions), ("sampling", samplings)):
            if given[axis] not in (None, *known):
                said = f"--{axis} {given[axis]}: not a {axis} of {model} in track {self.name}"
                raise UserError(f"{said}{nearest(given[axis], known)}")
        return Cell(
            track=self.name,
            model=model,
            dense_seed=self.dense_seed(dense_seed),
            method=method,
            sparsity=sparsity,
            recovery=recovery,
            precision=precision or self.settings.precisions[0],
            sampling=sampling or DEFAULT,
            seed=seed,
        )

    @property
    def divisions(self) -> Mapping[str, Division]:
        """The leaderboards of the track by name; the first is what `snakemake` makes."""
        return self.settings.divisions

    @property
    def default_division(self) -> str:
        return next(iter(self.divisions))

    def cells(self, division: str | None = None) -> list[Cell]:
        """Every cell of a division (None: of the default one), in the order of its tables."""
        division = division or self.default_division
        asked = self._named("division", self.settings.divisions, division)
        rows = dict.fromkeys(self._rows(asked))
        return [
            Cell(
                track=self.name,
                **dict(zip(ROW, row, strict=True)),
                dense_seed=dense,
                precision=precision,
                sampling=sampling,
                seed=seed,
            )
            for row in rows
            for precision, sampling in self._combinations(asked, row)
            for dense in self.dense_seeds
            for seed in self.settings.seeds
        ]

    def records(self, division: str, runs: Path = RUNS) -> list[str]:
        """What the table of a division is made of."""
        return [Paths(self, cell, runs).score for cell in self.cells(division)]

    def _combinations(self, division: Division, row: Row) -> list[tuple[str, str]]:
        """The precisions and samplings that a division runs a row in; the first of both first."""
        model, method, _, recovery = row
        precisions, samplings = self.settings.precisions, (DEFAULT, *self.model(model).samplings)
        # "Dense, fewer steps" is a row to compare with, and another number of steps by itself.
        if division.compares != "combinations" or self.method(method).kind == "steps":
            return [(precisions[0], DEFAULT)]
        wanted = division.samplings or samplings
        samplings = [name for name in samplings if name in wanted]
        if self.fold(method, recovery) > 1:  # taught to follow this one
            samplings = [DEFAULT]
        return list(itertools.product(division.precisions or precisions, samplings))

    def _rows(self, division: Division) -> Iterator[Row]:
        for model, settings in self.settings.models.items():
            for method in self._participants(division):
                if not _prunes(method, settings):
                    continue
                for recovery in self._recoveries(method, division):
                    own = recovery.startswith(f"{RECIPE}-")
                    plain = recovery.replace(RECIPE, "finetune", 1)
                    named = recovery if method.recipe or not own else plain
                    if own and self._unrecoverable(method, recovery, settings):
                        continue
                    for sparsity in self.sparsities(method, own):
                        yield model, method.name, sparsity, named

    def _unrecoverable(self, method: methods.Method, recovery: str, model: Model) -> bool:
        """Whether a model can't be recovered as a method's recipe wants it."""
        name = self._recovered_by(method.name, recovery)
        return phases.refusal(name, model, self.settings) is not None

    def _participants(self, division: Division) -> list[methods.Method]:
        """The division's methods, the dense model and, where selections compete, the controls."""
        named = self.methods if division.methods is None else division.methods
        always = [name for name, m in self.methods.items() if m.kind in UNPRUNED]
        if division.compares in ("selections", "methods"):
            always += [name for name, m in self.methods.items() if m.control]
        return [m for name, m in self.methods.items() if name in named or name in always]

    def sparsities(self, method: methods.Method, by_recipe: bool = False) -> tuple[float, ...]:
        """The sparsities a method runs at; for steps, the fractions of the steps to leave out.

        In the as-published division a method runs at its paper's; one without a recipe is there to
        be compared with and runs at those of all recipes that remove the same kind of unit.
        """
        if method.kind == "none":
            return (0.0,)
        if method.kind == "steps":
            return self.settings.fewer_steps
        if by_recipe and not method.sparsities:
            own = _recipe_sparsities(method) or sorted(
                {s for m in self.methods.values() if m.kind == method.kind
                 for s in _recipe_sparsities(m)}
            )  # fmt: skip
            return tuple(own or self.settings.sparsities)
        return method.sparsities or self.settings.sparsities

    def _recoveries(self, method: methods.Method, division: Division) -> list[str]:
        if method.kind == "none":  # of the dense model only the steps can be made fewer
            fewer = [name for name in division.recoveries if self.fold(method.name, name) > 1]
            return ["none", *fewer]
        if method.recovery == "never":
            return ["none"]
        skipped = {"none"} if method.recovery == "required" else set()
        return [name for name in division.recoveries if name not in skipped]

    def mask(self, model: str, recovery: str, index: int) -> None:
        """Check the place of one mask of the oracle, given by hand."""
        if self.settings.oracle is None:
            raise UserError(f"track {self.name} has no entry 'oracle'")
        self.model(model)
        check_recovery("--recovery", recovery, self.settings)
        if index < 0:
            raise UserError(f"--mask {index}: masks are counted from 0")

    @property
    def wait(self) -> float:
        """Seconds that a measurement waits for the machine to become quiet."""
        return self.settings.latency.wait

    @property
    def shards(self) -> int:
        """How many jobs draw a cell's images between them; the images do not depend on it."""
        return self.settings.sampling.shards

    def shard(self, index: int) -> None:
        """Check the number of a shard given by hand."""
        if not 0 <= index < self.shards > 1:
            split = f"{self.shards} shards, counted from 0" if self.shards > 1 else "one piece"
            raise UserError(
                f"--shard {index}: track {self.name} draws a cell in {split} (sampling.shards)"
            )

    def oracle(self) -> list[dict]:
        """What every job of the oracle is called with: model, dense_seed, recovery, seed, mask."""
        oracle = self.settings.oracle
        if oracle is None:
            return []
        axes = {
            "model": oracle.models,
            "dense_seed": oracle.dense_seeds or self.dense_seeds[:1],
            "recovery": oracle.recoveries,
            "seed": oracle.seeds,
            "mask": range(oracle.masks),
        }
        return [dict(zip(axes, place, strict=True)) for place in itertools.product(*axes.values())]

    def decoders(self) -> list[dict]:
        """What every job of `decoder` is called with: model and dense_seed."""
        models = [name for name, model in self.settings.models.items() if model.decoder]
        return [{"model": name, "dense_seed": s} for name in models for s in self.dense_seeds]

    def assets(self) -> list[str]:
        """Names of everything from outside that the track's stages read."""
        return list(dict.fromkeys(name for _, name, _ in asset_names(self.settings)))

    def budget(self, cell: Cell) -> int:
        """Images the student may train on, in selection and recovery together."""
        return 0 if cell.recovery == "none" else self.settings.budgets[cell.budget]

    def needs(self, stage: str) -> dict[str, int]:
        """What a job of a stage needs: mem_mb, runtime (minutes), gpu, cpus."""
        return needs_of(self.in_force, stage)

    def fingerprint(self, stage: str, **names: object) -> str:
        """Hash of the settings a stage depends on; a change of it recomputes the stage.

        It is of the settings in force, without those that have their default value: a default that
        is written down, and a key that is added to the suite later, change no fingerprint.

        Args:
            names: what the stage is called with; model, dense_seed, method, recovery, coder and
                sampling count.
        """
        model, method = names.get("model", ""), names.get("method", "")
        latents = self.in_force["models"].get(model, {}).get("autoencoder", "")
        coder = names.get("coder", "")
        stars = {"models": model, "methods": method}
        stars |= {"autoencoders": coder or latents, "text_encoders": coder}
        recovery = str(names.get("recovery", "none"))
        stars |= {"recoveries": self._recovered_by(method, recovery)}
        trains = stage == "select" and method in self.methods and self.methods[method].trains
        parts: list[object] = [int(names["dense_seed"])] if stage == "dense" else []
        own = [*STAGES[stage].depends_on(names.get("sampling", DEFAULT))]
        if stage == "recover" and self.fold(method, recovery) > 1:
            own.append("models.*.sampling")  # whose steps are folded
        for dotted in (*own, *(STAGES["recover"].depends if trains else ())):
            entry: object = self.in_force
            keys = dotted.split(".")
            for key in keys:
                entry = entry.get(stars[keys[0]] if key == "*" else key, {}) if entry else {}
            parts.append(entry)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _prunes(method: methods.Method, model: Model) -> bool:
    """Whether a method says that it can prune a model of these settings."""
    claimed = not method.families or model.family in method.families
    return claimed and not (method.needs_classes and model.text_encoder is not None)
