"""Downloads against a real HTTP server: with and without ranges, cut, wrong, absent."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from prunebench import assets, cli
from prunebench.assets import datasets, download, fetch, store
from prunebench.errors import UserError

BYTES = np.random.default_rng(0).bytes(3 << 20)
SHA = hashlib.sha256(BYTES).hexdigest()


@dataclass
class Server:
    """What a server serves and how it misbehaves; `asked` are the Range headers it got."""

    files: dict[str, bytes]
    ranges: bool = True
    tag: str | None = '"v1"'
    cut: list[int] = field(default_factory=list)  # body bytes before the connection breaks
    status: list[int] = field(default_factory=list)  # answers before the right one
    headers: dict[str, str] = field(default_factory=dict)
    redirect: dict[str, str] | None = None  # headers of a redirection to the file
    length: bool = True
    pause: float = 0  # seconds between pieces of 64 KiB
    asked: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        if self.redirect and not handler.path.startswith("/cdn"):
            return self._redirect(handler)
        self.asked.append(handler.headers.get("Range"))
        body = self.files.get(handler.path.removeprefix("/cdn").lstrip("/"))
        if self.status or body is None:
            code = self.status.pop(0) if self.status else 404
            return handler.send_error(code)
        start = self._start(handler, len(body))
        if start is None:
            return self._head(handler, 416, 0, f"bytes */{len(body)}")
        code, where = (206, f"bytes {start}-{len(body) - 1}/{len(body)}") if start else (200, None)
        self._head(handler, code, len(body) - start, where)
        return self._body(handler, body[start:])

    def _redirect(self, handler) -> None:
        handler.send_response(302)
        for name, value in {"Location": f"/cdn{handler.path}", **self.redirect}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _start(self, handler, size: int) -> int | None:
        asked = re.match(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        if not (self.ranges and asked):
            return 0
        if handler.headers.get("If-Range") not in (None, self.tag):
            return 0
        return int(asked.group(1)) if int(asked.group(1)) < size else None

    def _head(self, handler, code: int, length: int, where: str | None) -> None:
        handler.send_response(code)
        named = {"ETag": self.tag, "Content-Range": where, **self.headers}
        for name, value in named.items():
            if value:
                handler.send_header(name, value)
        if self.length:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()

    def _body(self, handler, body: bytes) -> None:
        cut = self.cut.pop(0) if self.cut else len(body)
        for at in range(0, cut, 1 << 16):
            handler.wfile.write(body[at : min(at + (1 << 16), cut)])
            time.sleep(self.pause)
        if cut < len(body):
            handler.close_connection = True


@pytest.fixture
def serve(monkeypatch):
    """Start a server on this machine: Server options -> the running Server."""
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    running = []

    def start(files: dict[str, bytes], **options) -> Server:
        server = Server(files, **options)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if server.length else "HTTP/1.0"

            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    server.answer(self)

            def log_message(self, *arguments):
                pass

        listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        running.append(listener)
        server.url = f"http://127.0.0.1:{listener.server_port}"
        return server

    yield start
    for listener in running:
        listener.shutdown()
        listener.server_close()


@pytest.fixture
def cache(register, tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def offer(register):
    """Register asset "big": its file big.bin at the given addresses."""

    def add(*sources: str, **fields):
        return register("big", assets.File("big.bin", sources, **{"sha256": SHA, **fields}))

    return add


def contents(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def refused(name: str = "big") -> str:
    with pytest.raises(UserError) as error:
        fetch.fetch(name)
    return str(error.value)


def test_a_download_is_verified_and_leaves_only_the_file(serve, offer, cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin", size=len(BYTES))
    assert fetch.fetch("big") == cache / "big.bin"
    assert (cache / "big.bin").read_bytes() == BYTES
    assert contents(cache) == ["big.bin"]
    assert fetch.fetch("big") == cache / "big.bin"
    assert len(server.asked) == 1  # what is there is not asked for again


def test_the_mirror_comes_first(serve, offer, cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin")
    (cache.parent / "mirror" / "big.bin").write_bytes(BYTES)
    assert fetch.fetch("big") == cache.parent / "mirror" / "big.bin"
    assert not server.asked
    assert not contents(cache)


def test_a_corrupt_byte_in_the_mirror_is_named_and_not_passed_over(serve, offer, cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin")
    bad = cache.parent / "mirror" / "big.bin"
    bad.write_bytes(BYTES[:1000] + bytes([BYTES[1000] ^ 1]) + BYTES[1001:])
    message = refused()
    assert f"{bad} is not the expected file" in message
    assert SHA in message
    assert not server.asked


def test_broken_connections_are_gone_on_from(serve, offer, cache):
    server = serve({"big.bin": BYTES}, cut=[1 << 20, 1 << 19], status=[503, 429])
    offer(f"{server.url}/big.bin")
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == BYTES
    begun = [int(asked[6:-1]) for asked in server.asked if asked]
    assert begun[-1] > begun[0] > 0
    assert contents(cache) == ["big.bin"]


def test_without_ranges_it_starts_over(serve, offer, cache):
    server = serve({"big.bin": BYTES}, ranges=False, cut=[1 << 20])
    offer(f"{server.url}/big.bin")
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == BYTES


def test_a_server_that_says_no_length_is_held_to_the_hash(serve, offer, cache):
    server = serve({"big.bin": BYTES}, length=False, ranges=False, cut=[1 << 20])
    offer(f"{server.url}/big.bin")
    assert "gave a file with sha256" in refused()  # nothing else can tell that it was cut
    assert contents(cache) == []
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == BYTES


PROGRAM = """
import sys
from prunebench import assets
from prunebench.assets import fetch
file = assets.File("big.bin", (sys.argv[1],), sys.argv[2])
words = dict(kind="extractor", description="d", licence="l", home="h")
assets.ASSETS["big"] = assets.Asset(name="big", files=(file,), **words)
fetch.fetch("big")
"""


def test_a_killed_download_goes_on_where_it_was(serve, offer, cache):
    server = serve({"big.bin": BYTES}, pause=0.05)
    offer(f"{server.url}/big.bin")
    command = [sys.executable, "-c", PROGRAM, f"{server.url}/big.bin", SHA]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part, deadline = cache / "big.bin.part", time.monotonic() + 60
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size >= 1 << 20):
        time.sleep(0.02)
    assert "another process is writing" in refused()
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = part.stat().st_size
    assert 1 << 20 <= had < len(BYTES)
    assert not (cache / "big.bin").exists()
    with pytest.raises(UserError, match="was not found"):
        assets.locate("big")
    server.pause = 0
    fetch.fetch("big")
    assert server.asked[-1] == f"bytes={had}-"
    assert (cache / "big.bin").read_bytes() == BYTES
    assert contents(cache) == ["big.bin"]


def test_parts_of_two_versions_are_never_joined(serve, register, cache):
    """Without a published hash only the server can tell that the file has changed."""
    old, new = BYTES, bytes(reversed(BYTES))
    server = serve({"big.bin": old}, cut=[1 << 20] + [0] * (download.ATTEMPTS - 1))
    register("big", assets.File("big.bin", (f"{server.url}/big.bin",)))
    assert "attempts" in refused()
    assert contents(cache) == ["big.bin.part", "big.bin.part.json"]
    server.files, server.tag = {"big.bin": new}, '"v2"'
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == new
    (cache / "big.bin").unlink()
    store.note_of(cache / "big.bin").unlink()
    server.tag, server.cut = None, [1 << 20] + [0] * (download.ATTEMPTS - 1)  # nothing to tell by
    refused()
    server.asked.clear()
    fetch.fetch("big")
    assert server.asked == [None]


def test_a_corrupt_part_is_thrown_away(serve, offer, cache):
    server = serve({"big.bin": BYTES}, cut=[1 << 20] + [0] * (download.ATTEMPTS - 1))
    offer(f"{server.url}/big.bin")
    refused()
    part = cache / "big.bin.part"
    part.write_bytes(bytes(part.stat().st_size))
    assert "gave a file with sha256" in refused()
    assert contents(cache) == []
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == BYTES
    (cache / "big.bin").rename(part)  # and one that is complete needs no byte more
    note = {"source": f"{server.url}/big.bin", "validator": '"v1"'}
    (cache / "big.bin.part.json").write_text(json.dumps(note))
    fetch.fetch("big")
    assert contents(cache) == ["big.bin"]


def test_wrong_content_is_refused_and_the_next_source_asked(serve, offer, cache):
    bad, good = serve({"big.bin": BYTES[:-1] + b"x"}), serve({"big.bin": BYTES})
    offer(f"{bad.url}/big.bin")
    message = refused()
    for part in ("big", bad.url, SHA, "By hand", str(cache), "three bytes"):
        assert part in message
    assert contents(cache) == []
    offer(f"{bad.url}/big.bin", f"{good.url}/big.bin")
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == BYTES


def test_another_size_is_refused_before_the_download(serve, offer, cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin", size=7)
    assert f"offers {len(BYTES)} bytes instead of 7" in refused()
    assert contents(cache) == []


def test_404_403_and_web_pages_are_not_files(serve, offer, cache):
    server = serve({}, status=[404, 403])
    offer(f"{server.url}/big.bin")
    assert "HTTP 404 Not Found" in refused()
    assert "HTTP 403 Forbidden" in refused()
    assert len(server.asked) == 2  # asking again would not help
    page = serve({"big.bin": b"<html>log in"}, headers={"Content-Type": "text/html; charset=utf-8"})
    offer(f"{page.url}/big.bin", sha256=None)
    assert "web page" in refused()
    assert contents(cache) == []


def test_no_network(offer, cache, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    offer("http://127.0.0.1:9/big.bin", "http://no-such-host.invalid/big.bin")
    message = refused()
    assert "127.0.0.1:9/big.bin: " in message
    assert "no network" in message
    assert "By hand: put big.bin (from http://127.0.0.1:9/big.bin or" in message
    assert contents(cache) == []


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A file system of its own; skips where it cannot be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(serve, offer, cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin")
    with small_disk(cache, "size=1m"):
        message = refused()
        assert "asset big: cannot write" in message
        assert "No space left on device: 3,145,728 bytes needed" in message
        assert contents(cache) == []
        server.length = False  # now the disk itself says it, in the middle
        server.headers = {"Connection": "close"}
        assert "No space left on device" in refused()
        assert "big.bin" not in contents(cache)


def test_a_read_only_cache(serve, offer, cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin")
    with small_disk(cache, "ro,size=1m"):
        message = refused()
    assert "Read-only file system" in message
    assert "PRUNEBENCH_CACHE" in message


@pytest.fixture
def no_cache(cache, monkeypatch):
    """The cache is a regular file, in which nobody can write anything, root included."""
    blocker = cache / "file"
    blocker.write_text("a file where the folder should be")
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(blocker))


def unwritable(name: str) -> None:
    message = refused(name)
    assert message.startswith(f"asset {name}: cannot write ")
    assert "PRUNEBENCH_CACHE" in message


def test_a_cache_that_cannot_be_downloaded_to(serve, offer, no_cache):
    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin")
    unwritable("big")
    assert not server.asked


def test_a_cache_that_cannot_take_a_hash(register, cache, no_cache):
    register("free", assets.File("free.bin"))
    (cache.parent / "mirror" / "free.bin").write_bytes(BYTES)
    unwritable("free")
    with pytest.raises(UserError, match="none was recorded yet"):
        store.locate("free")


def test_gzipped_sources_are_unpacked(serve, register, cache):
    server = serve({"big.gz": gzip.compress(BYTES), "bad.gz": gzip.compress(BYTES)[:-9]})
    file = assets.File(
        "big.bin", (f"{server.url}/bad.gz", f"{server.url}/big.gz"), SHA, size=3 << 20
    )
    register("big", file)
    fetch.fetch("big")
    assert (cache / "big.bin").read_bytes() == BYTES
    assert contents(cache) == ["big.bin"]
    (cache / "big.bin").unlink()
    register("big", assets.File("big.bin", (f"{server.url}/big.gz",), "0" * 64))
    assert "instead of 0000" in refused()
    assert contents(cache) == []


def test_unverified_is_said_loudly_and_only_once(serve, register, cache, caplog):
    server = serve({"big.bin": BYTES})
    register("big", assets.File("big.bin", (f"{server.url}/big.bin",)))
    fetch.fetch("big")
    assert "asset big is UNVERIFIED: no published hash" in caplog.text
    assert (cache / "big.bin.sha256").read_text() == f"{SHA}  big.bin\n"
    caplog.clear()
    fetch.fetch("big")
    assert not caplog.text
    (cache / "big.bin").write_bytes(BYTES[:-1])
    assert "is not the expected file" in refused()


def test_the_hubs_own_hash_verifies_a_file(serve, register, cache, caplog):
    server = serve({"big.bin": BYTES}, redirect={"X-Linked-Etag": f'"{SHA}"'})
    register("big", assets.File("big.bin", (f"{server.url}/big.bin",)))
    fetch.fetch("big")
    assert "UNVERIFIED" not in caplog.text
    assert (cache / "big.bin.sha256").exists()
    for path in cache.iterdir():
        path.unlink()
    server.redirect = {"X-Linked-Etag": '"' + "0" * 64 + '"'}
    assert "instead of 0000" in refused()
    assert contents(cache) == []


def test_what_is_placed_by_hand_is_not_downloaded(serve, register, cache):
    server = serve({"big.bin": BYTES})
    file = assets.File("big.bin", (f"{server.url}/big.bin",), SHA)
    register("big", file, by_hand="accept the licence on the home page")
    message = refused()
    assert "accept the licence on the home page" in message
    assert "https://example.org" in message
    assert not server.asked
    (cache / "big.bin").write_bytes(BYTES)
    assert fetch.fetch("big") == cache / "big.bin"


def test_many_files_have_one_address(register, cache, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    names = ["config.json", *(f"unet/{i}" for i in range(5))]
    files = [assets.File(f"hub/{name}", (f"http://127.0.0.1:9/r/{name}",)) for name in names]
    register("hub", *files)
    message = refused("hub")
    assert "put config.json, unet/0, unet/1" in message
    assert "(all from http://127.0.0.1:9/r)" in message
    assert f"{cache}/hub, or name the folder that holds hub" in message


def test_several_files_and_one_that_fails(serve, register, cache, capsys):
    server = serve({"a": BYTES}, status=[])
    files = [assets.File(f"pair/{n}", (f"{server.url}/{n}",), SHA) for n in ("a", "b")]
    register("pair", *files)
    assert "b: HTTP 404" in refused("pair")
    assert contents(cache) == ["pair/a"]  # verified, so it may stay
    server.files["b"] = BYTES
    server.asked.clear()
    assert fetch.fetch("pair") == cache / "pair"
    assert len(server.asked) == 1
    register("gone", assets.File("gone", (f"{server.url}/gone",), SHA))
    assert cli.main(["assets", "fetch", "gone", "pair"]) == 2
    streams = capsys.readouterr()
    assert "asset gone could not be fetched" in streams.err
    assert str(cache / "pair") in streams.out


@pytest.fixture
def made(register, serve, tmp_path):
    """A data set "made" of an archive that a server has; its bytes as they must become."""
    x = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), np.uint8)
    y = np.arange(6, dtype=np.uint8)
    source = tmp_path / "source.npz"
    np.savez(source, x_train=x[:4], y_train=y[:4], x_test=x[4:], y_test=y[4:])
    server = serve({"source.npz": source.read_bytes()})
    sha = hashlib.sha256(source.read_bytes()).hexdigest()
    register("raw", assets.File("raw.npz", (f"{server.url}/source.npz",), sha), kind="original")
    datasets.convert("arrays", [source], tmp_path / "expected.npz")
    expected = (tmp_path / "expected.npz").read_bytes()

    def add(sha256=None):
        file = assets.File("datasets/made.npz", sha256=sha256)
        register("made", file, kind="dataset", made_from={"raw": "arrays"})
        return expected

    return add


def test_a_data_set_is_made_when_it_is_fetched(made, cache):
    expected = made()
    with pytest.raises(UserError, match="It is made of raw"):
        assets.load_dataset("made")
    path = fetch.fetch("made")
    assert path == cache / "datasets" / "made.npz"
    assert path.read_bytes() == expected
    assert contents(cache) == ["datasets/made.npz", "datasets/made.npz.sha256", "raw.npz"]
    data = assets.load_dataset("made")
    assert data.train_images.shape == (4, 3, 32, 32)
    assert data.reference_labels.tolist() == [4, 5]
    path.write_bytes(expected[:-1])
    with pytest.raises(UserError, match="not the expected file"):
        assets.load_dataset("made")


def test_a_conversion_is_held_to_its_own_hash(made, cache):
    expected = made("0" * 64)
    assert "instead of 0000" in refused("made")
    assert contents(cache) == ["raw.npz"]
    made(hashlib.sha256(expected).hexdigest())
    fetch.fetch("made")
    assert contents(cache) == ["datasets/made.npz", "raw.npz"]


def test_a_cache_that_cannot_be_converted_to(made, cache, no_cache):
    made()
    (cache.parent / "source.npz").rename(cache.parent / "mirror" / "raw.npz")
    unwritable("made")


def test_originals_of_another_layout_are_named_with_what_they_are_for(made, register, cache):
    made()
    (cache.parent / "mirror" / "raw.npz").write_bytes(BYTES)
    raw = assets.File("raw.npz", sha256=SHA)
    register("raw", raw, kind="original")
    assert refused("made").startswith("asset made: ")
    assert contents(cache) == []


CONVERSION = """
import sys, time
from prunebench import assets
from prunebench.assets import datasets, fetch
def half(conversion, files, part, images):
    part.write_bytes(b"half")
    time.sleep(60)
