"""Tracks: loading and checking their YAML, the cells they ask for, and where each artefact lies.

Free of torch, because the Snakefile imports it every time it is parsed.
"""

import copy
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jsonschema
import yaml

from prunebench import assets, methods, models
from prunebench import recovery as recoveries
from prunebench.errors import UserError

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "workflow" / "schemas" / "track.schema.yaml"
RUNS = Path("runs")
FLOW_SAMPLERS = ("euler", "heun", "euler-maruyama")
REFERENCES = ("none", "steps")  # kinds of methods that only show the dense model
PUBLISHED = "published"  # the recovery that stands for each method's own recipe

# What of a track each stage depends on, besides its input files: editing one of these entries
# recomputes the stage, editing anything else does not. "*" stands for the cell's model or method.
DEPENDS = {
    "extractor": ("dataset", "extractor"),
    "encode": ("dataset", "autoencoders.*", "text_encoders.*"),
    "dense": (
        "dataset",
        "models.*.family",
        "models.*.config",
        "models.*.objective",
        "models.*.training",
        "models.*.weights",
        "models.*.autoencoder",
        "models.*.text_encoder",
    ),
    "select": ("models.*.sampling", "methods.parameters.*"),
    "recover": ("budgets", "models.*.recovery"),
    "sample": (
        "models.*.sampling",
        "sampling.count",
        "sampling.lanes",
        "sampling.size",
        "autoencoders.*",
    ),
    "cost": (  # but not latency.wait, which changes no result
        "models.*.sampling",
        "latency.batch",
        "latency.rounds",
        "latency.warmup",
        "latency.images",
        "latency.variants",
    ),
    "score": ("evaluation", "models.*.reference"),
    "oracle": (
        "models.*.recovery",
        "models.*.sampling",
        "budgets",
        "oracle.sparsity",
        "oracle.masks",
        "sampling.count",
        "sampling.lanes",
        "sampling.size",
        "autoencoders.*",
        "evaluation.batch",
    ),
}


# What a job of each rule needs of a cluster where the track's `needs` say nothing. Enough for the
# embedded track on one CPU core, several times over; a track of larger models states its own.
# Memory (MB): a job peaks at 1,000 to 1,200, most of it imports, and Snakemake's own two processes
# in a Slurm job take 250. Time (minutes): several times the longest job's on one slow core.
NEEDS = {
    "extractor": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "encode": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "dense": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "select": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "recover": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "sample": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},
    "gather": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},  # `sample`, drawn in shards
    "cost": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},
    "score": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},
    "mask": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "efficiency": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},  # of a track of that kind
}
SEVERAL_GPUS = ("dense", "recover")  # rules that train data-parallel; one job of another uses one


