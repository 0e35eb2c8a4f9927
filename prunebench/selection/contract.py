"""The contract of a method, as rules that are tried on tiny networks of every family it claims.

`prunebench check FILE` prints one line per rule; the suite's tests run the same rules over every
shipped method.
"""

import copy
import functools
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from prunebench.errors import CellError, UserError
from prunebench.models.units import Width
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection import checks, tiny
from prunebench.selection.context import Context, unmetered
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

TRAIN_IMAGES = 32  # that a method may train on
RECOVERY_IMAGES = 80
DRAWN = 4


class Method(Protocol):
    """What the contract needs to know of a method; `prunebench.tracks.methods.Method` is one."""

    name: str
    kind: str
    steps: float | None
    trains: bool
    recovery: str
    updates: str
    families: Sequence[str]
    sparsities: Sequence[float]
    needs_classes: bool
    check: Mapping[str, object]


@dataclass(frozen=True)
class Finding:
    """One rule and what came of it.

    `tried` are the tiny networks it was tried on, `problem` what is wrong on the first of `broken`.
    """

    rule: str
    tried: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    problem: str = ""


class Trial:
    """A method on one tiny network, run as often as the rules ask."""

    def __init__(self, method: Method, function: checks.Select, name: str):
        self.method, self.function, self.name = method, function, name
        self.tiny, self.family = tiny.INSTANCES[name], tiny.INSTANCES[name].module
        self.sparsity = sparsity(method)

    def context(self, seed: int = 0, train_images: int | None = None, **changes: object) -> Context:
        images = TRAIN_IMAGES if self.method.trains else 0
        return tiny.context(
            self.name,
            sparsity=self.sparsity,
            seed=seed,
            method=self.method.name,
            train_images=images if train_images is None else train_images,
            **changes,
        )

    def select(self, **changes: object) -> tuple[Plan, nn.Module]:
        """What selection makes of the method: a plan and a pruned model, checked."""
        context = self.context(**changes)
        method = self.method
        asked = (method.kind, method.check, method.steps, method.updates)
        return checks.select(context, self.function, *asked)

    def solved(self) -> set[str]:
        """Weights that the method may solve for in closed form."""
        if not self.method.updates:
            return set()
        return checks.solved(self.first.plan, self.family.widths(tiny.dense(self.name)))

    @functools.cached_property
    def first(self) -> "First":
        """The method called once, by itself, while everything it does is watched."""
        model, meter, before = tiny.dense(self.name), BudgetMeter(), _process()
        context = self.context(model=model, meter=meter)
        with counting(model, self.family) as counts:
            plan, own = checks.returned(self.function, context, self.method.check)
        changed = [name for name, value in _process().items() if value != before[name]]
        return First(context, model, plan, own, meter, counts, changed)

    @functools.cached_property
    def pruned(self) -> nn.Module:
        """The plan of `first` applied to the dense network."""
        return surgery.apply(tiny.dense(self.name), self.first.plan, self.family)

    @functools.cached_property
    def kept(self) -> nn.Module:
        """What goes on to recovery: the method's own model, or the pruned one."""
        own = self.first.own
        return (self.pruned if own is None else unmetered(own)).eval()

    @functools.cached_property
    def again(self) -> tuple[Plan, nn.Module]:
        """Seed 0 by way of the whole selection, behind another seed."""
        return [self.select(seed=seed) for seed in (1, 0)][-1]


@dataclass(frozen=True)
class First:
    """What one call of a method left."""

    context: Context
    model: nn.Module  # the dense one that the context was given
    plan: Plan
    own: nn.Module | None
    meter: BudgetMeter
    counts: Counter
    changed: list[str]  # of the process


def sparsity(method: Method) -> float:
    """What a method is tried at."""
    return method.sparsities[0] if method.sparsities else {"none": 0.0}.get(method.kind, 0.25)


def instances(method: Method) -> list[str]:
    """The tiny networks that a method claims to prune."""
    return [
        name
        for name, entry in tiny.INSTANCES.items()
        if not method.families or entry.family in method.families
        if not method.needs_classes or name not in tiny.PROMPTED
    ]


def examine(
    method: Method, function: checks.Select, names: Sequence[str] | None = None
) -> list[Finding]:
    """Try every rule on every tiny network; of one network, none behind a rule that it breaks.

    Args:
        function: the method's `select`.
        names: of tiny networks; default: of all that the method claims.
    """
    tried: dict[str, list[str]] = {rule.text: [] for rule in RULES}
    broken: dict[str, dict[str, str]] = {rule.text: {} for rule in RULES}
    for name in instances(method) if names is None else names:
        trial = Trial(method, function, name)
        for rule in RULES:
            if rule.concerns(method):
                tried[rule.text].append(name)
                if problem := _problem(rule, trial):
                    broken[rule.text][name] = problem
                    break
    return [
        Finding(text, tuple(tried[text]), tuple(found), next(iter(found.values()), ""))
        for text, found in broken.items()
    ]


