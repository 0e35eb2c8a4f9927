"""A benchmark track: the cells it asks for."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench.errors import UserError
from prunebench.tracks import methods
from prunebench.tracks.cells import PUBLISHED, REFERENCES, Cell
from prunebench.tracks.checks import check_recovery
from prunebench.tracks.layout import RUNS, Paths
from prunebench.tracks.stages import STAGES, needs_of

ROW = ("model", "method", "sparsity", "recovery")


def _published_sparsities(method: methods.Method) -> tuple[float, ...]:
    """The sparsities of a method's own recipe, () without a recipe."""
    if method.published is None:
        return ()
    return method.sparsities or tuple(method.published.get("sparsities", ()))


@dataclass(frozen=True)
class Track:
    """A validated track. `content` is the YAML, `methods` the methods it runs."""

    name: str
    content: Mapping
    methods: Mapping[str, methods.Method]
    kind = "benchmark"

    def model(self, name: str) -> Mapping:
        if name not in self.content["models"]:
            known = ", ".join(self.content["models"])
            raise UserError(f"unknown model '{name}' in track {self.name}; known: {known}")
        return self.content["models"][name]

    @property
    def dense_seeds(self) -> tuple[int, ...]:
        """Seeds of the dense models' trainings; every cell is run on each."""
        return tuple(self.content.get("dense_seeds", (0,)))

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

    def coder(self, name: str) -> tuple[str, Mapping]:
        """The kind, "autoencoder" or "text_encoder", and the settings of what encodes data."""
        for kind in ("autoencoder", "text_encoder"):
            if name in self.content.get(f"{kind}s", {}):
                return kind, self.content[f"{kind}s"][name]
        entries = (*self.content.get("autoencoders", ()), *self.content.get("text_encoders", ()))
        known = ", ".join(entries) or "none"
        raise UserError(f"unknown coder '{name}' in track {self.name}; known: {known}")

    def method(self, name: str) -> methods.Method:
        if name not in self.methods:
            known = ", ".join(self.methods)
            raise UserError(f"unknown method '{name}' in track {self.name}; known: {known}")
        return self.methods[name]

    def parameters(self, cell: Cell) -> dict:
        """What `select` is called with: the track's values, then the published recipe's."""
        recipe = self.method(cell.method).published if cell.published else None
        given = self.content["methods"].get("parameters", {}).get(cell.method, {})
        return {**given, **(recipe or {}).get("parameters", {})}

    def healing(self, cell: Cell) -> str:
        """The recovery module that heals a cell, or "none"."""
        if cell.published:
            return (self.method(cell.method).published or {}).get("recovery", "finetune")
        return cell.recovery.rpartition("-")[0] or cell.recovery

    def cell(
        self,
        model: str,
        method: str,
        sparsity: float,
        recovery: str,
        seed: int,
        dense_seed: int | None = None,
    ) -> Cell:
        """A cell given by hand, which need not be one of the track's own.

        Raises:
            UserError: one of the names is unknown to the track, or the sparsity impossible.
        """
        self.model(model)
        kind = self.method(method).kind
        if not (0 < sparsity < 1 or (kind == "none" and sparsity == 0)):
            raise UserError(f"sparsity {sparsity} is impossible for {method}: it must be in (0, 1)")
        check_recovery("--recovery", recovery, self.content["budgets"])
        return Cell(
            track=self.name,
            model=model,
            dense_seed=self.dense_seed(dense_seed),
            method=method,
            sparsity=sparsity,
            recovery=recovery,
            seed=seed,
        )

    @property
    def divisions(self) -> Mapping[str, Mapping]:
        """The leaderboards of the track by name; the first is what `snakemake` makes."""
        return self.content["divisions"]

    @property
    def default_division(self) -> str:
        return next(iter(self.divisions))

    def cells(self, division: str | None = None) -> list[Cell]:
        """Every cell of a division (None: of the default one), in the order of its tables."""
        division = division or self.default_division
        if division not in self.divisions:
            known = ", ".join(self.divisions)
            raise UserError(f"unknown division '{division}' in track {self.name}; known: {known}")
        rows = dict.fromkeys(self._rows(self.divisions[division]))
        return [
            Cell(track=self.name, **dict(zip(ROW, row, strict=True)), dense_seed=dense, seed=seed)
            for row in rows
            for dense in self.dense_seeds
            for seed in self.content["seeds"]
        ]

    def records(self, division: str, runs: Path = RUNS) -> list[str]:
        """What the table of a division is made of."""
        return [Paths(self, cell, runs).score for cell in self.cells(division)]

    def _rows(self, division: Mapping) -> Iterator[tuple[str, str, float, str]]:
        for model, settings in self.content["models"].items():
            for method in self._participants(division):
                if method.families and settings["family"] not in method.families:
                    continue
                for recovery in self._recoveries(method, division):
                    own = recovery.startswith(f"{PUBLISHED}-")
                    named = recovery if not own or method.published else f"finetune-{recovery[10:]}"
                    for sparsity in self.sparsities(method, own):
                        yield model, method.name, sparsity, named

    def _participants(self, division: Mapping) -> list[methods.Method]:
        """The division's methods and the controls; only to compare recoveries, fewer will do."""
        named = division.get("methods", self.methods)
        always = [name for name, m in self.methods.items() if m.kind in REFERENCES]
        if division["compares"] != "recoveries":
            always += [name for name, m in self.methods.items() if m.control]
        return [m for name, m in self.methods.items() if name in named or name in always]

    def sparsities(self, method: methods.Method, published: bool = False) -> tuple[float, ...]:
        """The sparsities a method runs at; for steps, the fractions of the steps to leave out.

        In the as-published division a method runs at its paper's; one without a recipe is there to
        be compared with and runs at those of all recipes that remove the same kind of unit.
        """
        if method.kind == "none":
            return (0.0,)
        if method.kind == "steps":
            return tuple(self.content["fewer_steps"])
        if published and not method.sparsities:
            own = _published_sparsities(method) or sorted(
                {s for m in self.methods.values() if m.kind == method.kind
                 for s in _published_sparsities(m)}
            )  # fmt: skip
            return tuple(own or self.content["sparsities"])
        return method.sparsities or tuple(self.content["sparsities"])

    def _recoveries(self, method: methods.Method, division: Mapping) -> list[str]:
        if method.recovery == "never":
            return ["none"]
        skipped = {"none"} if method.recovery == "required" else set()
        return [name for name in division["recoveries"] if name not in skipped]

    def mask(self, model: str, recovery: str, index: int) -> None:
        """Check the place of one mask of the oracle, given by hand."""
        if "oracle" not in self.content:
            raise UserError(f"track {self.name} has no entry 'oracle'")
        self.model(model)
        check_recovery("--recovery", recovery, self.content["budgets"])
        if index < 0:
            raise UserError(f"--mask {index}: masks are counted from 0")

    @property
    def shards(self) -> int:
        """How many jobs draw a cell's images between them; the images do not depend on it."""
        return self.content["sampling"].get("shards", 1)

    def shard(self, index: int) -> None:
        """Check the number of a shard given by hand."""
        if not 0 <= index < self.shards > 1:
            split = f"{self.shards} shards, counted from 0" if self.shards > 1 else "one piece"
            raise UserError(
                f"--shard {index}: track {self.name} draws a cell in {split} (sampling.shards)"
            )

    def oracle(self) -> list[dict]:
        """What every job of the oracle is called with: model, dense_seed, recovery, seed, mask."""
        settings = self.content.get("oracle")
        if not settings:
            return []
        axes = {
            "model": settings["models"],
            "dense_seed": settings.get("dense_seeds", self.dense_seeds[:1]),
            "recovery": settings["recoveries"],
            "seed": settings["seeds"],
            "mask": range(settings["masks"]),
        }
        return [dict(zip(axes, place, strict=True)) for place in itertools.product(*axes.values())]

    def assets(self) -> list[str]:
        """Names of everything from outside that the track's stages read."""
        lpips = self.content["evaluation"]["lpips"]
        reference = self.content["dataset"].get("reference", "held_out")
        names = [
            self.content["dataset"]["name"],
            reference if reference not in ("held_out", "train") else None,
            self.content["extractor"].get("asset"),
            f"lpips-{lpips}" if lpips in ("alex", "vgg") else None,
            self.content["evaluation"].get("clip"),
            *(model.get("weights", {}).get("asset") for model in self.content["models"].values()),
            *(entry.get("asset") for entry in self.content.get("autoencoders", {}).values()),
            *(entry.get("asset") for entry in self.content.get("text_encoders", {}).values()),
        ]
        return [name for name in dict.fromkeys(names) if name]

    def budget(self, cell: Cell) -> int:
        """Images the student may train on, in selection and recovery together."""
        return 0 if cell.recovery == "none" else self.content["budgets"][cell.budget]

    def needs(self, stage: str) -> dict[str, int]:
        """What a job of a stage needs: mem_mb, runtime (minutes), gpu, cpus."""
        return needs_of(self.content, stage)

    def fingerprint(self, stage: str, **names: object) -> str:
        """Hash of the settings a stage depends on; a change of it recomputes the stage.

        Args:
            names: what the stage is called with; only model, dense_seed, method and coder count.
        """
        model, method = names.get("model", ""), names.get("method", "")
        own = self.content["models"].get(model, {}).get("autoencoder", "")
        coder = names.get("coder", "")
        stars = {"models": model, "methods": method}
        stars |= {"autoencoders": coder or own, "text_encoders": coder}
        trains = stage == "select" and method in self.methods and self.methods[method].trains
        parts: list[object] = [int(names["dense_seed"])] if stage == "dense" else []
        for dotted in (*STAGES[stage].depends, *(STAGES["recover"].depends if trains else ())):
            entry: object = self.content
            keys = dotted.split(".")
            for key in keys:
                entry = entry.get(stars[keys[0]] if key == "*" else key, {}) if entry else {}
            parts.append(entry)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
