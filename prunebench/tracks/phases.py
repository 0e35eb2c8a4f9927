"""The phases of a recovery: which modules train a cell, one after the other, and on which models.

A module's name stands for one phase with its default parameters; names of the track's own, in its
`recoveries`, for what they list.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

from prunebench import recovery
from prunebench.diffusion import samplers
from prunebench.errors import UserError
from prunebench.models import takes
from prunebench.tracks import methods
from prunebench.tracks.settings_benchmark import BenchmarkSettings, Model, Phase


def phases_of(settings: BenchmarkSettings, name: str) -> tuple[Phase, ...]:
    """The phases of a recovery, () of "none", with all parameters of their modules.

    Args:
        name: without its budget.
    """
    if name == "none":
        return ()
    given = settings.recoveries.get(name, (Phase(module=name, share=1.0),))
    return tuple(map(_filled, given))


def _filled(phase: Phase) -> Phase:
    known = recovery.entry(phase.module).parameters
    return phase.model_copy(update={"parameters": {**known, **phase.parameters}})


def fold_of(given: Iterable[Phase]) -> int:
    """How many of the sampler's steps are one of the student's after these; 1: as many."""
    folds = (phase.parameters["fold"] for phase in given if recovery.entry(phase.module).folds)
    return math.prod(folds)


def steps_of(given: tuple[Phase, ...], steps: int) -> list[int]:
    """How many of so many training steps each phase takes; all of them together."""
    shares = [sum(phase.share for phase in given[:count]) for count in range(len(given) + 1)]
    ends = [round(share * steps) for share in shares]
    return [after - before for before, after in pairwise(ends)]


def check(place: str, given: tuple[Phase, ...]) -> None:
    """Refuse modules and parameters that there are not, and an order that makes no sense.

    Raises:
        UserError: one line that begins with `place`, the file and the key of the phases.
    """
    last = None
    for index, phase in enumerate(given):
        where = f"{place}.{index}"
        if phase.module not in recovery.recovery_names():
            known = methods.nearest(phase.module, recovery.recovery_names())
            raise UserError(f"{where}.module: unknown recovery '{phase.module}'{known}")
        entry = recovery.entry(phase.module)
        methods.check_parameters(entry, phase.parameters, f"{where}.parameters")
        if last and not entry.folds:
            raise UserError(f"{where}.module: '{entry.name}' would undo '{last}'; put it before")
        if entry.folds and phase.parameters.get("fold", 2) < 2:
            raise UserError(f"{where}.parameters.fold: take at least 2 steps for one")
        last = entry.name if entry.folds or entry.predicts else last


def check_models(place: str, name: str, settings: BenchmarkSettings) -> None:
    """Refuse a recovery that some model of the track can't have.

    Raises:
        UserError: one line that begins with `place`, the file and the key that names it.
    """
    for model, entry in settings.models.items():
        if said := refusal(name, entry, settings):
            raise UserError(f"{place}: '{name}' can't recover model '{model}': {said}")


def refusal(name: str, model: Model, settings: BenchmarkSettings) -> str | None:
    """Why a model can't have a recovery, beginning with the model's key; None where it can."""
    given = phases_of(settings, name)
    return next(_refusals(given, model), None) or _too_short(given, model, settings)


def _refusals(given: tuple[Phase, ...], model: Model) -> Iterator[str]:
    predicts, steps = getattr(model.objective, "prediction", ""), model.sampling.steps
    for phase in given:
        entry = recovery.entry(phase.module)
        if entry.guides:
            yield from _unguided(model)
        if entry.predicts and predicts != "noise":
            yield f"objective: it does not predict noise, so that '{entry.name}' changes nothing"
        predicts = entry.predicts or predicts
        if entry.bounded and predicts == "noise":
            yield (
                f"objective.prediction: '{entry.name}' needs networks that predict velocities; put "
                "the phase 'velocity' before it"
            )
        if entry.folds:
            yield from _unfoldable(model, steps, phase.parameters["fold"])
            steps //= phase.parameters["fold"]


def _unguided(model: Model) -> Iterator[str]:
    """Guidance needs a model that was trained with nothing asked."""
    network = takes(model.family, model.config)
    if network.text is None and not network.no_class:
        yield "config: nothing stands for 'no class' in it, which guidance asks for"
    if model.training and not model.training.class_dropout:
        yield "training.class_dropout: it never learns what nothing asked is; give a share"


def _unfoldable(model: Model, steps: int, fold: int) -> Iterator[str]:
    sampling, goal = model.sampling, model.objective
    times = getattr(goal, "train_steps", None)
    try:
        options = samplers.checked(sampling.sampler, steps, sampling.options, goal.name, times)
        samplers.folded(sampling.sampler, options, steps, times, fold)
    except UserError as error:
        yield f"sampling.{error}"


def _too_short(given: tuple[Phase, ...], model: Model, settings: BenchmarkSettings) -> str | None:
    if len(given) < 2:  # a budget of less than one batch is refused anyhow
        return None
    least = min(settings.budgets.values()) // model.recovery.batch
    return "budgets: a phase has no batch" if not all(steps_of(given, least)) else None
