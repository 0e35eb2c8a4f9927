"""`prunebench assets list|fetch|verify`."""

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

from prunebench import tracks
from prunebench.assets import fetch, store
from prunebench.assets.registry import ASSETS, Asset, asset
from prunebench.errors import UserError
from prunebench.records import schema, sealed
from prunebench.records.parts import Identity
from prunebench.runtime import resources
from prunebench.stages.job import Job

TITLES = ("NAME", "KIND", "SIZE", "STATE", "LICENCE", "TRACKS")


def assets(job: Job) -> None:
    """Do what the job names as its "action", list, fetch or verify, to its "assets".

    Where it is of a track, that track's assets are meant too; "record" is a file for their hashes.
    """
    named = [*job.names["assets"], *(job.track.assets() if job.track else ())]
    action = job.names["action"]
    if action == "fetch":
        if not (named or job.track):
            raise UserError("assets fetch: name assets, or a track with --track")
        fetch_assets(named, job.names.get("record"), job.track.name if job.track else "none")
    else:
        {"list": list_assets, "verify": verify_assets}[action](named)


def list_assets(names: Iterable[str]) -> None:
    """Print a line per asset; what is there is not verified."""
    readers = _readers()
    rows = [TITLES] + [
        (w.name, w.kind, readable(w.size), state(w), w.licence, ", ".join(readers.get(w.name, ())))
        for w in _wanted(names)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _readers() -> dict[str, list[str]]:
    """Asset -> the tracks of config/ that read it, or what it serves as or is converted to."""
    readers: dict[str, list[str]] = {}
    for file in sorted(resources.listed("config/*.yaml")):
        with contextlib.suppress(UserError):  # a track that is being written stops no list
            needed = tracks.load_any(file.stem).assets()
            for name in {way.name for entry in needed for way in _ways(asset(entry))}:
                readers.setdefault(name, []).append(file.stem)
    return readers


def fetch_assets(names: Iterable[str], record: Path | None = None, track: str = "none") -> None:
    """Fetch every asset, however many fail; then write the hash of each file to `record`.

    Args:
        track: which track asks for them, if any.

    Raises:
        UserError: says of every asset that failed what to do.
    """
    failures = []
    for wanted in map(asset, names):
        try:
            path = fetch.fetch(wanted.name)
            sys.stdout.write(f"{wanted.name:22} {path}\n")
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))
    if record:
        hashes = {name: store.hashes(asset(name)) for name in names}
        identity = Identity(stage="assets", track=track)
        sealed.write(record, schema.Assets(identity=identity, assets=hashes))


def verify_assets(names: Iterable[str]) -> None:
    """Verify what is there, and with names that they are there.

    Raises:
        UserError: a file is not the expected one; or a named asset is missing.
    """
    names, failures = list(names), []
    for wanted in _wanted(names):
        if not names and not store.present(wanted):
            continue
        try:
            path = store.locate(wanted.name)
            sys.stdout.write(f"ok       {wanted.name:22} {path}\n")
        except UserError as error:
            sys.stdout.write(f"NOT OK   {wanted.name}\n")
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))


def _wanted(names: Iterable[str]) -> list[Asset]:
    return list(map(asset, names)) or list(ASSETS.values())


def state(wanted: Asset) -> str:
    """Where an asset is, or how it would be had."""
    if store.present(wanted):
        root = store.root_of(wanted, wanted.files[0])
        named = {store.cache_folder(): "in the cache", store.DATA: "packaged"}
        return named.get(root, "in the mirror")
    if any(way.downloadable or store.present(way) for way in _ways(wanted)):
        return "to fetch"
    return "by hand"


def _ways(wanted: Asset) -> list[Asset]:
    """The asset, and what serves as well or is converted to it."""
    return [wanted, *map(asset, (*wanted.alternatives, *(wanted.made_from or ())))]


def readable(size: int | None) -> str:
    """Bytes with a decimal unit; "?" if the size is not known."""
    if size is None:
        return "?"
    power = min(len(f"{size}") - 1, 9) // 3
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
