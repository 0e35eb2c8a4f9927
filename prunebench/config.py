"""Tracks: loading and checking their YAML, the cells they ask for, and where each artefact lies.

Free of torch, because the Snakefile imports it every time it is parsed.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jsonschema
import yaml

from prunebench import methods, models
from prunebench import recovery as recoveries
from prunebench.errors import UserError

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "workflow" / "schemas" / "track.schema.yaml"
RUNS = Path("runs")
FLOW_SAMPLERS = ("euler", "heun")

# What of a track each stage depends on, besides its input files: editing one of these entries
# recomputes the stage, editing anything else does not. "*" stands for the cell's model or method.
DEPENDS = {
    "extractor": ("dataset", "extractor"),
    "dense": (
        "dataset",
        "models.*.family",
        "models.*.config",
        "models.*.objective",
        "models.*.training",
    ),
    "select": ("models.*.sampling", "methods.parameters.*"),
    "recover": ("budgets", "models.*.recovery"),
    "sample": ("models.*.sampling", "sampling.count", "sampling.lanes"),
    "cost": ("models.*.sampling", "latency"),
    "score": ("evaluation",),
}


@dataclass(frozen=True)
class Cell:
    """One measurement: a row of the leaderboard and a seed."""

    track: str
    model: str
    method: str
    sparsity: float
    recovery: str
    seed: int

    @property
    def budget(self) -> str:
        return self.recovery.rpartition("-")[2]


@dataclass(frozen=True)
class Track:
    """A validated track. `content` is the YAML, `methods` the methods it runs."""

    name: str
    content: Mapping
    methods: Mapping[str, methods.Method]

    def model(self, name: str) -> Mapping:
        if name not in self.content["models"]:
            known = ", ".join(self.content["models"])
            raise UserError(f"unknown model '{name}' in track {self.name}; known: {known}")
        return self.content["models"][name]

    def method(self, name: str) -> methods.Method:
        if name not in self.methods:
            known = ", ".join(self.methods)
            raise UserError(f"unknown method '{name}' in track {self.name}; known: {known}")
        return self.methods[name]

    def parameters(self, method: str) -> dict:
        return dict(self.content["methods"].get("parameters", {}).get(method, {}))

    def cell(self, model: str, method: str, sparsity: float, recovery: str, seed: int) -> Cell:
        """A cell given by hand, which need not be one of the track's own.

        Raises:
            UserError: one of the names is unknown to the track, or the sparsity impossible.
        """
        self.model(model)
        kind = self.method(method).kind
        if not (0 < sparsity < 1 or (kind == "none" and sparsity == 0)):
            raise UserError(f"sparsity {sparsity} is impossible for {method}: it must be in (0, 1)")
        _check_recovery("--recovery", recovery, self.content["budgets"])
        return Cell(self.name, model, method, sparsity, recovery, seed)

    def cells(self) -> list[Cell]:
        """Every cell of the track, in the order of its tables."""
        return [
            Cell(self.name, model, method, sparsity, recovery, seed)
            for model, method, sparsity, recovery in self._rows()
            for seed in self.content["seeds"]
        ]

    def _rows(self) -> Iterator[tuple[str, str, float, str]]:
        for model, settings in self.content["models"].items():
            for method in self.methods.values():
                if method.families and settings["family"] not in method.families:
                    continue
                for sparsity in self.sparsities(method):
                    for recovery in self._recoveries(method):
                        yield model, method.name, sparsity, recovery

    def sparsities(self, method: methods.Method) -> tuple[float, ...]:
        """The sparsities a method runs at; for steps, the fractions of the steps to leave out."""
        if method.kind == "none":
            return (0.0,)
        if method.kind == "steps":
            return tuple(self.content["fewer_steps"])
        return method.sparsities or tuple(self.content["sparsities"])

    def _recoveries(self, method: methods.Method) -> list[str]:
        if method.recovery == "never":
            return ["none"]
        skipped = {"none"} if method.recovery == "required" else set()
        return [name for name in self.content["recoveries"] if name not in skipped]

    def budget(self, cell: Cell) -> int:
        """Images the student may train on, in selection and recovery together."""
        return 0 if cell.recovery == "none" else self.content["budgets"][cell.budget]

    def fingerprint(self, stage: str, model: str = "", method: str = "") -> str:
        """Hash of the settings a stage depends on; a change of it recomputes the stage."""
        names = {"models": model, "methods": method}
        trains = stage == "select" and method in self.methods and self.methods[method].trains
        parts = []
        for dotted in (*DEPENDS[stage], *(DEPENDS["recover"] if trains else ())):
            entry: object = self.content
            keys = dotted.split(".")
            for key in keys:
                entry = entry.get(names[keys[0]] if key == "*" else key, {}) if entry else {}
            parts.append(entry)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Layout:
    """Where artefacts lie, as strings. Fields may be Snakemake wildcards such as "{model}"."""

    def __init__(self, track: str, runs: Path = RUNS):
        self.root = f"{runs}/{track}"
        self.extractor = f"{self.root}/extractor/extractor.json"

    def trained(self, model: str) -> str:
        return f"{self.root}/{model}/trained/dense.json"

    def selection(
        self, stage: str, model: str, method: str, sparsity: object, seed: object, kind: str
    ) -> str:
        """Record of "select" or "cost"; `kind` is "selection", or names its training budget."""
        return f"{self.root}/{model}/{method}/{sparsity}/{kind}/seed{seed}/{stage}.json"

    def cell(
        self, stage: str, model: str, method: str, sparsity: object, recovery: str, seed: object
    ) -> str:
        """Record of "recover", "sample" or "metrics"."""
        return f"{self.root}/{model}/{method}/{sparsity}/{recovery}/seed{seed}/{stage}.json"

    def log(self, stage: str, *fields: object) -> str:
        return "/".join(map(str, (self.root, "logs", stage, *fields))) + ".log"


class Paths:
    """The artefacts of one cell."""

    def __init__(self, track: Track, cell: Cell, runs: Path = RUNS):
        layout = Layout(track.name, runs)
        trains = track.method(cell.method).trains
        kind = f"selection-{cell.recovery}" if trains else "selection"
        shared = (cell.model, cell.method, cell.sparsity)
        self.extractor, self.trained = layout.extractor, layout.trained(cell.model)
        self.select = layout.selection("select", *shared, cell.seed, kind)
        self.cost = layout.selection("cost", *shared, cell.seed, kind)
        self.recover = layout.cell("recover", *shared, cell.recovery, cell.seed)
        self.sample = layout.cell("sample", *shared, cell.recovery, cell.seed)
        self.metrics = layout.cell("metrics", *shared, cell.recovery, cell.seed)
        self.checkpoint = self.select if cell.recovery == "none" else self.recover
        self.dense_sample = layout.cell("sample", cell.model, "dense", 0.0, "none", cell.seed)


def load(name: str) -> Track:
    """Load `config/<name>.yaml`, or the YAML file `name`, and check everything that can be checked.

    Raises:
        UserError: the track is unknown, a key is unknown or wrong, or a method breaks its contract.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else Path("config") / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in Path("config").glob("*.yaml")))
        raise UserError(f"unknown track '{name}': {file} does not exist; known tracks: {known}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", file.stem, re.ASCII):
        raise UserError(f"{file}: a track's file name is its folder; use letters, digits, _ . -")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None
    _validate(file, content)
    return Track(file.stem, content, _methods(file, content))


