"""Records on disk: sealed with a checksum when they are written, checked when they are read.

A record that was changed, that lies in another's place, whose payload differs from what it vouches
for, or that says that it was made from something else than what is there, is refused by name.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from prunebench.errors import UserError
from prunebench.records.artefacts import sha256, write_json
from prunebench.records.parts import Identity
from prunebench.records.schema import RECORDS, VERSION, Done, Failed, Record, Sealed

R = TypeVar("R", bound=Sealed)
HEAD = 4096  # bytes of a record in which everything lies that `skim` wants, but for long texts
AGAIN = "delete it and run the same command again, only what depends on it is computed anew"


def checksum(content: dict) -> str:
    """SHA-256 of a record's content, whatever the order of its keys; its own checksum left out."""
    told = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: dict, payload: Iterable[Path] = (), folder: Path | None = None) -> dict:
    """`content` with the hashes of its payload, named below `folder`, and its own checksum."""
    named = {Path(file).relative_to(folder or Path(file).parent): file for file in payload}
    content = {**content, "files": {str(name): sha256(file) for name, file in named.items()}}
    return {**content, "checksum": checksum(content)}


def write(path: Path | str, record: Sealed, payload: Iterable[Path] = ()) -> None:
    """Write a stage's record with the hashes of its payload files, which lie in its folder."""
    folder = Path(path).parent
    write_json(Path(path), sealed(record.model_dump(mode="json"), payload, folder))


def read(
    path: Path | str,
    kind: type[R] | None = None,
    identity: Identity | None = None,
    *,
    payload: bool = True,
) -> R | Failed:
    """Read a record; a cell's may be the record of its failure.

    Args:
        kind: what it has to be; None takes the record of any stage.
        identity: which result it has to be; None takes any.
        payload: whether the files that it vouches for lie beside it and are to be verified.

    Raises:
        UserError: it is missing, no record, of another version, stage, track, model, cell or mask,
            was changed after it was written, or its payload was.
    """
    path = Path(path)
    record = parse(path, _bytes(path), kind)
    if identity is not None and record.identity != identity:
        raise UserError(
            f"{path} is the record of {record.identity}, not of {identity}; was its folder copied? "
            f"If not moved by you, {AGAIN}"
        )
    if payload:
        _check_payload(path, record.files)
    return record


def parse(path: Path, text: bytes, kind: type[R] | None = None) -> R | Failed:
    """The record that a file's bytes hold; errors as `read`, which names it `path`."""
    content = opened(path, text)
    if content.get("version") != VERSION:
        found = content.get("version", content.get("schema"))
        raise UserError(
            f"{path} is not a record of version {VERSION} (its version is {found!r}); {AGAIN}"
        )
    kind = kind or _kind_of(path, content)
    failed = content.get("status") == "failed" and issubclass(kind, Done)
    return validated(path, text, Failed if failed else kind)


def opened(path: Path, text: bytes) -> dict:
    """The content of a sealed JSON file whose checksum holds; of schema 1, which had none, too."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a record; {AGAIN}")
    if content.get("schema") == 1 and "version" not in content:
        return content
    if content.get("checksum") != checksum(content):
        state = "was changed after it was written" if "checksum" in content else "has no checksum"
        raise UserError(f"{path} {state}; {AGAIN}")
    return content


def validated(path: Path, text: bytes | str, kind: type[R]) -> R:
    """`text` as a record of `kind`; a UserError names the key that is missing or wrong."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        name = getattr(kind, "STAGE", "") or kind.__name__.lower()
        raise UserError(
            f"{path} is not a record of {name}: {where}: {first['msg']}; {AGAIN}"
        ) from error


def _kind_of(path: Path, content: dict) -> type[Sealed]:
    identity = content.get("identity")
    stage = identity.get("stage") if isinstance(identity, dict) else None
    if stage not in RECORDS:
        raise UserError(f"{path} is not a record of a stage (identity.stage is {stage!r}); {AGAIN}")
    return RECORDS[stage]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _check_payload(path: Path, files: dict[str, str]) -> None:
    for name, expected in files.items():
        file = path.parent / name
        if not file.exists() or sha256(file) != expected:
            state = "is corrupt" if file.exists() else "is missing"
            raise UserError(
                f"{file} {state} (its record {path} expects sha256 {expected}); "
                f"delete {path} and run again, only what depends on it is computed anew"
            )


# What a record was made from.


def made_from(**inputs: Sealed | Path | str) -> dict[str, str]:
    """Names and hashes for `Record.inputs`.

    Args:
        inputs: by name a record, which stands for its payload's files or, where it has none, for
            itself; a file; or a hash.
    """
    found = {}
    for name, given in inputs.items():
        if isinstance(given, Sealed):
            files = {f"{name}/{file}": value for file, value in given.files.items()}
            found |= files or {name: given.checksum}
        else:
            found[name] = sha256(given) if isinstance(given, Path) else given
    return found


def check_made_from(path: Path | str, record: Record, **now: Sealed | Path | str) -> None:
    """Refuse a record that was made from something else than there is now.

    Raises:
        UserError: one of `now` (as in `made_from`) differs from what the record was made from.
    """
    for name, value in made_from(**now).items():
        if record.inputs.get(name) != value:
            raise UserError(f"{path} was made from another {name} than there is now; {AGAIN}")


# What a record says of its cost. There may be tens of thousands, some with plans of megabytes.


def skim(path: Path | str) -> dict:
    """What a record says of its cost, from its first bytes where these hold it; unverified.

    Returns:
        status: "ok" or "failed"; wall_s: seconds, 0 where a failure recorded none; gpu: whether it
        ran on one; processes: how many trained together; failure: that of a failed cell.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: it is not a record.
    """
    with open(path, "rb", buffering=0) as handle:  # noqa: PTH123 (Path would double the time)
        text = handle.read(HEAD)
        content = from_json(text, allow_partial=True)
        if len(text) == HEAD and not _told(content):
            content = from_json(text + handle.read())
    if not _told(content):
        raise ValueError(f"{path} is not a record")
    return {
        "status": content["status"],
        "wall_s": content.get("wall_s", 0.0),
        "gpu": content["provenance"]["gpu"] is not None,
        "processes": (content.get("training") or {}).get("processes", 1),
        "failure": content.get("failure"),
    }


def _told(content: object) -> bool:
    """Whether a record, or its beginning, says what `skim` returns."""
    if not isinstance(content, dict) or not isinstance(content.get("provenance"), dict):
        return False
    whole = "packages" in content["provenance"] and "gpu" in content["provenance"]
    return whole and content.get("status") in ("ok", "failed") and "identity" in content
