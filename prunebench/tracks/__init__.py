"""Tracks: what is asked of the suite. Free of torch, because the Snakefile imports it."""

from collections.abc import Mapping
from pathlib import Path

from prunebench.errors import UserError
from prunebench.tracks import efficiency
from prunebench.tracks.benchmark import Track
from prunebench.tracks.cells import Cell, as_dict
from prunebench.tracks.checks import check_assets, check_methods, validate
from prunebench.tracks.files import read
from prunebench.tracks.layout import RUNS, Layout, Paths

__all__ = ["RUNS", "Cell", "Layout", "Paths", "Track", "as_dict", "load", "load_any"]


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
    return _checked(file, content)


def load_any(name: str):
    """Load a track of either kind: a `Track`, or one of `prunebench.efficiency.track`."""
    file, content = read(name)
    return (efficiency.checked if _is_efficiency(content) else _checked)(file, content)


def _checked(file: Path, content: Mapping) -> Track:
    validate(file, content)
    track = Track(file.stem, content, check_methods(file, content))
    check_assets(file, track)
    return track


def _is_efficiency(content: object) -> bool:
    return isinstance(content, Mapping) and content.get("kind") == "efficiency"
