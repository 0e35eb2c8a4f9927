"""What the tests of the core share: tiny networks (prunebench/selection/tiny.py), plans, checks."""

import functools
import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from prunebench import models, tracks
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import plan_layers, plan_n_of_m, plan_weights, plan_widths
from prunebench.records import artefacts
from prunebench.selection.tiny import (  # noqa: F401
    INSTANCES,
    NAMES,
    PROMPTED,
    Texts,
    context,
    data,
    dense,
    inputs,
    output,
    sampler,
    sampling,
    settings,
)
from prunebench.selection.tiny import LABELS as CLASSES  # noqa: F401
from prunebench.tracks import methods
from prunebench.tracks.settings import parse
from prunebench.tracks.settings_benchmark import BenchmarkSettings

ROOT = Path(__file__).parents[1]
# One instance per architecture with classes, for what does not depend on the objective.
_BY_SHAPE = {
    str((i.family, i.config)): name
    for name, i in reversed(INSTANCES.items())
    if name not in PROMPTED
}
SHAPES = tuple(_BY_SHAPE.values())
# One instance per family and objective, for the tests that a further variant adds nothing to.
CORE = ("dit", "sit", "unet")


def plain(track: tracks.Track) -> dict:
    """The content of a track's file, as far as it says what is not the default; to be changed."""
    return json.loads(json.dumps(track.in_force))


def track(name: str, content: dict, given: dict[str, methods.Method]) -> tracks.Track:
    """A track of other settings, as they are: what sections ask of each other is not checked."""
    return tracks.Track(name, parse(BenchmarkSettings, content, f"track {name}"), given)


@functools.cache
def found_methods() -> dict[str, methods.Method]:
    """The shipped methods: those under version control, or all where there is none.

    A user's own file in `methods/` is tried by `prunebench check` and is none of the tests'
    business.
    """
    command = ("git", "-C", str(ROOT), "ls-files", "-z", "methods/*.py")
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0")[:-1] or sorted((ROOT / "methods").glob("*.py"))
    files = [ROOT / name for name in names]
    return {row.name: row for file in files if file.exists() for row in methods.read(file).rows}


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


def released(folder: Path) -> tuple[tracks.Track, Path]:
    """The smoke track with released weights for its transformer, which trains nothing; their file.

    The network's last layer is not zero, as that of a new DiT is.
    """
    file, model = folder / "model.safetensors", smoke().model("dit")
    network = models.family("dit").build(model.config)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in network.named_parameters()
    }
    artefacts.write_tensors(file, {**network.state_dict(), **state})
    content = plain(smoke())
    del content["models"]["dit"]["training"]
    content["models"]["dit"]["weights"] = {"file": str(file), "layout": "suite"}
    return track("released", content, smoke().methods), file


def job(stage: str, track, runs: Path, cell: tracks.Cell | None = None, **names):
    """A job of a stage, of a cell or of what `names` say."""
    from prunebench.stages.job import Job  # slow to import

    axes = tracks.as_dict(cell) if cell else {}
    names = {name: value for name, value in {**axes, **names}.items() if name != "track"}
    if "model" in names and "plan" not in names:
        names.setdefault("dense_seed", 0)
    return Job(stage, track, names, runs)


def run(stage: str, track, runs: Path, cell: tracks.Cell | None = None, **names) -> Path:
    """Run a stage as the command line does, but for guarding cells; returns its record."""
    module, _, name = tracks.stages.STAGES[stage].function.partition(":")
    made = job(stage, track, runs, cell, **names)
    getattr(importlib.import_module(module), name)(made)
    return made.record


def run_stages(track: tracks.Track, runs: Path, cell: tracks.Cell) -> tracks.Paths:
    """Everything of a cell between the dense model and its score."""
    recover = ("recover",) if cell.recovery != "none" else ()
    for stage in ("select", "cost", *recover, "sample"):
        run(stage, track, runs, cell)
    return tracks.Paths(track, cell, runs)