def _check_model(file: Path, name: str, model: Mapping, content: Mapping) -> None:
    """What of a model's settings must fit together, which a schema cannot say."""
    where, sampling = f"{file}: models.{name}", model["sampling"]
    flow = model["objective"]["name"] == "flow"
    if (sampling["sampler"] in FLOW_SAMPLERS) != flow:
        raise UserError(
            f"{where}.sampling.sampler: '{sampling['sampler']}' does not sample objective "
            f"'{model['objective']['name']}'; {' and '.join(FLOW_SAMPLERS)} are for flow"
        )
    for fraction in content["fewer_steps"]:
        left = round(sampling["steps"] * (1 - fraction))
        if not 0 < left < sampling["steps"]:
            raise UserError(
                f"{where}.sampling.steps: {fraction} fewer of {sampling['steps']} steps is {left}; "
                "change steps or fewer_steps"
            )
    if "images" in model["recovery"]:
        raise UserError(f"{where}.recovery.images: budgets say how long recovery trains")
    for budget, images in content["budgets"].items():
        if images < model["recovery"]["batch"]:
            raise UserError(f"{file}: budgets.{budget}: less than one batch of model '{name}'")
    if model["training"]["images"] < model["training"]["batch"]:
        raise UserError(f"{where}.training.images: less than one batch")


@functools.cache
def _schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(yaml.safe_load(SCHEMA.read_text()))


def _validate(file: Path, content: object) -> None:
    errors = sorted(_schema().iter_errors(content), key=lambda error: list(map(str, error.path)))
    if errors:
        key = ".".join(map(str, errors[0].absolute_path)) or "the file"
        raise UserError(f"{file}: {key}: {errors[0].message}")
    for name, model in content["models"].items():
        if model["family"] not in models.family_names():
            known = ", ".join(models.family_names())
            raise UserError(
                f"{file}: models.{name}.family: unknown family '{model['family']}'; known: {known}"
            )
        _check_model(file, name, model, content)
    extractor, lpips = content["extractor"], content["evaluation"]["lpips"]
    needed = "training" if extractor["name"] == "domain" else "asset"
    if needed not in extractor:
        raise UserError(f"{file}: extractor: '{extractor['name']}' needs the key '{needed}'")
    if lpips == "domain" != extractor["name"]:
        raise UserError(
            f"{file}: evaluation.lpips: 'domain' compares maps of the domain classifier and needs "
            f"extractor.name 'domain', not '{extractor['name']}'; or use none, alex or vgg"
        )
    for name in content["recoveries"]:
        _check_recovery(f"{file}: recoveries", name, content["budgets"])


def _check_recovery(where: str, name: str, budgets: Mapping) -> None:
    module, _, budget = name.rpartition("-")
    if name == "none":
        return
    if module not in recoveries.recovery_names():
        known = ", ".join(recoveries.recovery_names())
        raise UserError(f"{where}: unknown recovery '{module}' in '{name}'; known: {known}")
    if budget not in budgets:
        raise UserError(f"{where}: '{name}' needs a budget of: {', '.join(budgets)}")


def _methods(file: Path, content: Mapping) -> dict[str, methods.Method]:
    settings = content["methods"]
    found = methods.discover(settings["folders"])
    named = {
        *settings.get("exclude", ()),
        *settings.get("parameters", {}),
        *settings.get("only", ()),
    }
    for name in sorted(named - set(found)):
        raise UserError(f"{file}: methods: unknown method '{name}'; known: {', '.join(found)}")
    for name, given in settings.get("parameters", {}).items():
        methods.check_parameters(found[name], given)
    controls = {name for name, method in found.items() if method.control}
    for name in sorted(controls & set(settings.get("exclude", ()))):
        raise UserError(f"{file}: methods.exclude: '{name}' is a control and can't be switched off")
    wanted = (set(settings.get("only", found)) | controls) - set(settings.get("exclude", ()))
    return {name: method for name, method in found.items() if name in wanted}


def as_dict(cell: Cell) -> dict:
    return asdict(cell)