# Targets and rules of the workflow and folders of results, which no division may be called.
RESERVED = (
    *("all", "everything", "partial", "assets", "fetch", "oracle", "mask", "raw", "shard"),
    "prompts",
    "efficiency",
    *DEPENDS,
)


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

    @property
    def published(self) -> bool:
        """Whether the cell runs its method's own recipe instead of the matched one."""
        return self.recovery.rpartition("-")[0] == PUBLISHED


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

    def autoencoder(self, name: str) -> Mapping:
        return self._coder("autoencoder", name)

    def text_encoder(self, name: str) -> Mapping:
        return self._coder("text_encoder", name)

    def _coder(self, kind: str, name: str) -> Mapping:
        entries, word = self.content.get(f"{kind}s", {}), kind.replace("_", " ")
        if name not in entries:
            known = ", ".join(entries) or "none"
            raise UserError(f"unknown {word} '{name}' in track {self.name}; known: {known}")
        return entries[name]

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
        return [Cell(self.name, *row, seed) for row in rows for seed in self.content["seeds"]]

    def records(self, division: str, runs: Path = RUNS) -> list[str]:
        """What the table of a division is made of."""
        return [Paths(self, cell, runs).metrics for cell in self.cells(division)]

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
        _check_recovery("--recovery", recovery, self.content["budgets"])
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

    def oracle(self) -> list[tuple[str, str, int, int]]:
        """(model, recovery, seed, mask) of every job of the oracle."""
        settings = self.content.get("oracle")
        if not settings:
            return []
        places = (settings["models"], settings["recoveries"], settings["seeds"])
        return list(itertools.product(*places, range(settings["masks"])))

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

    def needs(self, rule: str) -> dict[str, int]:
        """What a job of a rule needs: mem_mb, runtime (minutes), gpu, cpus."""
        return needs_of(self.content, rule)

    def fingerprint(
        self,
        stage: str,
        model: str = "",
        method: str = "",
        autoencoder: str = "",
        text_encoder: str = "",
    ) -> str:
        """Hash of the settings a stage depends on; a change of it recomputes the stage."""
        uses = autoencoder or self.content["models"].get(model, {}).get("autoencoder", "")
        names = {"models": model, "methods": method, "autoencoders": uses}
        names["text_encoders"] = text_encoder
        trains = stage == "select" and method in self.methods and self.methods[method].trains
        parts = []
        for dotted in (*DEPENDS[stage], *(DEPENDS["recover"] if trains else ())):
            entry: object = self.content
            keys = dotted.split(".")
            for key in keys:
                entry = entry.get(names[keys[0]] if key == "*" else key, {}) if entry else {}
            parts.append(entry)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def needs_of(content: Mapping, rule: str) -> dict[str, int]:
    """What a job of a rule needs, by the content of a track of either kind."""
    given = content.get("needs", {})
    return {**NEEDS[rule], **given.get("default", {}), **given.get(rule, {})}


class Layout:
    """Where artefacts lie, as strings. Fields may be Snakemake wildcards such as "{model}"."""

    def __init__(self, track: str, runs: Path = RUNS):
        self.root = f"{runs}/{track}"
        self.assets = f"{self.root}/assets.json"
        self.extractor = f"{self.root}/extractor/extractor.json"

    def trained(self, model: str) -> str:
        return f"{self.root}/{model}/trained/dense.json"

    def latents(self, autoencoder: str) -> str:
        return f"{self.root}/latents/{autoencoder}/latents.json"

    def prompts(self, text_encoder: str) -> str:
        return f"{self.root}/prompts/{text_encoder}/prompts.json"

    def encoded(self, model: Mapping) -> tuple[str, ...]:
        """The latents and prompts that a model of these settings trains on, of those it has."""
        records = {"autoencoder": self.latents, "text_encoder": self.prompts}
        return tuple(record(model[kind]) for kind, record in records.items() if kind in model)

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

    def shard(
        self,
        index: object,
        count: int,
        model: str,
        method: str,
        sparsity: object,
        recovery: str,
        seed: object,
    ) -> tuple[str, str]:
        """Record and images of one of the `count` shards that a cell is drawn in."""
        name = f"shard{index}of{count}"
        record = self.cell(name, model, method, sparsity, recovery, seed)
        return record, record.removesuffix("json") + "safetensors"

    def results(self, division: str, default: str) -> str:
        """Folder of a division's leaderboard: the default division's is the track's own."""
        folder = f"results/{Path(self.root).name}"
        return folder if division == default else f"{folder}/{division}"

    def oracle(self, model: str, recovery: str, seed: object, mask: object) -> str:
        """Record of one layer mask of the oracle."""
        return f"{self.root}/oracle/{model}/{recovery}/seed{seed}/mask{mask}.json"

    def log(self, stage: str, *fields: object) -> str:
        return "/".join(map(str, (self.root, "logs", stage, *fields))) + ".log"


