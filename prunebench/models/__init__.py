"""Model families, one module each; a track names the module in `family`.

A family module offers `build(config)` and, for a model m with `m(x, t, y) -> prediction`:
`layers(m, granularity)`, `remove_layer(m, name)`, `widths(m)`, `weights(m)` and `refresh(m)`.
"""

import importlib
import pkgutil
from types import ModuleType

from prunebench.errors import UserError


def family_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(name: str) -> ModuleType:
    """The module of a family; an unknown name is a UserError that lists the known ones."""
    if name not in family_names():
        raise UserError(f"unknown model family '{name}'; known: {', '.join(family_names())}")
    return importlib.import_module(f"{__name__}.{name}")
