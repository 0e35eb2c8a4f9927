"""What must hold between the sections of a track, and between it and what the suite has.

Everything that can be known without files and without torch is checked before anything runs; each
refusal names the file and the key.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench import assets, models
from prunebench import recovery as recoveries
from prunebench.diffusion import samplers
from prunebench.errors import UserError
from prunebench.evaluation.metrics import metrics
from prunebench.models import Takes, takes
from prunebench.tracks import methods, phases
from prunebench.tracks.cells import DEFAULT, PRECISIONS, RECIPE
from prunebench.tracks.settings import nearest, parse
from prunebench.tracks.settings_benchmark import (
    BenchmarkSettings,
    Division,
    Model,
    Needs,
    Sampling,
)
from prunebench.tracks.stages import FOLDERS, NEEDY, RESERVED, SEVERAL_GPUS, needs_of


@dataclass(frozen=True)
class Asked:
    """A track being checked: its file and settings, and what its data set holds."""

    file: Path
    settings: BenchmarkSettings
    images: assets.Asset

    @property
    def side(self) -> int:
        """Pixels a side of the images that are compared."""
        return self.settings.sampling.size or self.images.shape[1]

    def refuse(self, key: str, message: str) -> UserError:
        return UserError(f"{self.file}: {key}: {message}")


def take_published(file: Path, place: str, model: Model) -> Model:
    """The model with the published configuration that its `config` names in that one's place.

    Its checkpoint's layout is the default of `weights`, and what it was trained for must be the
    model's objective.

    Raises:
        UserError: the family, the configuration, one of its keys or the layout is unknown or wrong.
    """
    config, entry = published_config(file, place, model.family, model.config)
    update: dict[str, object] = {"config": config}
    if model.weights is not None:
        layout = _layout(file, place, model, entry)
        update["weights"] = model.weights.model_copy(update={"layout": layout})
    trained = model.objective.model_dump(exclude_unset=True, exclude={"times"})
    own = entry and model.weights is not None and update["weights"].layout == entry.layout
    if own and trained != entry.objective:
        raise UserError(
            f"{file}: {place}.objective: the checkpoint was trained for {entry.objective}"
        )
    return model.model_copy(update=update)


def published_config(
    file: Path, place: str, family: str, config: Mapping | str
) -> tuple[dict, models.Published | None]:
    """The settings of a network, and the published entry that a track names in their place."""
    if family not in models.family_names():
        known = nearest(family, models.family_names())
        raise UserError(f"{file}: {place}.family: unknown family '{family}'{known}")
    entry = None
    if isinstance(config, str):
        table = models.published(family)
        if config not in table:
            raise UserError(
                f"{file}: {place}.config: unknown name '{config}'{nearest(config, table)}"
            )
        entry = table[config]
        config = copy.deepcopy(entry.config)
    parse(models.config(family), config, file, place, "config")
    return config, entry


def _layout(file: Path, place: str, model: Model, entry: models.Published | None) -> str:
    layout = model.weights.layout or (entry and entry.layout)
    known = sorted({"suite", *(e.layout for e in models.published(model.family).values())})
    if layout not in known:
        said = f"'{layout}' is none of family {model.family}"
        if layout is None:
            said = "this key is missing; only a published 'config' brings its own"
        raise UserError(f"{file}: {place}.weights.layout: {said}{nearest(layout or '', known)}")
    return layout


def check(file: Path, settings: BenchmarkSettings) -> None:
    """Refuse what the sections by themselves allow.

    Raises:
        UserError: see the functions below; the message names the key.
    """
    _check_assets(file, settings)
    asked = Asked(file, settings, settings.dataset.entry)
    for name, model in settings.models.items():
        _check_model(asked, name, model)
    _check_evaluation(asked)
    for name, division in settings.divisions.items():
        if name in RESERVED:
            raise asked.refuse(f"divisions.{name}", "the name is taken; choose another")
        for recovery in division.recoveries:
            check_recovery(f"{file}: divisions.{name}.recoveries", recovery, settings)
        _check_combinations(asked, f"divisions.{name}", division)
    _check_recoveries(asked)
    _check_coders(asked)
    _check_oracle(asked)
    check_needs(file, settings.needs)
    _check_shared_batches(asked)
    _check_dense_seeds(asked)
    _check_precisions(asked)


def asset_names(settings: BenchmarkSettings) -> Iterator[tuple[str, str, str]]:
    """(key, name, kind) of every asset that a track names."""
    if not settings.dataset.made_up:
        yield "dataset.name", settings.dataset.name, "dataset"
    if settings.dataset.reference not in ("held_out", "train"):
        yield "dataset.reference", settings.dataset.reference, "reference"
    if settings.extractor.asset:
        yield "extractor.asset", settings.extractor.asset, "extractor"
    evaluation = settings.evaluation.model_dump()
    for metric in metrics().values():
        if name := metric.weights(evaluation):
            yield "evaluation", name, "extractor"
    for name, model in settings.models.items():
        if model.weights and model.weights.asset:
            yield f"models.{name}.weights.asset", model.weights.asset, "checkpoint"
    for kind in ("autoencoders", "text_encoders"):
        for name, coder in getattr(settings, kind).items():
            if coder.asset:
                yield f"{kind}.{name}.asset", coder.asset, "checkpoint"


def _check_assets(file: Path, settings: BenchmarkSettings) -> None:
    for key, name, kind in asset_names(settings):
        known = [asset.name for asset in assets.ASSETS.values() if asset.kind == kind]
        if name not in assets.ASSETS:
            raise UserError(f"{file}: {key}: unknown asset {name!r}{nearest(name, known)}")
        if name not in known:
            raise UserError(f"{file}: {key}: asset '{name}' is no {kind}{nearest(name, known)}")


def _check_model(asked: Asked, name: str, model: Model) -> None:
    """What of a model's settings must fit together, and fit the data set."""
    place, needed = f"models.{name}", takes(model.family, model.config)
    if name in FOLDERS:
        raise asked.refuse(place, "the name is taken; choose another")
    _check_shape(asked, place, model, needed)
    _check_steps(asked, place, model, needed)
    _check_conditions(asked, place, model, needed)
    for budget, images in asked.settings.budgets.items():
        if images < model.recovery.batch:
            raise asked.refuse(f"budgets.{budget}", f"less than one batch of model '{name}'")
    _check_precision(asked, name, model)