class Paths:
    """The artefacts of one cell."""

    def __init__(self, track: Track, cell: Cell, runs: Path = RUNS):
        self.layout = layout = Layout(track.name, runs)
        own = track.method(cell.method).trains or cell.published
        kind = f"selection-{cell.recovery}" if own else "selection"
        shared = (cell.model, cell.method, cell.sparsity)
        self.extractor, self.trained = layout.extractor, layout.trained(cell.model)
        self.select = layout.selection("select", *shared, cell.seed, kind)
        self.cost = layout.selection("cost", *shared, cell.seed, kind)
        self.recover = layout.cell("recover", *shared, cell.recovery, cell.seed)
        self.sample = layout.cell("sample", *shared, cell.recovery, cell.seed)
        self.shards = [  # none where the cell is drawn in one piece
            layout.shard(index, track.shards, *shared, cell.recovery, cell.seed)
            for index in range(track.shards if track.shards > 1 else 0)
        ]
        self.metrics = layout.cell("metrics", *shared, cell.recovery, cell.seed)
        self.checkpoint = self.select if cell.recovery == "none" else self.recover
        self.dense_sample = layout.cell("sample", cell.model, "dense", 0.0, "none", cell.seed)


def load(name: str) -> Track:
    """Load `config/<name>.yaml`, or the YAML file `name`, and check everything that can be checked.

    Raises:
        UserError: the track is unknown or of another kind, a key is unknown or wrong, or a method
            breaks its contract.
    """
    file, content = read(name)
    if _is_efficiency(content):
        raise UserError(
            f"{file} is an efficiency track, which measures costs only and has no cells: its "
            f"commands are `snakemake --config track={name}`, `prunebench efficiency` and "
            f"`prunebench leaderboard`; records and logs lie in {RUNS}/{file.stem}"
        )
    return _checked(file, content)


def load_any(name: str):
    """Load a track of either kind: a `Track`, or one of `prunebench.efficiency.track`."""
    from prunebench.efficiency import track as efficiency  # rests on this module

    file, content = read(name)
    return (efficiency.checked if _is_efficiency(content) else _checked)(file, content)


def _checked(file: Path, content: Mapping) -> Track:
    _validate(file, content)
    track = Track(file.stem, content, _methods(file, content))
    _check_assets(file, track)
    return track


def read(name: str) -> tuple[Path, object]:
    """The file of a track and its content, unchecked."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else Path("config") / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in Path("config").glob("*.yaml")))
        raise UserError(f"unknown track '{name}': {file} does not exist; known tracks: {known}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", file.stem, re.ASCII):
        raise UserError(f"{file}: a track's file name is its folder; use letters, digits, _ . -")
    content = _parsed(file)
    if isinstance(content, dict) and "base" in content:
        base = file.with_name(f"{content.pop('base')}.yaml")
        if not base.exists():
            raise UserError(f"{file}: base: {base} does not exist")
        content = _merged(_parsed(base), content)
    return file, content


def _is_efficiency(content: object) -> bool:
    return isinstance(content, Mapping) and content.get("kind") == "efficiency"


def _parsed(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None


def _merged(base: object, changes: object) -> object:
    """`base` with the keys of `changes`, mappings in depth; anything else is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}


def _check_assets(file: Path, track: Track) -> None:
    try:
        images = assets.data_set(track.content["dataset"]["name"])
        for name in track.assets():
            assets.asset(name)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    for name, model in track.content["models"].items():
        if ("text_encoder" in model) != (images.classes is None):
            has = "captions, not classes" if images.classes is None else "classes, not captions"
            raise UserError(f"{file}: models.{name}.text_encoder: {images.name} has {has}")


