"""Model families, one module each; a track names the module in `family`.

A family module offers `build(config)` and, for a model m with `m(x, t, y) -> prediction`:
`layers(m, granularity)`, `remove_layer(m, name)`, `widths(m)`, `weights(m)`, `features(m)` and
`refresh(m)`.

`config["classes"]` is the number of classes, and m.null_class the label of "no class"; a model
without classes has None for both.

`features(m)` names the modules whose outputs (or their first elements) distillation compares, in
pruned models too. Each goes with the parameter whose axis 0 holds the channels (axis 1) of that
output, or None where pruning never changes its width.
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
