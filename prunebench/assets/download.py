"""Downloads with resume and verification: the only code that uses the network.

A download grows in `<file>.part`, which a killed one leaves and the next one goes on from; only a
verified file gets its name. `<file>.part.json` says where the part came from, so that bytes of two
versions are never joined. Conversions have their part here too, and begin it anew.
"""

import contextlib
import errno
import fcntl
import gzip
import json
import logging
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import requests
from tqdm import tqdm

from prunebench import __version__
from prunebench.assets import store
from prunebench.assets.registry import Asset, File
from prunebench.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 16  # what a broken connection may lose
ATTEMPTS = 5  # in a row that bring no new byte
BACKOFF = 1.0  # seconds before the second attempt; doubled before each further one
TIMEOUT = (15, 60)  # seconds to connect, and without a byte
AGAIN = (408, 425, 429, 500, 502, 503, 504)


class _SourceError(Exception):
    """This source will not give the file; another one may."""


class _TransferError(Exception):
    """The transfer broke; the same source may go on."""


def download(wanted: Asset, file: File, target: Path) -> None:
    """Download `file` to `target` from the first source that gives it, and verify it.

    Raises:
        UserError: no source gave it, or the folder cannot be written. A part that can be gone on
            from is kept as `<target>.part`.
    """
    failures = []
    with part_of(wanted, target) as part:
        for source in file.sources:
            try:
                _from_source(file, source, part, target)
                return
            except _SourceError as failure:
                failures.append(f"{source}: {failure}")
    raise UserError(
        f"asset {wanted.name} could not be fetched ({'; '.join(failures)}). {store.by_hand(wanted)}"
    )


