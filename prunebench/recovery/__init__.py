"""Recoveries: what a pruned model is trained towards, one module each, for every selection.

The training loop, the data and the budget are the same for all: a recovery is its loss
(`Recovery`). The name of a track's recovery is the module's name and a budget: "finetune-low".
Free of torch, because tracks name recoveries and are read without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from prunebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunebench.training.loop import Loss


@dataclass(frozen=True)
class Teaching:
    """What a student can learn from.

    Attributes:
        teacher: the dense model: frozen, in evaluation mode, its passes metered as a teacher's.
        kept: the modules whose outputs compare (the family's `features`), by name; for each the
            channels of the teacher's output that the student still has, int64 [kept], None: all.
    """

    teacher: nn.Module
    kept: Mapping[str, Tensor | None]


@runtime_checkable
class Recovery(Protocol):
    """What a recovery's module offers.

    Attributes:
        TEACHER: whether the loss looks at the dense model; without one none is loaded, and
            `teaching` is None.
    """

    TEACHER: bool

    def loss(self, teaching: Teaching | None) -> Loss:
        """The loss of one batch: (model, batch) -> [], a mean over the batch.

        It is called on parts of a batch too, where memory is short. What it remembers between
        calls is lost when an interrupted training goes on. `prunebench.recovery.distillation`
        holds what losses with a teacher share; whatever passes through `teaching.teacher` is
        counted as the teacher's.
        """


SHARED = ("distillation",)  # modules of this package that are no recovery


def recovery_names() -> list[str]:
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(names - set(SHARED))


def recovery(name: str) -> Recovery:
    """The module of a recovery.

    Raises:
        UserError: an unknown name, with the known ones; or a module that is not a `Recovery`.
    """
    if name not in recovery_names():
        raise UserError(f"unknown recovery '{name}'; known: {', '.join(recovery_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    if not isinstance(module, Recovery):
        raise UserError(f"{module.__file__}: a recovery has TEACHER and loss(teaching)")
    return module