def _check_model(file: Path, name: str, model: Mapping, content: Mapping) -> None:
    """What of a model's settings must fit together, which a schema cannot say."""
    where, sampling = f"{file}: models.{name}", model["sampling"]
    flow = model["objective"]["name"] == "flow"
    if (sampling["sampler"] in FLOW_SAMPLERS) != flow:
        raise UserError(
            f"{where}.sampling.sampler: '{sampling['sampler']}' does not sample objective "
            f"'{model['objective']['name']}'; {', '.join(FLOW_SAMPLERS)} are for flow"
        )
    _check_spacing(where, model, sampling["steps"])
    for fraction in content["fewer_steps"]:
        left = round(sampling["steps"] * (1 - fraction))
        if not 0 < left < sampling["steps"]:
            raise UserError(
                f"{where}.sampling.steps: {fraction} fewer of {sampling['steps']} steps is {left}; "
                "change steps or fewer_steps"
            )
        _check_spacing(where, model, left)
    _check_conditions(where, model)
    learned = sampling.get("options", {}).get("variance_type") == "learned_range"
    if learned and not model["config"].get("learn_sigma"):
        raise UserError(
            f"{where}.sampling.options.variance_type: the model predicts no variance; leave it out"
        )
    if "images" in model["recovery"]:
        raise UserError(f"{where}.recovery.images: budgets say how long recovery trains")
    for budget, images in content["budgets"].items():
        if images < model["recovery"]["batch"]:
            raise UserError(f"{file}: budgets.{budget}: less than one batch of model '{name}'")
    if "training" not in model and "weights" not in model:
        raise UserError(
            f"{where}: needs 'training', 'weights', or both: the weights are fine-tuned"
        )
    if "classes" in model.get("weights", {}) and "training" not in model:
        raise UserError(f"{where}.weights.classes: other classes must be learnt; add 'training'")
    _check_precision(where, name, model, content)
    if "training" in model and model["training"]["images"] < model["training"]["batch"]:
        raise UserError(f"{where}.training.images: less than one batch")


def _check_precision(where: str, name: str, model: Mapping, content: Mapping) -> None:
    """Weights in half precision can be pruned and sampled; small updates of them would be lost."""
    if model.get("weights", {}).get("dtype", "float32") == "float32":
        return
    recoveries = [r for division in content["divisions"].values() for r in division["recoveries"]]
    oracle = content.get("oracle", {"models": []})
    if name in oracle["models"]:
        recoveries += oracle["recoveries"]
    if "training" in model or set(recoveries) != {"none"}:
        raise UserError(
            f"{where}.weights.dtype: weights in half precision can't be trained; leave it out, or "
            "take only recoveries 'none' and no 'training'"
        )


def take_published(where: str, model: dict) -> None:
    """Put the published configuration that a model's `config` names in its place.

    Its checkpoint's layout is the default of `weights`, and what it was trained for must be the
    model's objective.
    """
    if model["family"] not in models.family_names():
        families = ", ".join(models.family_names())
        raise UserError(f"{where}.family: unknown family '{model['family']}'; known: {families}")
    known, entry = models.published(model["family"]), None
    if isinstance(model["config"], str):
        entry = known.get(model["config"])
        if entry is None:
            names = ", ".join(known) or "none"
            raise UserError(f"{where}.config: unknown name '{model['config']}'; known: {names}")
        model["config"] = copy.deepcopy(entry.config)
    if "weights" not in model:
        return
    if ("asset" in model["weights"]) == ("file" in model["weights"]):
        raise UserError(f"{where}.weights: needs either the key 'asset' or 'file'")
    model["weights"] = weights = {"layout": entry and entry.layout, **model["weights"]}
    layouts = sorted({"suite", *(other.layout for other in known.values())})
    if weights["layout"] not in layouts:
        raise UserError(
            f"{where}.weights.layout: '{weights['layout']}' is no layout of family "
            f"{model['family']}; known: {', '.join(layouts)}"
        )
    trained = {key: value for key, value in model["objective"].items() if key != "times"}
    if entry and weights["layout"] == entry.layout and trained != entry.objective:
        raise UserError(f"{where}.objective: the checkpoint was trained for {entry.objective}")


def _check_spacing(where: str, model: Mapping, steps: int) -> None:
    """Leading steps are T // steps apart, counted from 0: at 750 of 1,000 the noisiest 250 miss."""
    sampling, times = model["sampling"], model["objective"].get("train_steps", 1000)
    default = {"ddpm": "leading", "pndm": "leading"}.get(sampling["sampler"])
    spacing = sampling.get("options", {}).get("timestep_spacing", default)
    if spacing == "leading" and times % steps > times / 10:
        raise UserError(
            f"{where}.sampling.options.timestep_spacing: 'leading' with {steps} steps never visits "
            f"the noisiest {times % steps} of {times} times; use linspace or trailing"
        )