def _check_shape(asked: Asked, place: str, model: Model, needed: Takes) -> None:
    """Images of the data set, or latents that an autoencoder may make of them."""
    channels, side, _ = asked.images.shape
    if model.autoencoder is None and needed.channels != channels:
        raise asked.refuse(
            f"{place}.config",
            f"the network takes {needed.channels} channels, {asked.images.name} has {channels}; "
            "models of latents name an autoencoder",
        )
    if model.autoencoder is None and needed.side not in (None, side):
        raise asked.refuse(
            f"{place}.config",
            f"the network takes images of {needed.side} pixels a side, {asked.images.name} has "
            f"{side}; models of latents name an autoencoder",
        )
    if side % (needed.side or needed.multiple):
        raise asked.refuse(
            f"{place}.config",
            f"{side} pixels a side of {asked.images.name} are no multiple of "
            f"{needed.side or needed.multiple}, the network's side",
        )


def _check_steps(asked: Asked, place: str, model: Model, needed: Takes) -> None:
    """The sampler can do what is asked of it, also in the steps that `fewer_steps` leaves."""
    sampling = model.sampling
    for key, way in _samplings(model):
        if key == f"samplings.{DEFAULT}":
            raise asked.refuse(f"{place}.{key}", "the name is that of `sampling`; choose another")
        if key.removeprefix("samplings.") in PRECISIONS:
            raise asked.refuse(f"{place}.{key}", "the name is that of a precision; choose another")
        _check_sampler(asked, f"{place}.{key}", model, way, needed)
    for fraction in asked.settings.fewer_steps:
        left = round(sampling.steps * (1 - fraction))
        if not 0 < left < sampling.steps:
            raise asked.refuse(
                f"{place}.sampling.steps",
                f"{fraction} fewer of {sampling.steps} steps is {left}; change steps or "
                "fewer_steps",
            )
        fewer = sampling.model_copy(update={"steps": left})
        _check_sampler(asked, f"{place}.sampling", model, fewer, needed)


def _samplings(model: Model) -> Iterator[tuple[str, Sampling]]:
    """Every way to sample a model, and its key."""
    yield "sampling", model.sampling
    yield from ((f"samplings.{name}", way) for name, way in model.samplings.items())


def _check_sampler(asked: Asked, key: str, model: Model, sampling: Sampling, needed: Takes) -> None:
    goal, steps = model.objective, sampling.steps
    times = getattr(goal, "train_steps", None)
    try:
        options = samplers.checked(sampling.sampler, steps, sampling.options, goal.name, times)
    except UserError as error:
        raise UserError(f"{asked.file}: {key}.{error}") from None
    if options.reads_variance() and not needed.learns_variance:
        raise asked.refuse(
            f"{key}.options.variance_type",
            "the model predicts no variance; leave it out",
        )


