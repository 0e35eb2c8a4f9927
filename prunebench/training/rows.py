"""Rows of tensors on disk, which a stage encodes once and jobs then map, never reading them whole.

The rows lie in parts, each written in one go, so that a killed stage goes on where it was. A part
holds the hash of what it was made from, so that a start on other data keeps none of the old. It is
read row by row; every row is checked against its CRC when it is drawn, because hashing tens of
gigabytes would take every job longer than its work.
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunebench.errors import UserError
from prunebench.records import artefacts
from prunebench.training.loop import counted

log = logging.getLogger(__name__)

INDEX, IDENTITY = "index.safetensors", "encoding.json"
CHECKS, SOURCE = "checks", "source"  # of a part, beside its rows


def part_file(folder: Path, stem: str, index: int) -> Path:
    return folder / f"{stem}{index:05d}.safetensors"


def write(
    folder: Path,
    stem: str,
    count: int,
    part: int,
    encoded: Callable[[range], dict[str, Tensor]],
    source: Callable[[range], Iterable[bytes]],
    identity: dict,
    **index: Tensor,
) -> Path:
    """Write `count` rows; parts that an interrupted call left are kept.

    Args:
        stem: what the files of the parts are called.
        part: rows of a file.
        encoded: the tensors [n, ...] of some rows, by name.
        source: what some rows are made of, in pieces; a part that was made of something else is
            encoded anew.
        identity: what the rows depend on; parts of another identity are removed.
        index: tensors for the index.

    Returns:
        the index, which holds the checksums of all parts: who has verified it needs no more.
    """
    _claim(folder, {**identity, "part": part, "count": count})
    checks = []
    for number in counted(0, -(-count // part), "encode"):
        rows = range(number * part, min((number + 1) * part, count))
        file, made_of = part_file(folder, stem, number), _digest(source(rows))
        kept = _kept(file, made_of)
        checks.append(_written(file, encoded(rows), made_of) if kept is None else kept)
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


def _kept(file: Path, made_of: Tensor) -> Tensor | None:
    """The checksums of a part that is there, sound and made of this source; None otherwise."""
    if not file.exists():
        return None
    kept = artefacts.read_tensors(file)
    noted, source = kept.pop(CHECKS), kept.pop(SOURCE)
    if torch.equal(_checks(kept), noted) and torch.equal(source, made_of):
        return noted
    log.warning("%s is corrupt or of other data: encoded anew", file)
    return None


def _written(file: Path, tensors: dict[str, Tensor], made_of: Tensor) -> Tensor:
    checks = _checks(tensors)
    artefacts.write_tensors(file, {**tensors, CHECKS: checks, SOURCE: made_of})
    return checks


def _digest(pieces: Iterable[bytes]) -> Tensor:
    """SHA-256, uint8 [32], of pieces whose borders count."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "big"))
        digest.update(piece)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


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
    names = set(handle.keys()) - {CHECKS, SOURCE}
    return {name: handle.get_slice(name) for name in names}
