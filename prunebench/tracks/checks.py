"""What must hold of a track before anything runs."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import yaml

from prunebench import assets, models
from prunebench import recovery as recoveries
from prunebench.errors import UserError
from prunebench.runtime import resources
from prunebench.tracks import methods
from prunebench.tracks.cells import PUBLISHED
from prunebench.tracks.stages import FOLDERS, NEEDY, RESERVED, SEVERAL_GPUS, needs_of

SCHEMA = resources.root() / "workflow" / "schemas" / "track.schema.yaml"
FLOW_SAMPLERS = ("euler", "heun", "euler-maruyama")


def check_assets(file: Path, track) -> None:
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


def validate(file: Path, content: object) -> None:
    check_schema(file, content, SCHEMA)
    for name, model in content["models"].items():
        if name in FOLDERS:
            raise UserError(f"{file}: models.{name}: the name is taken; choose another")
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
            check_recovery(f"{file}: divisions.{division}", name, content["budgets"])
    for kind in ("autoencoder", "text_encoder"):
        _check_coders(file, content, kind)
    for name in content.get("autoencoders", {}):
        if name in content.get("text_encoders", {}):
            raise UserError(
                f"{file}: text_encoders.{name}: an autoencoder has that name; rename it"
            )
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
        if rule not in ("default", *NEEDY):
            known = ", ".join(("default", *NEEDY))
            raise UserError(f"{file}: needs: unknown stage '{rule}'; known: {known}")
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
        check_recovery(f"{file}: oracle", name, content["budgets"])
        if name.startswith(f"{PUBLISHED}-"):
            raise UserError(f"{file}: oracle.recoveries: '{name}' belongs to a method, not a mask")


def check_recovery(where: str, name: str, budgets: Mapping) -> None:
    module, _, budget = name.rpartition("-")
    if name == "none":
        return
    if module not in (PUBLISHED, *recoveries.recovery_names()):
        known = ", ".join(recoveries.recovery_names())
        raise UserError(f"{where}: unknown recovery '{module}' in '{name}'; known: {known}")
    if budget not in budgets:
        raise UserError(f"{where}: '{name}' needs a budget of: {', '.join(budgets)}")


def check_methods(file: Path, content: Mapping) -> dict[str, methods.Method]:
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
