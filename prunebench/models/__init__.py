"""Model families, one module each; a track names the module in `family`.

A family module offers `build(config)` and, for a model m with `m(x, t, y) -> prediction`:
`layers(m, granularity)`, `remove_layer(m, name)`, `widths(m)`, `weights(m)`, `features(m)` and
`refresh(m)`. Where the authors' checkpoints differ from its own state dicts, `LAYOUTS` says how
(prunebench/models/official.py). `<family>.yaml` beside it is the table of published configurations.

`config["classes"]` is the number of classes, and m.null_class the label of "no class"; a model
without classes has None for both.

`features(m)` names the modules whose outputs (or their first elements) distillation compares, in
pruned models too. Each goes with the parameter whose axis 0 holds the channels (axis 1) of that
output, or None where pruning never changes its width.
"""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import yaml

from prunebench.errors import UserError


@dataclass(frozen=True)
class Published:
    """A configuration that the authors of a family published.

    `objective` is what the network was trained for, as in a track; `layout` how its checkpoint is
    stored, and `checkpoint` where (repository and file). `parameters` counts the elements of the
    state dict, fixed position tables included; multiply-accumulates are those of one forward pass
    at batch 1. `stated` is what the authors or their papers print, to compare.
    """

    title: str
    config: dict
    objective: dict
    layout: str
    checkpoint: str
    parameters: int
    macs: int
    macs_without_attention_products: int
    stated: str = ""


# Modules of this package that are no family.
SHARED = ("activations", "conditions", "copies", "official", "precision", "units")


def family_names() -> list[str]:
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(names - set(SHARED))


def family(name: str) -> ModuleType:
    """The module of a family; an unknown name is a UserError that lists the known ones."""
    if name not in family_names():
        raise UserError(f"unknown model family '{name}'; known: {', '.join(family_names())}")
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def published(family_name: str) -> dict[str, Published]:
    """The published configurations of a family by name; free of torch."""
    file = Path(__file__).with_name(f"{family_name}.yaml")
    table = yaml.safe_load(file.read_text()) if file.exists() else {}
    return {name: Published(**entry) for name, entry in table.items()}
