"""Fetching an asset: what is not there yet is downloaded, recorded or converted."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from prunebench.assets import store
from prunebench.assets.download import discard, download, finish, part_of
from prunebench.assets.registry import Asset, asset
from prunebench.errors import UserError
from prunebench.records.artefacts import sha256

log = logging.getLogger(__name__)


def fetch(name: str, mirror: Path | None = None) -> Path:
    """Path of the asset's verified file or folder; downloads and converts what is not there yet.

    Raises:
        UserError: the asset must be placed by hand, no source gave it, what is there is corrupt, or
            the cache cannot be written. Says what to do; nothing unverified is left under its name.
    """
    wanted = asset(name)
    chosen = _candidate(wanted, mirror)
    if wanted.made_from and not store.present(wanted, mirror):
        _convert(wanted, mirror)
    elif chosen is None and not any(store.root_of(wanted, file, mirror) for file in wanted.files):
        raise UserError(f"asset {name} cannot be downloaded. {store.by_hand(wanted, mirror)}")
    elif chosen is not None:
        for file in chosen.files:
            if store.root_of(chosen, file, mirror) is None:
                download(chosen, file, store.cache_folder() / file.path)
        _record_unpublished(chosen, mirror)
    return store.locate(name, mirror)


def _candidate(wanted: Asset, mirror: Path | None) -> Asset | None:
    """The asset or its alternative that is there, else the first that can be downloaded."""
    choices = [wanted, *map(asset, wanted.alternatives)]
    here = [choice for choice in choices if store.present(choice, mirror)]
    return next(iter([*here, *(c for c in choices if c.downloadable)]), None)


def _record_unpublished(wanted: Asset, mirror: Path | None) -> None:
    """Hold files to the content they have now that no published SHA-256 fixes, and say so.

    What agrees with a part of a hash, or with an MD5, is pinned without a warning.
    """
    new = []
    for file in wanted.files:
        path = store.root_of(wanted, file, mirror) / file.path
        if not file.whole and store.recorded(wanted, file, path, mirror) is None:
            store.check_published(wanted, file, path, mirror)
            _note(wanted, store.cache_folder() / file.path, sha256(path))
            new += [] if file.checksum else [str(path)]
    if new:
        log.warning(
            "asset %s is UNVERIFIED: no published hash is recorded for %s. Its sha256 is kept from "
            "now on; compare it with another copy if you can",
            wanted.name,
            ", ".join(new),
        )


def _note(wanted: Asset, path: Path, value: str) -> None:
    with _named(wanted):
        store.note(path, value)


@contextlib.contextmanager
def _named(wanted: Asset) -> Iterator[None]:
    """Errors begin with the asset's name, and say where to write where it cannot be done."""
    try:
        yield
    except UserError as error:
        unwritable = isinstance(error.__cause__, OSError)
        more = "; PRUNEBENCH_CACHE can name another folder" if unwritable else ""
        raise UserError(f"asset {wanted.name}: {error}{more}") from error


# ---- data sets


def _convert(wanted: Asset, mirror: Path | None) -> None:
    """Make a data set of the first original that is there, or that can be downloaded."""
    choices = [(asset(name), conversion) for name, conversion in wanted.made_from.items()]
    here = [choice for choice in choices if store.present(choice[0], mirror)]
    open_ = [choice for choice in choices if choice[0].downloadable]
    if not (here or open_):
        raise UserError(
            f"asset {wanted.name} cannot be downloaded. {store.by_hand(choices[0][0], mirror)} "
            f"Then run `prunebench assets fetch {wanted.name}` again."
        )
    original, conversion = (here or open_)[0]
    fetch(original.name, mirror)
    files = [store.root_of(original, file, mirror) / file.path for file in original.files]
    (made,) = wanted.files
    target = store.cache_folder() / made.path
    log.info("converting %s to %s", ", ".join(map(str, files)), target)
    with part_of(wanted, target) as part:
        try:
            _converted(wanted, conversion, files, part)
            finish(part, target)
        except BaseException:
            discard(part)
            raise
    if not made.whole:
        _note(wanted, target, sha256(target))


def _converted(wanted: Asset, conversion: str, files: list[Path], part: Path) -> None:
    """Make `part` of the originals; it is held to the data set's hash where one is known."""
    from prunebench.assets import datasets

    (made,) = wanted.files
    with _named(wanted):
        datasets.convert(conversion, files, part, wanted.images)
        if made.sha256 and (found := sha256(part)) != made.sha256:
            raise UserError(
                f"converting {files[0]} gave sha256 {found} instead of {made.sha256}; this is a "
                "bug or broken memory, nothing was kept"
            )
