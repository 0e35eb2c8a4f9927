"""Rows of tensors on disk, which a stage encodes once and jobs then map, never reading them whole.

The rows lie in parts, each written in one go, so that a killed stage goes on where it was. A part
is read row by row; every row is checked against its CRC when it is drawn, because hashing tens of
gigabytes would take every job longer than its work.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunebench.errors import UserError
from prunebench.records import artefacts
from prunebench.training.loop import counted

log = logging.getLogger(__name__)

INDEX, IDENTITY = "index.safetensors", "encoding.json"
CHECKS = "checks"


def part_file(folder: Path, stem: str, index: int) -> Path:
    return folder / f"{stem}{index:05d}.safetensors"


def write(
    folder: Path,
    stem: str,
    count: int,
    part: int,
    encoded: Callable[[range], dict[str, Tensor]],
    identity: dict,
    **index: Tensor,
) -> Path:
    """Write `count` rows; parts that an interrupted call left are kept.

    Args:
        stem: what the files of the parts are called.
        part: rows of a file.
        encoded: the tensors [n, ...] of some rows, by name.
        identity: what the rows depend on; parts of another identity are removed.
        index: tensors for the index.

    Returns:
        the index, which holds the checksums of all parts: who has verified it needs no more.
    """
    _claim(folder, {**identity, "part": part, "count": count})
    checks = []
    for number in counted(0, -(-count // part), "encode"):
        rows = range(number * part, min((number + 1) * part, count))
        checks.append(_part(part_file(folder, stem, number), rows, encoded))
    content = {**index, CHECKS: torch.cat(checks), "part": torch.tensor(part)}
    artefacts.write_tensors(folder / INDEX, content)
    return folder / INDEX


def _claim(folder: Path, identity: dict) -> None:
    note, text = folder / IDENTITY, json.dumps(identity, sort_keys=True)
    if note.exists() and note.read_text() == text:
        return
    if folder.exists():
        log.info("%s: parts of other data, another encoder or code are removed", folder)
        shutil.rmtree(folder)
    artefacts.write_atomically(note, lambda temporary: temporary.write_text(text))


def _part(file: Path, rows: range, encoded: Callable[[range], dict[str, Tensor]]) -> Tensor:
    """The checksums of a part, which is written unless it is there and sound."""
    if file.exists():
        kept = artefacts.read_tensors(file)
        noted = kept.pop(CHECKS)
        if torch.equal(_checks(kept), noted):
            return noted
        log.warning("%s is corrupt: encoded anew", file)
    tensors = encoded(rows)
    checks = _checks(tensors)
    artefacts.write_tensors(file, {**tensors, CHECKS: checks})
    return checks


def _checks(tensors: dict[str, Tensor]) -> Tensor:
    """The checksum of each row, int64 [n]."""
    count = len(next(iter(tensors.values())))
    return torch.tensor([check({k: v[row] for k, v in tensors.items()}) for row in range(count)])


def check(row: dict[str, Tensor]) -> int:
    """CRC-32 of a row's tensors, in the order of their names."""
    value = 0
    for name in sorted(row):
        value = zlib.crc32(row[name].numpy(), value)
    return value


class Rows:
    """What `write` wrote. `rows[i]` are the checked tensors of row i, in single precision.

    Attributes:
        index: the tensors of the index.

    Raises:
        UserError: a part is missing or corrupt.
    """

    def __init__(self, folder: Path, stem: str):
        self.folder, self.stem = Path(folder), stem
        self.index = artefacts.read_tensors(self.folder / INDEX)
        self._all_checks, self._size = self.index[CHECKS], int(self.index["part"])
        self._parts: dict[int, dict[str, object]] = {}  # mapped tensors

    def __len__(self) -> int:
        return len(self._all_checks)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        number, place = divmod(row, self._size)
        file = part_file(self.folder, self.stem, number)
        again = f"delete it and {self.folder.parent.name}.json beside it and run again, "
        again += "other parts are kept"
        try:
            if number not in self._parts:
                self._parts[number] = _mapped(file)
            stored = {k: v[place : place + 1][0] for k, v in self._parts[number].items()}
        except FileNotFoundError:
            raise UserError(f"{file} is missing; {again}") from None
        except (SafetensorError, IndexError) as error:
            raise UserError(f"{file} is corrupt ({error}); {again}") from error
        if check(stored) != self._all_checks[row]:
            raise UserError(f"{file} is corrupt (row {row}); {again}")
        return {name: value.float() for name, value in stored.items()}


def _mapped(file: Path) -> dict[str, object]:
    handle = safe_open(file, "pt")
    return {name: handle.get_slice(name) for name in handle.keys() if name != CHECKS}  # noqa: SIM118
