"""Files on disk: written under a temporary name and renamed, so that they appear whole."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from prunebench.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `path`, then rename it; never leaves half a file.

    The temporary name is unique, so that two late copies of one job cannot mix their bytes. What
    killed processes left of earlier tries goes.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        forget_abandoned(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or mend permissions and "
            "run the same command again, finished work is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it must not hide the error that is on its way
            temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """A new name beside `name`, which says which process of which machine has made it."""
    return f".{name}.{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}.part"


def forget_abandoned(path: Path) -> None:
    """Remove temporary siblings of `path` whose process, of this machine, is no more."""
    own = re.compile(rf"\.{re.escape(path.name)}\.(.+)-([0-9]+)-[0-9a-f]{{8}}\.part")
    for entry in os.scandir(path.parent):
        made_by = own.fullmatch(entry.name)
        if made_by and made_by[1] == os.uname().nodename and not _alive(int(made_by[2])):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                Path(entry).unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


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