def _check_conditions(asked: Asked, place: str, model: Model, needed: Takes) -> None:
    """Classes or text as the data set has them; dropping them and guidance need one of both."""
    classes, reads = asked.images.classes, model.text_encoder is not None
    if (reads and classes and not asked.images.captions) or (not reads and not classes):
        has = "classes, not captions" if classes else "captions, not classes"
        raise asked.refuse(f"{place}.text_encoder", f"{asked.images.name} has {has}")
    if model.text_encoder is not None:
        if needed.classes is not None:
            raise asked.refuse(
                f"{place}.text_encoder", "the model has classes; leave out one of them"
            )
        if needed.text is None:
            raise asked.refuse(f"{place}.text_encoder", "the network reads no text")
        return
    if needed.text is not None:
        raise asked.refuse(
            f"{place}.text_encoder", "this key is missing, and the network reads text"
        )
    if needed.classes not in (None, asked.images.classes):
        raise asked.refuse(
            f"{place}.config.classes",
            f"{needed.classes} classes, but {asked.images.name} has {asked.images.classes}",
        )
    for key in _guided(model):
        if needed.classes is None:
            raise asked.refuse(
                f"{place}.{key}",
                "the model is unconditional; leave it out, or give config.classes or a "
                "text_encoder",
            )
        if not needed.no_class:
            raise asked.refuse(
                f"{place}.{key}", "the model has no class for 'no class'; leave it out"
            )


def _guided(model: Model) -> Iterator[str]:
    """The keys that only a model of classes or text has a use for."""
    if model.training and model.training.class_dropout:
        yield "training.class_dropout"
    if model.recovery.class_dropout:
        yield "recovery.class_dropout"
    for key, way in _samplings(model):
        if way.guidance != 1:
            yield f"{key}.guidance"


def _check_precision(asked: Asked, name: str, model: Model) -> None:
    """Weights in half precision can be pruned and sampled; small updates of them would be lost."""
    if model.weights is None or model.weights.dtype == "float32":
        return
    divisions, oracle = asked.settings.divisions.values(), asked.settings.oracle
    used = {recovery for division in divisions for recovery in division.recoveries}
    if oracle and name in oracle.models:
        used |= set(oracle.recoveries)
    if model.training is not None or used != {"none"}:
        raise asked.refuse(
            f"models.{name}.weights.dtype",
            "weights in half precision can't be trained; leave it out, or take only recoveries "
            "'none' and no 'training'",
        )


def _check_evaluation(asked: Asked) -> None:
    """What compares images can do so with these."""
    settings, images = asked.settings, asked.images
    lpips, extractor = settings.evaluation.lpips, settings.extractor
    if lpips == "domain" != extractor.name:
        raise asked.refuse(
            "evaluation.lpips",
            "'domain' compares maps of the domain classifier and needs extractor.name 'domain', "
            f"not '{extractor.name}'; or use none, alex or vgg",
        )
    few = (images.classes or 0) < 2 and not settings.dataset.made_up
    if extractor.name == "domain" and few:
        raise asked.refuse(
            "extractor.name", f"'domain' learns classes; {images.name} has {images.classes or 0}"
        )
    for name, metric in metrics().items():
        if said := metric.refusal(settings.evaluation.model_dump(), asked.side):
            raise UserError(f"{asked.file}: {said}")
        limit = settings.dataset.limit_reference or metric.least_images
        for key, count in (
            ("sampling.count", settings.sampling.count),
            ("dataset.limit_reference", limit),
        ):
            if count < metric.least_images:
                raise asked.refuse(key, f"{name} needs {metric.least_images} images, not {count}")
    if settings.sampling.size and settings.sampling.size > images.shape[1]:
        raise asked.refuse(
            "sampling.size",
            f"images are made smaller only; those of {images.name} have {images.shape[1]} a side",
        )
    limit = settings.dataset.limit_train
    if extractor.training and limit and extractor.training.batch > limit:
        raise asked.refuse("extractor.training.batch", f"more than dataset.limit_train, {limit}")


def _check_coders(asked: Asked) -> None:
    """The autoencoders and text encoders that models name are there; no two have one name.

    The latents of an autoencoder that the track trains are known, and must be what models take.
    """
    for name in asked.settings.text_encoders:
        if name in asked.settings.autoencoders:
            raise asked.refuse(f"text_encoders.{name}", "an autoencoder has that name; rename it")
    for name, model in asked.settings.models.items():
        for kind, coder in model.coders.items():
            known = getattr(asked.settings, f"{kind}s")
            if coder not in known:
                raise asked.refuse(
                    f"models.{name}.{kind}",
                    f"unknown {kind.replace('_', ' ')} '{coder}' in {kind}s{nearest(coder, known)}",
                )

    for name, coder in asked.settings.autoencoders.items():
        if coder.own and asked.images.shape[1] % coder.own.factor:
            raise asked.refuse(
                f"autoencoders.{name}.own.channels",
                f"their levels divide sides by {coder.own.factor}, of which "
                f"{asked.images.shape[1]}, the images' side, is no multiple",
            )
    for name, model in asked.settings.models.items():
        _check_latents(asked, f"models.{name}.config", model)


