"""Recoveries: how a pruned model is healed, one module each, usable with every selection.

A recovery module offers `loss(teacher) -> Loss`; the training loop, the data and the budget are the
same for all. The name of a track's recovery is the module's name and a budget: "finetune-low".
"""

import importlib
import pkgutil
from types import ModuleType

from prunebench.errors import UserError


def recovery_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recovery(name: str) -> ModuleType:
    """The module of a recovery; an unknown name is a UserError that lists the known ones."""
    if name not in recovery_names():
        raise UserError(f"unknown recovery '{name}'; known: {', '.join(recovery_names())}")
    return importlib.import_module(f"{__name__}.{name}")
