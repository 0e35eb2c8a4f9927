"""Finding and verifying files; nothing here uses the network.

A file is looked for in the mirror folder (air-gapped machines), then in the cache, then, if it is
packaged, in the package, and is never used before its checksum has been verified. Where no whole
SHA-256 is published (nothing, its first digits, an MD5), `fetch` has recorded it beside the file in
`<file>.sha256`, in the format of sha256sum, and that is what the file is held to from then on.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

from prunebench.assets.registry import Asset, File, asset
from prunebench.errors import UserError
from prunebench.records.artefacts import write_atomically

DATA = Path(__file__).parents[1] / "data"


def cache_folder() -> Path:
    """Where downloads and conversions go; UserError where no folder can be meant."""
    try:
        return folder_of("PRUNEBENCH_CACHE") or Path.home() / ".cache" / "prunebench"
    except RuntimeError:  # HOME is not set, and the user unknown, as in some containers
        raise UserError("there is no home folder; name a folder in PRUNEBENCH_CACHE") from None


def folder_of(variable: str) -> Path | None:
    """The folder that an environment variable names, None where it names none.

    `~` is expanded: a shell leaves it where it stands in quotes or in a file of settings.
    """
    named = os.environ.get(variable)
    try:
        return Path(named).expanduser() if named else None
    except RuntimeError as error:  # of a user who is not known
        raise UserError(f"{variable}={named!r}: {error}") from None


def roots(wanted: Asset, mirror: Path | None = None) -> list[Path]:
    """The folders that are searched, in this order.

    Args:
        mirror: default the environment variable PRUNEBENCH_MIRROR.
    """
    mirror = mirror or folder_of("PRUNEBENCH_MIRROR")
    folders = [mirror, cache_folder(), DATA if wanted.packaged else None]
    return [Path(folder) for folder in folders if folder]


def root_of(wanted: Asset, file: File, mirror: Path | None = None) -> Path | None:
    """The first folder that has `file`."""
    return next((r for r in roots(wanted, mirror) if (r / file.path).is_file()), None)


def present(wanted: Asset, mirror: Path | None = None) -> bool:
    """Whether all files are there; their content is not looked at."""
    return all(root_of(wanted, file, mirror) for file in wanted.files)


def locate(name: str, mirror: Path | None = None) -> Path:
    """Path of the verified file of asset `name`, or of its folder if it has several files.

    Args:
        name: a key of ASSETS.
        mirror: folder searched first; default the environment variable PRUNEBENCH_MIRROR.

    Raises:
        UserError: unknown asset, a file is missing, or the first one found is not the expected one.
            A wrong file is never passed over in silence: whoever put it there believes that it is
            in use.
    """
    wanted = asset(name)
    for candidate in (wanted, *map(asset, wanted.alternatives)):
        if any(root_of(candidate, file, mirror) for file in candidate.files):
            return _verified(candidate, mirror)
    raise UserError(f"asset {name} was not found. {_fetching(name)} {by_hand(wanted, mirror)}")


def _verified(wanted: Asset, mirror: Path | None) -> Path:
    found = {root_of(wanted, file, mirror): file for file in wanted.files}
    if None in found:
        lacking = f"asset {wanted.name} is incomplete: {found[None].path} is missing."
        raise UserError(f"{lacking} {_fetching(wanted.name)} {by_hand(wanted, mirror)}")
    if len(found) > 1:
        folders = " and ".join(sorted(map(str, found)))
        raise UserError(
            f"the files of asset {wanted.name} are spread over {folders}; put all of them below one"
        )
    (root,) = found
    for file in wanted.files:
        check(wanted, file, root / file.path, mirror)
    first = root / wanted.files[0].path
    return first if len(wanted.files) == 1 else root / wanted.name


def check(wanted: Asset, file: File, path: Path, mirror: Path | None = None) -> None:
    """Raise UserError unless `path` has what is published of `file`, and its full SHA-256."""
    check_published(wanted, file, path, mirror)
    if file.whole:
        return
    noted = recorded(wanted, file, path, mirror)
    if noted is None:
        raise UserError(
            f"asset {wanted.name}: no whole sha256 is published for {path} and none was recorded "
            f"yet; `prunebench assets fetch {wanted.name}` records it"
        )
    _compare(wanted, path, "sha256", noted, mirror)


def check_published(wanted: Asset, file: File, path: Path, mirror: Path | None = None) -> None:
    """Raise UserError unless `path` agrees with as much of a checksum as is published."""
    if file.checksum:
        _compare(wanted, path, *file.checksum, mirror)


def _compare(wanted: Asset, path: Path, algorithm: str, value: str, mirror: Path | None) -> None:
    found = digest_of(path, algorithm)
    if not found.startswith(value):
        raise UserError(
            f"asset {wanted.name}: {path} is not the expected file, its {algorithm} is {found} "
            f"instead of {value}; delete it. {_fetching(wanted.name)} {by_hand(wanted, mirror)}"
        )


def recorded(wanted: Asset, file: File, path: Path, mirror: Path | None = None) -> str | None:
    """The SHA-256 recorded beside `path` or in another root."""
    others = [root / file.path for root in roots(wanted, mirror)]
    notes = [note_of(place) for place in (path, *others)]
    return next((_noted(note) for note in notes if note.is_file()), None)


def note_of(path: Path) -> Path:
    """Where the hash of a file is recorded for which none is published."""
    return path.with_name(f"{path.name}.sha256")


def note(path: Path, value: str) -> None:
    """Record `value` as the sha256 of `path`."""
    line = f"{value}  {path.name}\n"
    write_atomically(note_of(path), lambda temporary: temporary.write_text(line))


def _noted(note: Path) -> str:
    value = (note.read_text(errors="replace").split() or [""])[0].lower()
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise UserError(f"{note} holds no sha256; delete it and fetch the asset again")
    return value


def hashes(wanted: Asset) -> dict[str, str]:
    """File -> SHA-256 of what is used: of the alternative where that is what is there."""
    choices = [wanted, *map(asset, wanted.alternatives)]
    used = next(choice for choice in choices if present(choice))
    return {file.path: digest_of(root_of(used, file) / file.path) for file in used.files}


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Hash of a file, computed once in a process and again when the file was written since.

    Nothing but setting the machine's clock back changes a file and leaves its `st_ctime_ns`.
    """
    now = path.stat()
    return digest(path, algorithm, now.st_mtime_ns, now.st_size, now.st_ctime_ns, now.st_ino)


