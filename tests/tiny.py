"""Tiny instances of every model family, which the tests of the core share.

A new family needs an entry in INSTANCES; tests/test_contract.py fails with its name until it has.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from prunebench import models, tracks
from prunebench.diffusion.objectives import FlowMatching, objective
from prunebench.diffusion.sampling import Sampler
from prunebench.models.conditions import CLASSES as BY_CLASS
from prunebench.models.conditions import Condition, Conditions
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import plan_layers, plan_n_of_m, plan_weights, plan_widths
from prunebench.selection.context import Context
from prunebench.tracks import methods
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

ROOT = Path(__file__).parents[1]
CLASSES = 10

_DIT = {"resolution": 8, "channels": 1, "patch": 2, "width": 32, "depth": 4, "heads": 4}
_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "classes": CLASSES,
}


_CROSS_ATTENTION = {
    **_UNET,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
_SDXL = {
    **{key: value for key, value in _CROSS_ATTENTION.items() if key != "classes"},
    "in_channels": 2,
    "out_channels": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


@dataclass(frozen=True)
class Texts:
    """What encoders might make of a prompt per class and, in the last row, of none."""

    shapes: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def _rows(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(4)
        shapes = self.shapes.items()
        return {n: torch.randn(CLASSES + 1, *shape, generator=generator) for n, shape in shapes}

    def of(self, labels: Tensor) -> dict[str, Tensor]:
        return {name: rows[labels] for name, rows in self._rows.items()}

    def nothing(self, asked: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {name: self._rows[name][CLASSES].expand_as(value) for name, value in asked.items()}


@dataclass(frozen=True)
class Instance:
    """One small model of a family with the objective it is for."""

    family: str
    config: dict
    objective: dict = field(default_factory=lambda: {"name": "noise"})
    image: tuple[int, int, int] | None = None  # its shape, where no key of the config holds it
    conditions: Conditions = BY_CLASS

    @property
    def module(self) -> ModuleType:
        return models.family(self.family)

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def resolution(self) -> int:
        return self.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        if self.image:
            return self.image
        side = self.config.get("resolution") or self.config["sample_size"]
        return self.config.get("channels") or self.config["in_channels"], side, side


INSTANCES = {
    "dit": Instance("dit", {**_DIT, "classes": CLASSES}),
    "dit_sigma": Instance("dit", {**_DIT, "channels": 3, "classes": CLASSES, "learn_sigma": True}),
    "sit": Instance("dit", {**_DIT, "classes": CLASSES}, {"name": "flow", "time_scale": 1000}),
    "uvit": Instance("uvit", {**_DIT, "classes": CLASSES}),
    "unet": Instance("unet", _UNET),
    "unet_attention": Instance(
        "unet",
        {
            **_UNET,
            "block_out_channels": [8, 32],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
    ),
    "ldm": Instance("conditional_unet", {**_CROSS_ATTENTION, "in_channels": 3, "out_channels": 3}),
    "sdxl": Instance(
        "conditional_unet",
        _SDXL,
        {"name": "noise", "beta_schedule": "scaled_linear"},
        conditions=Texts({"context": (3, 8), "pooled": (8,), "sizes": (6,)}),
    ),
    "flux": Instance(
        "flux",
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 8,
            "guidance_embeds": True,
            "axes_dims_rope": [2, 2, 4],
            "classes": CLASSES,
        },
        {"name": "flow"},
        image=(1, 8, 8),
    ),
}
NAMES = tuple(INSTANCES)
PROMPTED = tuple(name for name, i in INSTANCES.items() if isinstance(i.conditions, Texts))
# One instance per architecture with classes, for what does not depend on the objective.
_BY_SHAPE = {
    str((i.family, i.config)): name
    for name, i in reversed(INSTANCES.items())
    if name not in PROMPTED
}
SHAPES = tuple(_BY_SHAPE.values())
# One instance per family and objective, for the tests that a further variant adds nothing to.
CORE = ("dit", "sit", "unet")
SPARSITY = {"none": 0.0}  # of a plan kind; 0.25 for all others


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
    generator, instance = torch.Generator().manual_seed(1), INSTANCES[name]
    goal = objective(instance.objective)
    x = torch.randn(count, *instance.shape, generator=generator)
    y = instance.conditions.of(torch.arange(count) % CLASSES)
    return x, goal.model_time(goal.grid(count)), y


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    return model(*inputs(name))


def data(name: str, count: int = 64) -> loop.Data:
    """Images with something to learn: the class sets the brightness, noise sits on top."""
    generator, instance = torch.Generator().manual_seed(2), INSTANCES[name]
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 40, (count, *instance.shape), generator=generator)
    images = (labels * 20).view(-1, 1, 1, 1) + noise
    goal = objective(instance.objective)
    return loop.Data(images.to(torch.uint8), labels, goal, conditions=instance.conditions)


def sampler(name: str, model: nn.Module, steps: float = 1.0, **settings) -> Sampler:
    """Draws from `model` in the share `steps` of two steps, deterministically unless told else."""
    instance = INSTANCES[name]
    goal = objective(instance.objective)
    own = "euler" if isinstance(goal, FlowMatching) else "ddim"
    settings = {"sampler": own, "steps": 2, "lanes": 4, **settings}
    return Sampler(
        model, goal, instance.shape, CLASSES, settings, steps, conditions=instance.conditions
    )


def settings(**changes) -> loop.Settings:
    return loop.Settings(**{"batch": 8, "learning_rate": 2e-3, **changes})


def context(name: str, model: nn.Module | None = None, **changes) -> Context:
    options = {
        "sparsity": 0.25,
        "seed": 0,
        "method": "test",
        "meter": BudgetMeter(),
        "settings": settings(),
        **changes,
    }
    instance = INSTANCES[name]
    whole = dense(name) if model is None else model
    return Context(whole, instance.module, instance.config, data(name), **options)


@functools.cache
def found_methods() -> dict[str, methods.Method]:
    return methods.discover([ROOT / "methods"])


@functools.cache
def smoke() -> tracks.Track:
    """The smoke track, whose method parameters are small enough for tests too."""
    return tracks.load(str(ROOT / "config" / "smoke.yaml"))


def assert_same(left: dict, right: dict) -> None:
    """Two state dicts or mask dicts are equal to the last bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def assert_removed_layers_add_zero(name: str, granularity: str, silenced: Callable) -> None:
    """A model without a layer is, to the last bit, the one that `silenced(layer)` gives."""
    family, whole = INSTANCES[name].module, output(dense(name), name)
    for layer in family.layers(dense(name), granularity):
        model = silenced(layer.name)
        expected = output(model, name)
        assert (expected - whole).abs().max() > 1e-4, layer.name  # the layer did something
        family.remove_layer(model, layer.name)
        assert torch.equal(output(model, name), expected), layer.name


