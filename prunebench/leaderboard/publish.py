"""A board's folder: replaced as a whole, and nothing removed that no earlier build wrote."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from prunebench.errors import UserError
from prunebench.records.artefacts import (
    forget_abandoned,
    temporary_name,
    write_atomically,
    write_json,
)

MANIFEST = "manifest.json"  # the names of what the last build wrote


def publish(out: Path, files: Mapping[str, bytes]) -> None:
    """Put `files` (path inside -> content) into `out`, and take out what an earlier build left.

    Everything is written into a temporary folder beside them first, so that a full disk leaves the
    old board as it was.

    Raises:
        UserError: the folder can't be written.
    """
    out = Path(out)
    stale = sorted(_listed(out) - set(files))
    try:
        out.mkdir(parents=True, exist_ok=True)
        forget_abandoned(out / "board")
        building = out / temporary_name("board")
        building.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        for name, content in files.items():
            write_atomically(
                building / name, lambda path, content=content: path.write_bytes(content)
            )
        write_json(building / MANIFEST, {"files": sorted(files)})
        _swap(building, out, [*files, MANIFEST], stale)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _swap(building: Path, out: Path, names: list[str], stale: list[str]) -> None:
    try:
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).replace(out / name)
        for name in stale:
            (out / name).unlink(missing_ok=True)
            _remove_empty((out / name).parent, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; run the same command again") from error


def _listed(out: Path) -> set[str]:
    """What the last build wrote, as its manifest says; nothing where there is none."""
    try:
        names = json.loads((out / MANIFEST).read_text())["files"]
        return {name for name in names if _inside(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name not in ("", MANIFEST)


def _remove_empty(folder: Path, out: Path) -> None:
    """Remove the folders that a removed record leaves empty."""
    while folder != out and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