@cache
def digest(path: Path, algorithm: str, *state: int) -> str:
    """Hash of `path` in a state."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def _fetching(name: str) -> str:
    return (
        f"Stages never use the network: run `prunebench assets fetch {name}`, or `snakemake assets`"
        " for all that a track needs, on a machine that has one."
    )


def by_hand(wanted: Asset, mirror: Path | None = None) -> str:
    """What the asset is, and how a person gets it and where it goes."""
    lines = [
        f"{wanted.name} is {wanted.description}; licence: {wanted.licence}; home: {wanted.home}."
    ]
    if wanted.made_from:
        lines += [_originals(wanted)]
    elif wanted.by_hand:
        lines += [f"It is placed by hand: {wanted.by_hand}."]
    if wanted.alternatives:
        lines += [f"{' or '.join(wanted.alternatives)} will do instead."]
    if not wanted.made_from:
        lines += [_placing(wanted, mirror)]
    return " ".join(lines)


def _originals(wanted: Asset) -> str:
    ways = [
        f"{name} ({', '.join(file.path for file in asset(name).files)})"
        for name in wanted.made_from
    ]
    return (
        f"It is made of {' or '.join(ways)}: without a network, put that into the folder "
        "PRUNEBENCH_MIRROR and run the same command."
    )


def _placing(wanted: Asset, mirror: Path | None) -> str:
    single = len(wanted.files) == 1
    own = wanted.files[0].path if single else wanted.name
    where = " or ".join(str(root / own) for root in roots(wanted, mirror))
    return (
        f"By hand: put {_contents(wanted)} at {where}, or name the folder that holds {own} in "
        "PRUNEBENCH_MIRROR."
    )


def _contents(wanted: Asset) -> str:
    """The files with their addresses; of many files, which a hub has, the one address of all."""
    names = [Path(file.path).name for file in wanted.files]
    if len(names) > 1:
        names = [str(Path(file.path).relative_to(wanted.name)) for file in wanted.files]
    if len(names) <= 4:
        pairs = zip(names, wanted.files, strict=True)
        return "; ".join(name + _from(file) for name, file in pairs)
    addresses = [source.removesuffix(f"/{names[0]}") for source in wanted.files[0].sources]
    return f"{', '.join(names)} (all from {' or '.join(addresses)})"


def _from(file: File) -> str:
    told = [f"from {' or '.join(file.sources)}"] if file.sources else []
    told += [f"{file.checksum[0]} {file.checksum[1]}"] if file.checksum else []
    return f" ({', '.join(told)})" if told else ""
