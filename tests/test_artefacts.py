"""Files appear whole or not at all."""

import json
import os
import subprocess

import pytest
import torch

from prunebench.errors import UserError
from prunebench.records import artefacts


def test_json_round_trip(tmp_path):
    file = tmp_path / "deep" / "er" / "a.json"
    artefacts.write_json(file, {"a": [1, 0.1], "b": None})
    assert artefacts.read_json(file) == {"a": [1, 0.1], "b": None}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_without_numbers_that_are_none(tmp_path, value):
    artefacts.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        artefacts.write_json(tmp_path / "a.json", {"a": value})
    assert artefacts.read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, error):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")

    def half(path):
        path.write_bytes(b"ha")
        raise error

    with pytest.raises(type(error)):
        artefacts.write_atomically(file, half)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert file.read_bytes() == b"old"


def test_a_full_disk_is_the_users(tmp_path):
    def full(path):
        path.write_bytes(b"ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"cannot write .*a\.bin: No space left on device; free space"
    ):
        artefacts.write_atomically(tmp_path / "a.bin", full)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*folder/a\.json"):
        artefacts.write_json(tmp_path / "folder" / "a.json", {})


def test_two_late_copies_of_a_job_do_not_mix(tmp_path):
    """Each writes under its own temporary name; the last rename wins, whole."""
    file, seen = tmp_path / "a.bin", []

    def outer(path):
        path.write_bytes(b"outer")
        artefacts.write_atomically(
            file, lambda inner: seen.append(inner) or inner.write_bytes(b"in")
        )
        seen.append(path)

    artefacts.write_atomically(file, outer)
    assert file.read_bytes() == b"outer" and len(set(seen)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path):
    """Of this machine, of the same file, of processes that are no more; and nothing else."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    node, dead, own = os.uname().nodename, ended.pid, os.getpid()
    gone = [f".a.json.{node}-{dead}-0123abcd.part"]
    kept = [f".a.json.{node}-{own}-0123abcd.part", f".b.json.{node}-{dead}-0123abcd.part"]
    kept += [f".a.json.other-{dead}-0123abcd.part", ".a.json.mine.part", "a.json"]
    for name in gone + kept:
        (tmp_path / name).write_text("half")
    artefacts.write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_missing_and_corrupt_json_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.json does not exist; run the stage that writes it"):
        artefacts.read_json(tmp_path / "no.json")
    for content in (b'{"a": 1', b"\xff\xfe", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json is corrupt .* delete it and run again"):
            artefacts.read_json(tmp_path / "bad.json")


def test_tensors_round_trip_bit_identically(tmp_path):
    tensors = {
        "strided": torch.randn(4, 6).T,
        "odd": torch.tensor([float("nan"), -0.0, float("inf")]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "labels": torch.tensor([3, -1]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
    }
    artefacts.write_tensors(tmp_path / "t.safetensors", tensors)
    again = artefacts.read_tensors(tmp_path / "t.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        same = again[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes()
        assert same, name


def test_missing_and_corrupt_tensors_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.safetensors does not exist"):
        artefacts.read_tensors(tmp_path / "no.safetensors")
    file = tmp_path / "t.safetensors"
    artefacts.write_tensors(file, {"a": torch.ones(100)})
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:4], b"", b"\x00" * 64):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.safetensors is corrupt"):
            artefacts.read_tensors(file)


def test_equal_content_is_equal_bytes(tmp_path):
    """Records are hashed, so writing the same thing twice must give the same file."""
    for name in ("a", "b"):
        artefacts.write_json(tmp_path / f"{name}.json", {"x": 0.1, "y": [1]})
        artefacts.write_tensors(tmp_path / f"{name}.st", {"x": torch.ones(3), "a": torch.zeros(2)})
    for kind in ("json", "st"):
        left, right = (artefacts.sha256(tmp_path / f"{name}.{kind}") for name in "ab")
        assert left == right
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 0.1, "y": [1]}