def _check_latents(asked: Asked, place: str, model: Model) -> None:
    """What a model takes is what the track's own autoencoder gives."""
    coder = asked.settings.autoencoders.get(model.autoencoder)
    if coder is None or coder.own is None:
        return
    needed, side = takes(model.family, model.config), asked.images.shape[1] // coder.own.factor
    fits = side == needed.side or (needed.side is None and side % needed.multiple == 0)
    if needed.channels != coder.own.latent_channels or not fits:
        wanted = f"a side of {needed.side}" if needed.side else f"multiples of {needed.multiple}"
        raise asked.refuse(
            place,
            f"the network takes {needed.channels} channels and {wanted}; the latents of "
            f"'{model.autoencoder}' have {coder.own.latent_channels} and {side}",
        )


def _check_oracle(asked: Asked) -> None:
    oracle = asked.settings.oracle
    if oracle is None:
        return
    for name in oracle.models:
        if name not in asked.settings.models:
            known = nearest(name, asked.settings.models)
            raise asked.refuse("oracle.models", f"unknown model '{name}'{known}")
    for name in oracle.recoveries:
        check_recovery(f"{asked.file}: oracle.recoveries", name, asked.settings)
        if name.startswith(f"{RECIPE}-"):
            raise asked.refuse("oracle.recoveries", f"'{name}' belongs to a method, not a mask")


def check_recovery(where: str, name: str, settings: BenchmarkSettings) -> None:
    """Refuse what is neither "none" nor a recovery and a budget: "finetune-low"."""
    module, _, budget = name.rpartition("-")
    if name == "none":
        return
    known = (*settings.recoveries, *recoveries.recovery_names())
    if module not in (RECIPE, *known):
        raise UserError(f"{where}: unknown recovery '{module}' in '{name}'{nearest(module, known)}")
    if budget not in settings.budgets:
        raise UserError(f"{where}: '{name}' needs a budget of: {', '.join(settings.budgets)}")


def _check_recoveries(asked: Asked) -> None:
    """The track's own recoveries are made of modules; every model can be recovered as is asked."""
    settings = asked.settings
    for name, given in settings.recoveries.items():
        if name in (RECIPE, *recoveries.recovery_names()):
            raise asked.refuse(f"recoveries.{name}", "the name is taken; choose another")
        phases.check(f"{asked.file}: recoveries.{name}", given)
    for where, name in _recovered(settings):
        phases.check_models(f"{asked.file}: {where}", name, settings)


def _recovered(settings: BenchmarkSettings) -> Iterator[tuple[str, str]]:
    """(key, name without its budget) of every recovery that the track runs, but "none"."""
    asked = [(f"divisions.{key}.recoveries", entry) for key, entry in settings.divisions.items()]
    asked += [("oracle.recoveries", settings.oracle)] if settings.oracle else []
    for where, entry in asked:
        names = [name.rpartition("-")[0] for name in entry.recoveries if name != "none"]
        yield from ((where, name) for name in names if name != RECIPE)


def check_needs(file: Path, needs: Mapping[str, Needs]) -> None:
    known = ("default", *NEEDY)
    for rule, given in needs.items():
        if rule not in known:
            raise UserError(f"{file}: needs.{rule}: unknown stage '{rule}'{nearest(rule, known)}")
        if (given.gpu or 0) > 1 and rule not in SEVERAL_GPUS:
            able = " and ".join(SEVERAL_GPUS)
            raise UserError(f"{file}: needs.{rule}.gpu: only {able} can use more than one GPU")


def _check_shared_batches(asked: Asked) -> None:
    """A batch that several GPUs train on must be divisible by them: said before jobs are queued."""
    for rule, key in (("dense", "training"), ("recover", "recovery")):
        count = needs_of(asked.settings.model_dump(include={"needs"}, exclude_none=True), rule)[
            "gpu"
        ]
        for name, model in asked.settings.models.items():
            training = getattr(model, key)
            if count > 1 and training and training.batch % count:
                raise asked.refuse(
                    f"models.{name}.{key}.batch",
                    f"{training.batch} can't be shared by the {count} GPUs of needs.{rule}",
                )


