"""Files on disk: written under a temporary name and renamed, verified when they are read.

Every stage ends by writing one JSON *record*. The record carries the SHA-256 of the payload files
beside it, so a record that exists vouches for a complete stage.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from prunebench.errors import UserError

WINDOW = 8192  # bytes of either end of a record that `skim_record` reads
# What it looks for, as `write_json` lays it out: a line per key, a space per level.
PROCESSES = re.compile(rb'\n  "processes": (\d+)')  # of a training
END = re.compile(rb'\n "wall_s": ([^,]+),\n "provenance": {.*?\n  "gpu": (null|")', re.DOTALL)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `path`, then rename it; never leaves half a file.

    The temporary name is unique, so that two late copies of one job cannot mix their bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or mend permissions and "
            "run the same command again, finished work is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it must not hide the error that is on its way
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> dict:
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is corrupt ({error}); delete it and run again") from error


def sha256(path: Path) -> str:
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_record(path: Path, content: dict, payload: Iterable[Path] = ()) -> None:
    """Write a stage's record with the hashes of its payload files, which lie in the same folder."""
    hashes = {Path(file).name: sha256(file) for file in payload}
    write_json(path, {**content, "files": hashes})


def read_record(path: Path) -> dict:
    """Read a record and verify its payload.

    Raises:
        UserError: the record or one of its files is missing or differs from its recorded hash.
    """
    record = read_json(path)
    for name, expected in record.get("files", {}).items():
        file = Path(path).parent / name
        if not file.exists() or sha256(file) != expected:
            state = "is corrupt" if file.exists() else "is missing"
            raise UserError(
                f"{file} {state} (its record {path} expects sha256 {expected}); "
                f"delete {path} and run again, only what depends on it is computed anew"
            )
    return record


def skim_record(path: str) -> dict:
    """What a record says of its cost. There may be tens of thousands, some with plans of megabytes.

    So only the ends of it are read, and of them only what is wanted.

    Returns:
        status: "ok" or "failed"; wall_s: seconds, 0 where a failure recorded none; gpu: whether it
        ran on one; processes: how many trained together; failure: that of a failed cell.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: it is not a record.
    """
    with open(path, "rb", buffering=0) as handle:  # noqa: PTH123 (Path would double the time)
        text = handle.read(WINDOW)
        if len(text) == WINDOW:
            handle.seek(-WINDOW, os.SEEK_END)
            text += handle.read()
    return _cost(text) or _parsed_cost(Path(path))


def _cost(text: bytes) -> dict | None:
    """What `skim_record` returns; None of a failed cell's record, or one laid out otherwise."""
    end = END.match(text, max(0, text.rfind(b'\n "wall_s": ')))
    if not end or b'\n "status": "ok"' not in text:
        return None
    training = PROCESSES.search(text)
    return {
        "status": "ok",
        "wall_s": float(end[1]),
        "gpu": end[2] != b"null",
        "processes": int(training[1]) if training else 1,
        "failure": None,
    }


def _parsed_cost(path: Path) -> dict:
    record = json.loads(path.read_bytes())
    try:
        return {
            "status": record["status"],
            "wall_s": record.get("wall_s", 0.0),
            "gpu": record["provenance"]["gpu"] is not None,
            "processes": record.get("training", {}).get("processes", 1),
            "failure": record.get("failure"),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record: {error!r}") from error


def training_folder(record: str | Path) -> Path:
    """Where the trainings of a stage are saved while it runs (see training/checkpoints.py)."""
    record = Path(record)
    return record.parent / "training" / record.stem


def forget_training(record: str | Path) -> None:
    """Remove what a stage's trainings saved: its record is written."""
    folder = training_folder(record)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or of another stage of this folder too
        folder.parent.rmdir()


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: _save(save_file, contiguous, temporary, metadata))


def _save(save_file: Callable, tensors: dict, path: Path, metadata: dict | None) -> None:
    try:
        save_file(tensors, path, metadata)
    except Exception as error:  # safetensors wraps the system's error in its own type
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error


def read_tensors(path: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it first") from None
    except SafetensorError as error:
        raise UserError(f"{path} is corrupt ({error}); delete it and run again") from error
