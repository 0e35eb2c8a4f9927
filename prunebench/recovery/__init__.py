"""Recoveries: how a pruned model is trained after selection, one module each, for every selection.

A recovery module offers `loss(teaching) -> Loss`, and TEACHER, which says whether it looks at
`teaching` at all; the training loop, the data and the budget are the same for all. The name of a
track's recovery is the module's name and a budget: "finetune-low".
Free of torch, because tracks name recoveries and are read without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from prunebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


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


SHARED = ("distillation",)  # modules of this package that are no recovery


def recovery_names() -> list[str]:
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(names - set(SHARED))


def recovery(name: str) -> ModuleType:
    """The module of a recovery; an unknown name is a UserError that lists the known ones."""
    if name not in recovery_names():
        raise UserError(f"unknown recovery '{name}'; known: {', '.join(recovery_names())}")
    return importlib.import_module(f"{__name__}.{name}")
