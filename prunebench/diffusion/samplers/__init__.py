"""Samplers: how images are made of noise with a trained network, one module each.

A sampler's module offers `SAMPLER`, its entry, and

    denoise(predict, x, *, objective, steps, options, randomness)

which follows the sampler's equation from noise x [N, C, H, W] to images in [-1, 1], or to latents.
`predict(x, t)` is the network's (guided) prediction at one time t of the objective, a number or a
tensor []; `options` is the entry's model of what a track may set; image n draws noise from
`randomness[n]` alone, and `randomness` is None for samplers that draw none. All of it must be
differentiable. Importing a module is light, because tracks are read without torch: what computes is
imported inside `denoise`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from prunebench.diffusion.options import Options
from prunebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Predict = Callable[["Tensor", "float | Tensor"], "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What planning knows of a sampler.

    Attributes:
        name: as in `sampling.sampler` of a track.
        objectives: names of the objectives whose models it samples.
        stochastic: it draws noise on the way.
        options: the model of `sampling.options`.
        path: (options, steps, train_steps) -> the times it visits, descending, and the one where
            it ends, None for no noise at all; of samplers whose step goes from the image and the
            noise that are predicted at one time straight to the next. Step distillation folds
            several such steps into one.
    """

    name: str
    objectives: tuple[str, ...]
    stochastic: bool = False
    options: type[Options] = Options
    path: Callable[[Options, int, int | None], list[float | None]] | None = None


def _modules() -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.SAMPLER.name: module for module in modules}


def sampler_names(objective: str | None = None) -> list[str]:
    """The names of all samplers, or of those that serve an objective, sorted."""
    entries = [module.SAMPLER for module in _modules().values()]
    return sorted(e.name for e in entries if objective in (None, *e.objectives))


def sampler(name: str) -> Entry:
    """The entry of a sampler; a name that none has is a UserError that says the nearest."""
    if name not in _modules():
        raise UserError(f"sampler: {_unknown(name, sampler_names())}")
    return _modules()[name].SAMPLER


def checked(
    name: str, steps: int, options: Mapping[str, object], objective: str, train_steps: int | None
) -> Options:
    """The options of a sampler, after all that can be known without computing was checked.

    Args:
        objective: its name.
        train_steps: number of times that it has; None for flows.

    Raises:
        UserError: the sampler is unknown, does not serve the objective, or can't be used so. The
            message begins with the key of `sampling` that is wrong.
    """
    entry = sampler(name)
    if objective not in entry.objectives:
        able = ", ".join(sampler_names(objective))
        raise UserError(f"sampler: '{name}' does not sample objective '{objective}'; use {able}")
    if steps < 1:
        raise UserError(f"steps: {steps}; take at least 1")
    try:
        found = entry.options(**options)
    except ValidationError as error:
        raise UserError(_first(error, entry)) from None
    refusal = found.refusal(steps, train_steps)
    if refusal:
        raise UserError(refusal)
    return found


def folded(
    name: str, options: Options, steps: int, train_steps: int | None, fold: int
) -> list[float | None]:
    """The path of a sampler whose steps, `fold` at a time, become one of a student's.

    Raises:
        UserError: the sampler has no such path, or the student would visit other times. The
            message begins with the key of `sampling` that is wrong.
    """
    entry = sampler(name)
    if entry.path is None:
        able = ", ".join(e for e in sampler_names(entry.objectives[0]) if sampler(e).path)
        raise UserError(f"sampler: the steps of '{name}' can't be folded; use {able}")
    if steps % fold or steps == 0:
        raise UserError(f"steps: {steps} steps can't be folded {fold} at a time; take a multiple")
    whole = entry.path(options, steps, train_steps)
    if entry.path(options, steps // fold, train_steps) != [*whole[:-1:fold], whole[-1]]:
        raise UserError(
            f"options: {steps // fold} steps do not visit every {fold}th time of {steps}; take "
            "timestep_spacing trailing"
        )
    return whole


def denoise(
    name: str, predict: Predict, x: Tensor, *, randomness: Sequence | None = None, **settings
) -> Tensor:
    """Follow a sampler; `settings` are objective, steps and options of its `denoise`."""
    module = _modules()[name]
    if not module.SAMPLER.stochastic:
        randomness = None
    return module.denoise(predict, x, randomness=randomness, **settings)


def follow(scheduler: object, predict: Predict, x: Tensor, scale: float = 1, **options) -> Tensor:
    """Follow one of diffusers' schedulers whose times are those of the objective, times `scale`."""
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t / scale if scale != 1 else t), t, x, **options).prev_sample
    return x


def _first(error: ValidationError, entry: Entry) -> str:
    """The first fault of options in one line."""
    fault = error.errors(include_url=False)[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"options.{key}: {_unknown(key, entry.options.model_fields)}"
    return f"options.{key}: {fault['input']!r}: {fault['msg']}"


def _unknown(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"
    return f"unknown name '{name}'; {hint}"
