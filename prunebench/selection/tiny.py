"""Tiny networks of every model family: what methods, recoveries and the families are tried on.

How small they are is said in `prunebench/models/configs/`; here networks, data and contexts are
made of it, in milliseconds and the same each time.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunebench import models
from prunebench.diffusion.objectives import objective
from prunebench.diffusion.sampling import Sampler
from prunebench.models.conditions import CLASSES as BY_CLASS
from prunebench.models.conditions import Condition, Conditions
from prunebench.selection.context import Context
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

LABELS = 10  # classes or prompts of every instance


@dataclass(frozen=True)
class Texts:
    """What encoders might make of a prompt per label and, in the last row, of none."""

    shapes: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def _rows(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(4)
        shapes = self.shapes.items()
        return {n: torch.randn(LABELS + 1, *shape, generator=generator) for n, shape in shapes}

    def of(self, labels: Tensor) -> dict[str, Tensor]:
        return {name: rows[labels] for name, rows in self._rows.items()}

    def nothing(self, asked: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {name: self._rows[name][LABELS].expand_as(value) for name, value in asked.items()}


@dataclass(frozen=True)
class Tiny:
    """An instance of a family with its module, its images' shape and its conditions."""

    instance: models.Instance

    @property
    def family(self) -> str:
        return self.instance.family

    @property
    def config(self) -> dict:
        return dict(self.instance.config)

    @property
    def objective(self) -> dict:
        return dict(self.instance.objective)

    @functools.cached_property
    def module(self) -> models.Family:
        return models.family(self.family)

    @functools.cached_property
    def conditions(self) -> Conditions:
        return Texts(self.instance.texts) if self.instance.texts else BY_CLASS

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        takes = models.config(self.family)(**self.config).takes()
        return self.instance.image or (takes.channels, takes.side, takes.side)

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def resolution(self) -> int:
        return self.shape[1]


INSTANCES = {name: Tiny(instance) for name, instance in models.instances().items()}
NAMES = tuple(INSTANCES)
PROMPTED = tuple(name for name, tiny in INSTANCES.items() if tiny.instance.texts)


@functools.cache
def _trained_looking(name: str) -> nn.Module:
    """Built once; every parameter is moved off its initial value, as training would."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = INSTANCES[name].module.build(INSTANCES[name].config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def dense(name: str) -> nn.Module:
    return copy.deepcopy(_trained_looking(name))


def inputs(name: str, count: int = 3) -> tuple[Tensor, Tensor, Condition]:
    generator, tiny = torch.Generator().manual_seed(1), INSTANCES[name]
    goal = objective(tiny.objective)
    x = torch.randn(count, *tiny.shape, generator=generator)
    y = tiny.conditions.of(torch.arange(count) % LABELS)
    return x, goal.model_time(goal.grid(count)), y


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    return model(*inputs(name))


def data(name: str, count: int = 64) -> loop.Data:
    """Images with something to learn: the class sets the brightness, noise sits on top."""
    generator, tiny = torch.Generator().manual_seed(2), INSTANCES[name]
    labels = torch.arange(count) % LABELS
    noise = torch.randint(0, 40, (count, *tiny.shape), generator=generator)
    images = (labels * 20).view(-1, 1, 1, 1) + noise
    goal = objective(tiny.objective)
    return loop.Data(images.to(torch.uint8), labels, goal, conditions=tiny.conditions)


def sampling(name: str) -> dict[str, object]:
    """How the instance is sampled."""
    own = "euler" if INSTANCES[name].objective["name"] == "flow" else "ddim"
    return {"sampler": own, "steps": 2, "lanes": 4}


def sampler(name: str, model: nn.Module, steps: float = 1.0, **settings: object) -> Sampler:
    """Draws from `model` in the share `steps` of two steps, deterministically unless told else."""
    tiny = INSTANCES[name]
    goal = objective(tiny.objective)
    settings = {**sampling(name), **settings}
    return Sampler(model, goal, tiny.shape, LABELS, settings, steps, conditions=tiny.conditions)


def settings(**changes: object) -> loop.Settings:
    return loop.Settings(**{"batch": 8, "learning_rate": 2e-3, **changes})


def context(name: str, model: nn.Module | None = None, **changes: object) -> Context:
    options = {
        "sparsity": 0.25,
        "seed": 0,
        "method": "test",
        "meter": BudgetMeter(),
        "settings": settings(),
        "sampling": sampling(name),
        **changes,
    }
    tiny = INSTANCES[name]
    whole = dense(name) if model is None else model
    return Context(whole, tiny.module, tiny.config, data(name), **options)