def _check_dense_seeds(asked: Asked) -> None:
    """Several dense trainings are of models that are trained here; the oracle has some of them."""
    oracle, seeds = asked.settings.oracle, asked.settings.dense_seeds
    if oracle and not set(oracle.dense_seeds or ()) <= set(seeds):
        known = ", ".join(map(str, seeds))
        raise asked.refuse("oracle.dense_seeds", f"some are not among dense_seeds: {known}")
    if len(seeds) < 2:
        return
    for name, model in asked.settings.models.items():
        if model.training is None:
            raise asked.refuse(
                "dense_seeds", f"model '{name}' is taken as released; it has one dense seed"
            )


def _check_precisions(asked: Asked) -> None:
    """The first precision is what the others are compared with; bf16 is timed in one way only."""
    given = asked.settings.precisions
    if list(given) != sorted(given, key=PRECISIONS.index):
        order = ", ".join(PRECISIONS)
        raise asked.refuse(
            "precisions", f"order them as {order}: others are compared with the first"
        )
    if given != PRECISIONS[:1] and "bf16" in asked.settings.latency.variants:
        raise asked.refuse(
            "latency.variants",
            "'bf16' is timed as one of the track's `precisions` where it has any; leave it out",
        )


def _check_combinations(asked: Asked, place: str, division: Division) -> None:
    """What a division crosses is there, with what it is compared with."""
    named = (name for model in asked.settings.models.values() for name in model.samplings)
    known = {
        "precisions": asked.settings.precisions,
        "samplings": tuple(dict.fromkeys((DEFAULT, *named))),
    }
    for key, values in known.items():
        given = getattr(division, key)
        if given is None:
            continue
        if division.compares != "combinations":
            raise asked.refuse(
                f"{place}.{key}", "only divisions that compare combinations have it; leave it out"
            )
        for name in given:
            if name not in values:
                said = f"unknown {key[:-1]} '{name}'{nearest(name, values)}"
                raise asked.refuse(f"{place}.{key}", said)
        if given[0] != values[0]:
            raise asked.refuse(
                f"{place}.{key}", f"begin with {values[0]}, which others compare with"
            )
    if division.compares == "combinations" and all(
        len(getattr(division, key) or values) == 1 for key, values in known.items()
    ):
        raise asked.refuse(
            f"{place}.compares",
            "'combinations' needs several `precisions`, or `samplings` of a model",
        )


def found_methods(file: Path, settings: BenchmarkSettings) -> methods.Found:
    """What lies in the track's folders of methods.

    Raises:
        UserError: a folder is missing, or two files share a name.
    """
    try:
        return methods.discover(settings.methods.folders)
    except UserError as error:
        raise UserError(f"{file}: methods.folders: {error}") from None


def check_methods(file: Path, settings: BenchmarkSettings, there: methods.Found) -> list[str]:
    """The methods that a track runs: those that are there, as `only` and `exclude` say.

    Raises:
        UserError: the track names a method that is broken or unknown, or gives it parameters that
            it does not have; or switches a control off.
    """
    given, found = settings.methods, there.methods
    for key, name in _named(settings):
        if name in there.broken:
            raise UserError(f"{file}: {key}: {there.broken[name]}")
        if name not in found:
            known = nearest(name, found)
            raise UserError(f"{file}: {key}: unknown method '{name}'{known}")
    for name, values in given.parameters.items():
        methods.check_parameters(found[name], values, f"{file}: methods.parameters.{name}")
    controls = {name for name, method in found.items() if method.control}
    for name in sorted(controls & set(given.exclude)):
        raise UserError(f"{file}: methods.exclude: '{name}' is a control and can't be switched off")
    only = found if given.only is None else given.only
    wanted = (set(only) | controls) - set(given.exclude)
    for name, division in settings.divisions.items():
        _check_division(f"{file}: divisions.{name}.methods", division, wanted)
    return [name for name in found if name in wanted]


def _named(settings: BenchmarkSettings) -> Iterator[tuple[str, str]]:
    """(key, method) of every method that the track names."""
    given = settings.methods
    for key in ("exclude", "parameters", "only"):
        yield from ((f"methods.{key}", name) for name in getattr(given, key) or ())
    for division, entry in settings.divisions.items():
        yield from ((f"divisions.{division}.methods", name) for name in entry.methods or ())


def _check_division(where: str, division: Division, wanted: set[str]) -> None:
    """A division may name only methods that the track runs."""
    for method in sorted(set(division.methods or ()) - wanted):
        raise UserError(f"{where}: '{method}' is left out by methods.only or methods.exclude")