datasets.convert = half
words = dict(description="d", licence="l", home="h")
raw, made = assets.File("raw.npz", (), sys.argv[1]), assets.File("datasets/made.npz")
assets.ASSETS["raw"] = assets.Asset(name="raw", kind="original", files=(raw,), **words)
assets.ASSETS["made"] = assets.Asset(
    name="made", kind="dataset", files=(made,), made_from={"raw": "arrays"}, **words)
fetch.fetch("made")
"""


def test_a_killed_conversion_leaves_nothing_that_stays(made, cache):
    expected, sha = made(), assets.ASSETS["raw"].files[0].sha256
    fetch.fetch("raw")
    process = subprocess.Popen([sys.executable, "-c", CONVERSION, sha])
    part, deadline = cache / "datasets" / "made.npz.part", time.monotonic() + 60
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    assert "asset made: another process is writing" in refused("made")
    assert part.read_bytes() == b"half"
    process.kill()
    process.wait()
    assert contents(cache) == ["datasets/made.npz.part", "raw.npz"]
    with pytest.raises(UserError, match="was not found"):
        assets.locate("made")
    assert fetch.fetch("made").read_bytes() == expected
    assert contents(cache) == ["datasets/made.npz", "datasets/made.npz.sha256", "raw.npz"]


def test_originals_that_cannot_be_had_are_named(made, register, cache, serve):
    made()
    raw = assets.ASSETS["raw"].files[0]
    file = assets.File("raw.npz", (), raw.sha256)
    register("raw", file, kind="original", by_hand="agree to the terms")
    message = refused("made")
    for part in ("made cannot be downloaded", "agree to the terms", "raw.npz", "assets fetch made"):
        assert part in message


def test_a_cache_without_locks_is_written_all_the_same(serve, offer, cache, monkeypatch, caplog):
    """It was taken for a full disk."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    server = serve({"big.bin": BYTES})
    offer(f"{server.url}/big.bin")
    monkeypatch.setattr(download.fcntl, "flock", flock)
    assert fetch.fetch("big").read_bytes() == BYTES
    assert "No locks available; fetch it in one process at a time" in caplog.text
    assert contents(cache) == ["big.bin"]
