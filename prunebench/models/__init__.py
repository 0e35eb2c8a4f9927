"""Model families, a module each; a track names one in `family`.

`family.py` is the interface that such a module has, `configs/` what planning knows of every family
without torch: what a track may set, and tiny instances. `<family>.yaml` is the table of published
configurations. Everything else here is shared by families.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import yaml

from prunebench.errors import UserError
from prunebench.models import configs
from prunebench.models.configs import Config, Instance, Takes
from prunebench.models.family import Family

__all__ = [
    "Config",
    "Family",
    "Instance",
    "Published",
    "Takes",
    "config",
    "family",
    "family_names",
    "instances",
    "published",
    "takes",
]
_FUNCTIONS = (
    "build",
    "layers",
    "remove_layer",
    "copy_layer",
    "widths",
    "weights",
    "features",
    "refresh",
)


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


def family_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def family(name: str) -> Family:
    """The module of a family.

    Raises:
        UserError: an unknown name, with the known ones; or a module that lacks a function.
    """
    _check_name(name)
    module = importlib.import_module(f"{__name__}.{name}")
    if not isinstance(module, Family):
        lacking = sorted(n for n in _FUNCTIONS if not hasattr(module, n))
        raise UserError(f"{module.__file__}: a family needs the function {lacking[0]}")
    return module


def config(name: str) -> type[Config]:
    """What the settings of a family's networks may be, a pydantic model; free of torch."""
    return _settings(name).Config


def takes(family_name: str, settings: Mapping) -> Takes:
    """What a network of these settings takes; free of torch."""
    return config(family_name).model_validate(settings, strict=False).takes()


def instances() -> dict[str, Instance]:
    """The tiny instances of all families by name; free of torch."""
    return {
        name: instance
        for family_name in family_names()
        for name, instance in _settings(family_name).TINY.items()
    }


def _settings(name: str) -> ModuleType:
    _check_name(name)
    return importlib.import_module(f"{configs.__name__}.{name}")


def _check_name(name: str) -> None:
    if name not in family_names():
        raise UserError(f"unknown model family '{name}'; known: {', '.join(family_names())}")


@functools.cache
def published(family_name: str) -> dict[str, Published]:
    """The published configurations of a family by name; free of torch."""
    file = Path(__file__).with_name(f"{family_name}.yaml")
    table = yaml.safe_load(file.read_text()) if file.exists() else {}
    return {name: Published(**entry) for name, entry in table.items()}