def _check_conditions(where: str, model: Mapping) -> None:
    """Dropping conditions and guidance need a model that has classes, or reads text."""
    if "text_encoder" in model:
        if model["config"].get("classes") is not None:
            raise UserError(f"{where}.text_encoder: the model has classes; leave out one of them")
        return
    used = {
        "training.class_dropout": model.get("training", {}).get("class_dropout", 0) != 0,
        "recovery.class_dropout": model["recovery"].get("class_dropout", 0) != 0,
        "sampling.guidance": model["sampling"].get("guidance", 1) != 1,
    }
    for key in (key for key, asked in used.items() if asked):
        if model["config"].get("classes") is None:
            raise UserError(
                f"{where}.{key}: the model is unconditional; leave it out, or give config.classes "
                "or a text_encoder"
            )
        if not model["config"].get("null_class", True):
            raise UserError(f"{where}.{key}: the model has no class for 'no class'; leave it out")


@functools.cache
def _schema(file: Path) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(yaml.safe_load(file.read_text()))


def check_schema(file: Path, content: object, schema: Path) -> None:
    """Refuse what a JSON schema does not allow, naming the first wrong key."""
    errors = sorted(_schema(schema).iter_errors(content), key=lambda e: list(map(str, e.path)))
    if errors:
        key = ".".join(map(str, errors[0].absolute_path)) or "the file"
        raise UserError(f"{file}: {key}: {errors[0].message}")


def _validate(file: Path, content: object) -> None:
    check_schema(file, content, SCHEMA)
    for name, model in content["models"].items():
        take_published(f"{file}: models.{name}", model)
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
    for division, settings in content["divisions"].items():
        if division in RESERVED:
            raise UserError(f"{file}: divisions.{division}: the name is taken; choose another")
        for name in settings["recoveries"]:
            _check_recovery(f"{file}: divisions.{division}", name, content["budgets"])
    for kind in ("autoencoder", "text_encoder"):
        _check_coders(file, content, kind)
    _check_shards(file, content["sampling"])
    _check_oracle(file, content)
    check_needs(file, content.get("needs", {}))
    _check_shared_batches(file, content)


def _check_shared_batches(file: Path, content: Mapping) -> None:
    """A batch that several GPUs train on must be divisible by them: said before jobs are queued."""
    for rule, key in (("dense", "training"), ("recover", "recovery")):
        count = needs_of(content, rule)["gpu"]
        for name, model in content["models"].items():
            batch = model.get(key, {}).get("batch", 0)
            if count > 1 and batch % count:
                raise UserError(
                    f"{file}: models.{name}.{key}.batch: {batch} can't be shared by the {count} "
                    f"GPUs of needs.{rule}"
                )


def check_needs(file: Path, needs: Mapping) -> None:
    for rule, given in needs.items():
        if rule not in ("default", *NEEDS):
            known = ", ".join(("default", *NEEDS))
            raise UserError(f"{file}: needs: unknown rule '{rule}'; known: {known}")
        if given.get("gpu", 0) > 1 and rule not in SEVERAL_GPUS:
            able = " and ".join(SEVERAL_GPUS)
            raise UserError(f"{file}: needs.{rule}.gpu: only {able} can use more than one GPU")


def _check_coders(file: Path, content: Mapping, kind: str) -> None:
    """Autoencoders or text encoders, and the models that name one."""
    known = content.get(f"{kind}s", {})
    for name, entry in known.items():
        if ("asset" in entry) == ("folder" in entry):
            raise UserError(f"{file}: {kind}s.{name}: needs either the key 'asset' or 'folder'")
    for name, model in content["models"].items():
        if model.get(kind) not in (None, *known):
            raise UserError(
                f"{file}: models.{name}.{kind}: unknown {kind.replace('_', ' ')} '{model[kind]}'; "
                f"known: {', '.join(known) or 'none'}"
            )