def _problem(rule: "Rule", trial: Trial) -> str:
    try:
        rule.holds(trial)
    except (AssertionError, CellError, UserError) as error:
        return str(error) or type(error).__name__
    return ""


# ---- the rules, in the order they are tried


def _returns(trial: Trial) -> None:
    assert trial.first.plan is not None


def _is_of_its_kind(trial: Trial) -> None:
    checks.check_kind(trial.first.plan, trial.method.kind)
    checks.check_record(trial.first.plan)


def _leaves_a_network(trial: Trial) -> None:
    output = tiny.output(trial.pruned, trial.name)
    assert output.shape == tiny.output(tiny.dense(trial.name), trial.name).shape
    assert output.isfinite().all(), "what the plan leaves gives values that are not finite"


def _meets_its_target(trial: Trial) -> None:
    """Within one unit, counted here from the tensors and not from what a plan says."""
    plan, whole, family = trial.first.plan, tiny.dense(trial.name), trial.family
    checks.check_steps(plan, trial.sparsity, trial.method.steps)
    if plan.pattern == targets.UNIFORM:
        targets.check_uniform(plan, family.widths(whole), trial.sparsity)
        return
    masked = sum(int((~mask).sum()) for mask in plan.masks.values())
    if plan.pattern not in (None, "unstructured"):
        left = {n: trial.pruned.get_parameter(n).shape for n in family.weights(trial.pruned)}
        targets.check_n_of_m(plan, left)
        masked = 0
    used = [kind for kind in _used(plan) if kind != "weights" or masked]
    alone = trial.method.steps is None or bool(plan.masks)
    if not used and alone and trial.method.kind != "none":
        return  # steps, or a pattern, alone
    total = _size(whole)
    reached = (total - _size(trial.pruned) + masked) / total
    unit = sum(_largest_unit(kind, whole, family, plan) for kind in used) / total
    assert abs(reached - trial.sparsity) <= unit + 1e-9, (
        f"the plan removes {reached:.4f} of the parameters; the target is {trial.sparsity} and one "
        f"unit is {unit:.4f}"
    )


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _used(plan: Plan) -> list[str]:
    """The kinds of units that a plan removes."""
    there = {"layers": plan.layers or plan.copies, "widths": plan.kept, "weights": plan.masks}
    return [kind for kind, units in there.items() if units]


def _largest_unit(kind: str, whole: nn.Module, family: object, plan: Plan) -> int:
    units = {
        "weights": lambda: [1],
        "layers": lambda: [layer.parameters for layer in targets.layers_of(whole, family, plan)],
        "widths": lambda: [_one_round(whole, unit) for unit in family.widths(whole)],
    }
    return max(units[kind]())