@contextlib.contextmanager
def part_of(wanted: Asset, target: Path) -> Iterator[Path]:
    """`<target>.part` while no other process may write it; what is empty at the end goes away.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """
    with _writing(wanted, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        with _locked(wanted, part):
            yield part


def finish(part: Path, target: Path) -> None:
    """Give a complete and verified part its name."""
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.replace(target)


@contextlib.contextmanager
def _writing(wanted: Asset, target: Path) -> Iterator[None]:
    """Turns an error of the disk into words."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"asset {wanted.name}: cannot write {target}: {error.strerror or error}; free space, "
            "or name a folder that can be written in PRUNEBENCH_CACHE, and fetch again: what was "
            "downloaded is kept. A read-only folder that has the file can be named in "
            f"PRUNEBENCH_MIRROR. {store.by_hand(wanted)}"
        ) from error


@contextlib.contextmanager
def _locked(wanted: Asset, part: Path) -> Iterator[None]:
    """Lock a part, which two writers would garble; the lock ends with its process.

    On a file system without locks nobody is kept out, and what two writers garble is refused in the
    end by its checksum.
    """
    with part.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle.fileno()), part.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False  # or finished, and renamed, since we opened it
        except OSError as error:
            log.warning("%s: %s; fetch it in one process at a time", part.parent, error.strerror)
            mine = True
        if not mine:
            raise UserError(f"asset {wanted.name}: another process is writing {part}; wait for it")
        try:
            yield
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
                _note_of_part(part).unlink(missing_ok=True)


def _from_source(file: File, source: str, part: Path, target: Path) -> None:
    told = _transfer(file, source, part)
    whole = _unpacked(part) if _packed(file, source) else part
    checksum = file.checksum or (("sha256", told) if told else None)
    if checksum and not (found := _digest(whole, checksum[0])).startswith(checksum[1]):
        discard(part)
        if whole != part:
            whole.unlink()
        raise _SourceError(f"gave a file with {checksum[0]} {found} instead of {checksum[1]}")
    finish(whole, target)
    if whole != part:
        discard(part)
    _note_of_part(part).unlink(missing_ok=True)
    if told and not file.checksum:
        log.info("%s has the sha256 that the hub gives for it", target)
        store.note(target, told)


def _digest(path: Path, algorithm: str) -> str:
    return store.digest_of(path, algorithm)


def _packed(file: File, source: str) -> bool:
    return source.endswith(".gz") and not file.path.endswith(".gz")


def _unpacked(part: Path) -> Path:
    """A decompressed copy beside `part`."""
    whole = part.with_name(f"{part.name}.unpacked")
    try:
        with gzip.open(part) as packed, whole.open("wb") as handle:
            shutil.copyfileobj(packed, handle, CHUNK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        whole.unlink()
        discard(part)
        raise _SourceError(f"gave a broken gzip file ({error})") from error
    return whole


def discard(part: Path) -> None:
    """Empty the part, which keeps its lock; whoever holds that removes it."""
    _truncate(part)
    _note_of_part(part).unlink(missing_ok=True)


def _note_of_part(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


# ---- one transfer


def _transfer(file: File, source: str, part: Path) -> str | None:
    """Fill `part` from `source`, trying again while it goes on; the sha256 a hub tells, if any."""
    failed = 0
    while True:
        before = part.stat().st_size
        try:
            return _attempt(file, source, part)
        except (_TransferError, requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as error:  # fmt: skip
            failed = 1 if part.stat().st_size > before else failed + 1
            if failed >= ATTEMPTS:
                raise _SourceError(f"{_reason(error)} ({failed} attempts)") from error
            log.info("%s: %s; trying again", source, _reason(error))
            time.sleep(BACKOFF * 2 ** (failed - 1))
        except requests.RequestException as error:
            raise _SourceError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The cause in a line: requests and urllib3 wrap the system's error several times."""
    text = str(error)
    if "Failed to resolve" in text or "NameResolutionError" in text:
        return "no network, or the name of the server cannot be resolved"
    return text if len(text) < 200 else f"{text[:200]}..."


def _attempt(file: File, source: str, part: Path) -> str | None:
    offset = _resumable(file, source, part)
    headers = {"Accept-Encoding": "identity", "User-Agent": f"prunebench/{__version__}"}
    if offset:
        headers |= {"Range": f"bytes={offset}-"}
        if validator := _read_note(part).get("validator"):
            headers |= {"If-Range": validator}
    with requests.get(source, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            return _beyond(response, part)
        start = _start(response, offset)
        total = _total(file, source, response, start)
        _write_note(part, source, response)
        _receive(response, part, start, total)
        if total is not None and part.stat().st_size != total:
            raise _TransferError(f"the connection ended at {part.stat().st_size} of {total} bytes")
        return _hub_hash(response)


def _resumable(file: File, source: str, part: Path) -> int:
    """How many bytes of `part` the source can be asked to go on from.

    Only of the same source, and only if something can tell that the file has not changed: the
    server (If-Range) or, at the end, the published checksum.
    """
    note = _read_note(part)
    if note.get("source") != source or not (note.get("validator") or file.checksum):
        return 0
    return part.stat().st_size


def _read_note(part: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(_note_of_part(part).read_text())
        return note if isinstance(note, dict) else {}
    return {}


def _write_note(part: Path, source: str, response: requests.Response) -> None:
    tag = response.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else response.headers.get("Last-Modified")
    _note_of_part(part).write_text(json.dumps({"source": source, "validator": validator}))


def _beyond(response: requests.Response, part: Path) -> str | None:
    """The server has nothing after the part's end: the part is whole, or worthless."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if total == str(part.stat().st_size):
        return _hub_hash(response)
    _truncate(part)
    raise _TransferError("the part was longer than the file")


def _start(response: requests.Response, offset: int) -> int:
    """At which byte the answer begins; _SourceError or _TransferError if it is not the file."""
    status = response.status_code
    if status in AGAIN:
        raise _TransferError(f"HTTP {status} {response.reason}")
    if status not in (200, 206):
        raise _SourceError(f"HTTP {status} {response.reason}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise _SourceError("answers with a web page (a log-in or a proxy?) instead of the file")
    if status == 200:  # the server knows no ranges, or the file has changed
        return 0
    begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if begin is None or int(begin.group(1)) != offset:
        raise _SourceError("answers with another range than it was asked for")
    return offset


def _total(file: File, source: str, response: requests.Response, start: int) -> int | None:
    """Size of the whole file in bytes, if the server says it."""
    length = response.headers.get("Content-Length", "")
    if not length.isdigit():
        return None
    total = start + int(length)
    if file.size and total != file.size and not _packed(file, source):
        raise _SourceError(f"offers {total} bytes instead of {file.size}")
    return total


def _receive(response: requests.Response, part: Path, start: int, total: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise OSError(
            errno.ENOSPC, f"No space left on device: {total - start:,} bytes needed, {free:,} free"
        )
    _truncate(part, start)
    bar = tqdm(
        desc=part.name.removesuffix(".part"),
        initial=start,
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
    with bar, part.open("ab") as handle:
        for chunk in response.iter_content(CHUNK):
            handle.write(chunk)
            bar.update(len(chunk))


def _truncate(part: Path, size: int = 0) -> None:
    with part.open("ab") as handle:
        handle.truncate(size)


def _hub_hash(response: requests.Response) -> str | None:
    """The sha256 by which Hugging Face's hub stores a large file; it comes with the redirection."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-Etag", "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", tag):
            return tag
    return None