def _check_shards(file: Path, sampling: Mapping) -> None:
    blocks = -(-sampling["count"] // sampling["lanes"])
    if sampling.get("shards", 1) > blocks:
        raise UserError(
            f"{file}: sampling.shards: {sampling['shards']} shards, but {sampling['count']} images "
            f"are {blocks} blocks of {sampling['lanes']} (sampling.lanes), which are never split; "
            f"use at most {blocks}"
        )


def _check_oracle(file: Path, content: Mapping) -> None:
    for name in content.get("oracle", {}).get("models", ()):
        if name not in content["models"]:
            known = ", ".join(content["models"])
            raise UserError(f"{file}: oracle.models: unknown model '{name}'; known: {known}")
    for name in content.get("oracle", {}).get("recoveries", ()):
        _check_recovery(f"{file}: oracle", name, content["budgets"])
        if name.startswith(f"{PUBLISHED}-"):
            raise UserError(f"{file}: oracle.recoveries: '{name}' belongs to a method, not a mask")


def _check_recovery(where: str, name: str, budgets: Mapping) -> None:
    module, _, budget = name.rpartition("-")
    if name == "none":
        return
    if module not in (PUBLISHED, *recoveries.recovery_names()):
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
        *(name for d in content["divisions"].values() for name in d.get("methods", ())),
    }
    for name in sorted(named - set(found)):
        raise UserError(f"{file}: methods: unknown method '{name}'; known: {', '.join(found)}")
    for name, given in settings.get("parameters", {}).items():
        methods.check_parameters(found[name], given)
    for method in found.values():
        _check_recipe(method)
    controls = {name for name, method in found.items() if method.control}
    for name in sorted(controls & set(settings.get("exclude", ()))):
        raise UserError(f"{file}: methods.exclude: '{name}' is a control and can't be switched off")
    _check_divisions(file, content, found)
    wanted = (set(settings.get("only", found)) | controls) - set(settings.get("exclude", ()))
    return {name: method for name, method in found.items() if name in wanted}


def _check_divisions(file: Path, content: Mapping, found: Mapping) -> None:
    """A division may name only methods that the track runs."""
    settings = content["methods"]
    gone = set(settings.get("exclude", ()))
    if "only" in settings:
        gone |= {n for n, m in found.items() if n not in settings["only"] and not m.control}
    for name, division in content["divisions"].items():
        for method in sorted(gone & set(division.get("methods", ()))):
            raise UserError(
                f"{file}: divisions.{name}.methods: '{method}' is left out by methods.only or "
                "methods.exclude"
            )


def _check_recipe(method: methods.Method) -> None:
    """A published recipe names a recovery that exists and parameters that `select` has."""
    recipe = method.published or {}
    known = {"recovery": str, "parameters": dict, "sparsities": tuple}
    for key, value in recipe.items():
        if key not in known:
            raise UserError(f"{method.file}: PUBLISHED has {key!r}; known: {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise UserError(
                f"{method.file}: PUBLISHED {key} is {value!r}, not a {known[key].__name__}"
            )
    if recipe.get("recovery", "finetune") not in recoveries.recovery_names():
        names = ", ".join(recoveries.recovery_names())
        raise UserError(
            f"{method.file}: PUBLISHED names the recovery {recipe['recovery']!r}; known: {names}"
        )
    for sparsity in recipe.get("sparsities", ()):
        if not (isinstance(sparsity, float) and 0 < sparsity < 1):
            raise UserError(
                f"{method.file}: PUBLISHED sparsities have {sparsity!r}; each must be in (0, 1)"
            )
    methods.check_parameters(method, recipe.get("parameters", {}), f"{method.file}: PUBLISHED")


def as_dict(cell: Cell) -> dict:
    return asdict(cell)
