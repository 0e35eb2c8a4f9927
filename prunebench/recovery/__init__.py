"""Recoveries: what a pruned model is trained towards, one module each, for every selection.

The training loop, the data and the budget are the same for all: a recovery is its loss
(`Recovery`). The name of a track's recovery is the module's name and a budget, "finetune-low"; or a
name of the track's own, which stands for modules with other parameters, one after the other.
Free of torch, because tracks name recoveries and are read without it: what planning knows of a
module (`Entry`) is read without running it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from prunebench.errors import UserError
from prunebench.runtime.syntax import keyword_defaults

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunebench.diffusion.objectives import Objective
    from prunebench.diffusion.options import Options
    from prunebench.models.conditions import Conditions
    from prunebench.training.loop import Loss


@dataclass(frozen=True)
class Sampling:
    """How the track samples a teacher; `guidance` 1 is none."""

    sampler: str
    steps: int
    options: Options
    guidance: float = 1.0


@dataclass(frozen=True)
class Teaching:
    """What a student can learn from.

    Attributes:
        teacher: the dense model, or in a further halving of the steps the student as it was then:
            frozen, in evaluation mode, its passes metered as a teacher's.
        kept: the modules whose outputs compare (the family's `features`), by name; for each the
            channels of the teacher's output that the student still has, int64 [kept], None: all.
        conditions: what makes of a batch's `y` the condition that asks for nothing.
        objective: what the teacher predicts; the student's is the batch's.
        sampling: how the track samples the teacher.
    """

    teacher: nn.Module
    kept: Mapping[str, Tensor | None]
    conditions: Conditions | None = None
    objective: Objective | None = None
    sampling: Sampling | None = None


@runtime_checkable
class Recovery(Protocol):
    """What a recovery's module offers; its constants are literals (see `Entry`)."""

    TEACHER: bool

    def loss(self, teaching: Teaching | None, **parameters: object) -> Loss:
        """The loss of one batch: (model, batch) -> [], a mean over the batch.

        Parameters have literal defaults, which a track can overrule. The loss is called on parts
        of a batch too, where memory is short. What it remembers between calls is lost when an
        interrupted training goes on; what it draws, it draws in a `loop.Drawing`.
        `prunebench.recovery.distillation` holds what losses with a teacher share; whatever passes
        through `teaching.teacher` is counted as the teacher's.
        """


SHARED = ("distillation", "folding", "guidance")  # modules of this package that are no recovery


@dataclass(frozen=True)
class Entry:
    """What planning knows of a recovery's module, by its literal constants.

    Attributes:
        teacher: TEACHER, whether the loss looks at the dense model; without one none is loaded,
            and `teaching` is None.
        guides: GUIDES, whether it asks models for nothing, as guidance does.
        folds: FOLDS, whether the student samples in fewer steps afterwards: one where the teacher
            takes `fold`, a parameter of the module.
        predicts: PREDICTS, what the network predicts afterwards; "": what it did before.
        bounded: BOUNDED, whether it compares images as networks imply them, so that these may not
            predict noise: where hardly any image is left, its error in them has no bound.
        parameters: keyword parameters of `loss` with their defaults.
    """

    name: str
    file: Path
    teacher: bool = False
    guides: bool = False
    folds: bool = False
    predicts: str = ""
    bounded: bool = False
    parameters: Mapping[str, object] = field(default_factory=dict)


def recovery_names() -> list[str]:
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(names - set(SHARED))


def recovery(name: str) -> Recovery:
    """The module of a recovery.

    Raises:
        UserError: an unknown name, with the known ones; or a module that is not a `Recovery`.
    """
    _check_known(name)
    module = importlib.import_module(f"{__name__}.{name}")
    if not isinstance(module, Recovery):
        raise UserError(f"{module.__file__}: a recovery has TEACHER and loss(teaching)")
    return module


@functools.cache
def entry(name: str) -> Entry:
    """What planning knows of a recovery; nothing of it is run.

    Raises:
        UserError: an unknown name; or a constant or a parameter that is no literal.
    """
    _check_known(name)
    file = Path(importlib.util.find_spec(f"{__name__}.{name}").origin)
    tree = ast.parse(file.read_text(), filename=str(file))
    known = set(Entry.__dataclass_fields__) - {"name", "file", "parameters"}
    constants = {
        target.id.lower(): _literal(file, node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.lower() in known and target.id.isupper()
    }
    return Entry(name, file, **constants, parameters=_parameters(file, tree.body))


def _check_known(name: str) -> None:
    if name not in recovery_names():
        raise UserError(f"unknown recovery '{name}'; known: {', '.join(recovery_names())}")


def _parameters(file: Path, body: Iterable[ast.stmt]) -> dict[str, object]:
    """The parameters of `loss` after the first, with their defaults."""
    losses = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "loss"]
    if not losses:
        raise UserError(f"{file}: a recovery has TEACHER and loss(teaching)")
    if (defaults := keyword_defaults(losses[0])) is None:
        raise UserError(f"{file}: every parameter of loss but the teaching needs a default")
    return {name: _literal(file, default) for name, default in defaults.items()}


def _literal(file: Path, node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(
            f"{file} line {node.lineno}: constants and defaults of a recovery must be literals, "
            "because planning reads them without running the file"
        ) from None
