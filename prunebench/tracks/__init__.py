"""Tracks: what is asked of the suite. Free of torch, because the Snakefile imports it."""

from collections.abc import Mapping
from pathlib import Path

from prunebench.errors import UserError
from prunebench.tracks import efficiency
from prunebench.tracks.benchmark import Track
from prunebench.tracks.cells import Cell, as_dict
from prunebench.tracks.checks import check, check_methods, found_methods, take_published
from prunebench.tracks.files import claim, read
from prunebench.tracks.layout import RUNS, Layout, Paths
from prunebench.tracks.settings import parse, plain
from prunebench.tracks.settings_benchmark import BenchmarkSettings

__all__ = [
    "RUNS",
    "Cell",
    "Layout",
    "Paths",
    "Track",
    "as_dict",
    "checked",
    "claim",
    "load",
    "load_any",
    "plain",
]


def load(name: str) -> Track:
    """Load `config/<name>.yaml`, or the YAML file `name`, and check everything that can be checked.

    Raises:
        UserError: the track is unknown or of another kind, a key is unknown or wrong, or a method
            breaks its contract.
    """
    file, content = read(name)
    if _is_efficiency(content):
        raise UserError(
            f"{file} is an efficiency track, which measures costs only and has no cells: its "
            f"commands are `snakemake --config track={name}`, `prunebench efficiency` and "
            f"`prunebench leaderboard`; records and logs lie in {RUNS}/{file.stem}"
        )
    return checked(file, content)


def load_any(name: str):
    """Load a track of either kind: a `Track`, or one of `prunebench.tracks.efficiency`."""
    file, content = read(name)
    return (efficiency.checked if _is_efficiency(content) else checked)(file, content)


def checked(file: Path, content: object) -> Track:
    """The benchmark track that a file's content makes; errors as `load`."""
    if isinstance(content, Mapping) and "plans" in content:
        raise UserError(f"{file}: kind: this key is missing; an efficiency track has `efficiency`")
    settings = parse(BenchmarkSettings, content, file)
    models = {
        name: take_published(file, f"models.{name}", model)
        for name, model in settings.models.items()
    }
    settings = settings.model_copy(update={"models": models})
    check(file, settings)
    there = found_methods(file, settings)
    named = check_methods(file, settings, there)
    methods = {name: there.methods[name] for name in named}
    return Track(file.stem, settings, methods, tuple(there.warnings()))


def _is_efficiency(content: object) -> bool:
    return isinstance(content, Mapping) and content.get("kind", "benchmark") != "benchmark"