def _one_round(model: nn.Module, unit: Width) -> int:
    """Parameters that one channel of every normalisation group takes with it."""
    shapes = [(m, model.get_parameter(m.tensor).shape) for m in unit.members]
    return sum(unit.groups * m.index.shape[1] * s.numel() // s[m.axis] for m, s in shapes)


def _fits_its_plan(trial: Trial) -> None:
    if trial.first.own is not None:
        checks.check_shapes(trial.kept, trial.pruned)
        checks.check_masks(trial.kept, trial.first.plan)
        checks.check_trained(trial.first.context, trial.kept, trial.pruned, trial.solved())


def _is_metered(trial: Trial) -> None:
    meter, counts = trial.first.meter.counts, trial.first.counts
    for way, metered in (
        ("forward", meter["student_forward"] + meter["teacher_forward"]),
        ("backward", meter["student_backward"]),
    ):
        assert metered == counts[way], (
            f"{counts[way] - metered} of {counts[way]} images went {way} past the meter: pass them "
            "through context.model, copies of it, context.teacher() or context.fresh()"
        )


def _touches_nothing_else(trial: Trial) -> None:
    _assert_same(trial.first.model.state_dict(), tiny.dense(trial.name).state_dict(),
                 "the dense model was changed: work on a copy of context.model")  # fmt: skip
    assert not trial.first.changed, (
        f"it changed {' and '.join(trial.first.changed)} of the process; all randomness comes from "
        "context.generator()"
    )


def _repeats_itself(trial: Trial) -> None:
    (plan, model), first = trial.again, trial.first
    if first.context.clocked:  # a clock repeats nothing; the table is in the notes
        return
    same = first.plan.to_json() == plan.to_json() and all(
        torch.equal(mask, plan.masks[name]) for name, mask in first.plan.masks.items()
    )
    assert same, (
        f"{trial.method.name} gave two plans for one seed: it keeps state between calls, or draws "
        "from a generator that is not context.generator()"
    )
    _assert_same(trial.kept.state_dict(), model.state_dict(),
                 "it gave two models for one seed and one plan")  # fmt: skip


def _keeps_weights(trial: Trial) -> None:
    """What a method leaves untrained is the dense model, to the bit."""
    plan, model = trial.again
    if trial.method.trains:
        plan, model = trial.select(train_images=0)
    kept, solved = surgery.apply(tiny.dense(trial.name), plan, trial.family), trial.solved()
    states = [network.state_dict() for network in (model, kept)]
    untouched = [{n: v for n, v in state.items() if n not in solved} for state in states]
    _assert_same(*untouched, "weights that it did not train are not the dense model's")


def _recovers(trial: Trial) -> None:
    data, model = tiny.data(trial.name), copy.deepcopy(trial.kept)
    batch = data.draw(64, torch.Generator().manual_seed(5), torch.device("cpu"))
    before = _loss(model, batch)
    loop.train(
        model,
        data,
        tiny.settings(),
        images=RECOVERY_IMAGES,
        seed=0,
        muon_names=trial.family.weights(model),
        masks=trial.first.plan.masks,
    )
    after = _loss(model, batch)
    assert after < before, f"training raised the loss from {before:.4f} to {after:.4f}"


@torch.no_grad()
def _loss(model: nn.Module, batch: loop.Batch) -> float:
    return loop.own_loss(model, batch).item()


def _loads_without_the_method(trial: Trial) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, entry = Path(folder), trial.tiny
        surgery.save(place, trial.kept, trial.first.plan, entry.family, entry.config)
        model, plan = surgery.load(place)
    assert plan.to_json() == trial.first.plan.to_json(), "the plan came back changed"
    _assert_same(dict(trial.again[0].masks), dict(plan.masks), "masks came back changed")
    _assert_same(trial.kept.state_dict(), model.state_dict(), "weights came back changed")
    for name, mask in plan.masks.items():
        assert not model.get_parameter(name)[~mask].any(), f"'{name}' came back where masked"
    drawn, redrawn = (
        next(tiny.sampler(trial.name, network, plan.steps).images(0, 0, DRAWN, DRAWN))
        for network in (trial.kept, model)
    )
    assert torch.equal(drawn, redrawn), "it draws other images than before it was saved"


@dataclass(frozen=True)
class Rule:
    """A sentence about a method; `holds` raises where it is not true of a trial."""

    text: str
    holds: Callable[[Trial], None]
    concerns: Callable[[Method], bool] = lambda method: True


RULES = (
    Rule("select runs and returns a Plan, or a Plan and a model", _returns),
    Rule("the plan removes what KIND says and nothing else, as plain values", _is_of_its_kind),
    Rule("the plan names units that exist, and what it leaves runs", _leaves_a_network),
    Rule("the target is met within one unit", _meets_its_target),
    Rule("a returned model fits its plan and was trained by context.train only", _fits_its_plan),
    Rule("every image that passes through a model is metered", _is_metered),
    Rule("the dense model and the process are left as they were", _touches_nothing_else),
    Rule("a seed gives one plan and one model, whatever ran before", _repeats_itself),
    Rule(
        "weights that are not trained are the dense model's",
        _keeps_weights,
        lambda method: method.recovery != "required",
    ),
    Rule(
        "recovery lowers the loss",
        _recovers,
        lambda method: method.recovery != "never",
    ),
    Rule("saved and loaded without the method, it draws equal images", _loads_without_the_method),
)


def _assert_same(left: Mapping, right: Mapping, problem: str) -> None:
    """Two state dicts or mask dicts are equal to the last bit."""
    for name in {**left, **right}:
        same = name in left and name in right and torch.equal(left[name], right[name])
        assert same, f"{problem}: '{name}' differs"


# ---- watching a call


def _process() -> dict[str, object]:
    """What of the process a method has to leave alone, by what it is called."""
    return {
        "torch's global generator": torch.random.get_rng_state().numpy().tobytes(),
        "numpy's global generator": str(np.random.get_state()),
        "python's global generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "whether gradients are on": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
    }


@contextmanager
def counting(model: nn.Module, family: object) -> Iterator[Counter]:
    """Count rows through every forward and backward of a class, whichever copy they take."""
    counts, kind, forward, widths = Counter(), type(model), type(model).forward, family.widths

    def counted(self, x, t, y):
        counts["forward"] += len(x) * (x.device.type != "meta")  # counting MACs moves no image
        return _Spy.apply(forward(self, x, t, y), counts, len(x))

    def untraced(model):
        """Finding widths may trace a forward pass on zeros, which is no pass of the method's."""
        before = dict(counts)
        units = widths(model)
        counts.clear()
        counts.update(before)
        return units

    kind.forward, family.widths = counted, untraced
    try:
        yield counts
    finally:
        kind.forward, family.widths = forward, widths


class _Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, counts, rows):
        ctx.counts, ctx.rows = counts, rows
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.counts["backward"] += ctx.rows
        return grad, None, None