PLAN_KINDS = ("none", "block", "branch", "widths", "unstructured", "2:4", "steps")


def plan(name: str, kind: str, sparsity: float = 0.25) -> Plan:
    """A plan of each kind for a tiny instance; scores are pseudo-random."""
    model, family = dense(name), INSTANCES[name].module
    generator = torch.Generator().manual_seed(3)
    if kind in ("block", "branch"):
        layers = family.layers(model, kind)
        order = torch.randperm(len(layers), generator=generator)
        return plan_layers(model, [layers[i] for i in order], sparsity)
    if kind == "widths":
        units = family.widths(model)
        scores = {unit.name: torch.rand(unit.size, generator=generator) for unit in units}
        return plan_widths(model, units, scores, sparsity)
    scores = {n: model.get_parameter(n).detach().abs() for n in family.weights(model)}
    plans = {
        "none": Plan,
        "unstructured": lambda: plan_weights(model, scores, sparsity),
        "2:4": lambda: plan_n_of_m(scores, 2, 4),
        "steps": lambda: Plan(steps=0.5),
    }
    return plans[kind]()


def run_stages(track: tracks.Track, runs: Path, cell: tracks.Cell) -> tracks.Paths:
    """Everything of a cell between the dense model and its score."""
    from prunebench.stages import common as stages  # slow to import

    paths = tracks.Paths(track, cell, runs)
    stages.select(track, cell, paths)
    stages.measure(track, cell, paths)
    if cell.recovery != "none":
        stages.recover(track, cell, paths)
    stages.sample(track, cell, paths)
    return paths
