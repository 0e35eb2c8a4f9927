"""Files that lie elsewhere than in runs/ are those that the run began with, when they are used."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny

from prunebench import assets
from prunebench.assets import fetch, store
from prunebench.errors import UserError
from prunebench.models import official
from prunebench.records import artefacts, parts, schema, sealed
from prunebench.stages import dense, inputs, score

SMOKE = tiny.smoke()
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def began_with(job, **hashes: dict[str, str]) -> None:
    """Write the record of what the track's run began with."""
    identity = parts.Identity(stage="assets", track=job.track.name)
    sealed.write(job.path("assets"), schema.Assets(identity=identity, assets=hashes))


def test_an_asset_is_the_file_that_the_run_began_with(register, tmp_path):
    register("free", assets.File("free.bin"))
    file, job = tmp_path / "cache" / "free.bin", tiny.job("extractor", SMOKE, tmp_path)
    file.write_text("abc")
    fetch.fetch("free")
    assert inputs.located(job, "free") == file  # by hand, without a run's record
    began_with(job, free={"free.bin": ABC})
    assert inputs.located(job, "free") == file
    file.write_text("abd")
    with pytest.raises(UserError, match="not the expected file"):
        inputs.located(job, "free")
    store.note_of(file).unlink()  # and, as if it had been fetched anew
    fetch.fetch("free")
    with pytest.raises(UserError, match=r"asset free: free\.bin is another file than when the run"):
        inputs.located(job, "free")


def test_every_stage_takes_assets_through_that_check():
    stages = Path(inputs.__file__).parent.glob("*.py")
    by_themselves = {file.name for file in stages if "locate(" in file.read_text()}
    assert by_themselves == {"inputs.py", "assets.py"}  # and `assets verify`


def test_a_data_set_that_was_exchanged_under_a_run_is_refused(tmp_path):
    job = tiny.job("dense", SMOKE, tmp_path, model="dit")
    began_with(job, fashion_mnist_16={"fashion_mnist_16.npz": ABC})
    for used in (inputs.dataset, lambda job: inputs.training_data(job).images):
        with pytest.raises(UserError, match=r"asset fashion_mnist_16: .* is another file than"):
            used(job)


def test_a_record_of_another_data_set_is_refused(tmp_path, monkeypatch):
    cell = SMOKE.cell("dit", "dense", 0.0, "none", 0)
    job, now = tiny.job("select", SMOKE, tmp_path, cell), inputs.data_set
    record = schema.Dense.model_construct(inputs=now(job))
    inputs.check_data(job, "dense", record)
    monkeypatch.setattr(inputs, "data_set", lambda job: dict.fromkeys(now(job), ABC))
    with pytest.raises(UserError, match=r"dense\.json was made from another dataset/fashion"):
        inputs.check_data(job, "dense", record)
    inputs.check_data(job, "dense", schema.Dense.model_construct(inputs={}))  # of a released model


def test_weights_that_are_changed_while_they_are_read_are_refused(tmp_path, monkeypatch):
    track, file = tiny.released(tmp_path)
    load = official.load

    def loaded(*given):
        network = load(*given)
        file.write_bytes(file.read_bytes() + b" ")
        return network

    record = sealed.read(tiny.run("dense", track, tmp_path / "runs", model="dit"))
    assert record.inputs["weights"] == artefacts.sha256(file)
    monkeypatch.setattr(dense.official, "load", loaded)
    with pytest.raises(UserError, match=r"model\.safetensors was changed while it was read"):
        tiny.run("dense", track, tmp_path / "runs", model="dit")


def test_a_score_says_which_files_its_metrics_read(register, tmp_path, monkeypatch):
    register("lpips-alex", assets.File("alex.pth", sha256=ABC[:8]))
    (tmp_path / "cache" / "alex.pth").write_text("abc")
    content = tiny.plain(SMOKE)
    content["evaluation"]["lpips"] = "alex"
    track = tiny.track("alex", content, SMOKE.methods)
    cell = track.cell("dit", "dense", 0.0, "none", 0)
    job = tiny.job("score", track, tmp_path, cell)
    with pytest.raises(UserError, match=r"no whole sha256 is published .* none was recorded yet"):
        score._weights(job, {"lpips": "alex"})
    fetch.fetch("lpips-alex")
    assert score._weights(job, {"lpips": "alex"})["lpips"].name == "alex.pth"
    assert score._metrics_made_from(job) == {"lpips/alex.pth": ABC}


# How well an asset is known.


def test_a_part_of_a_hash_is_not_taken_for_the_whole(register, tmp_path, caplog):
    """The first digits of the publisher's, then the whole one that was recorded by `fetch`."""
    register("part", assets.File("part.bin", sha256=ABC[:8]))
    file = tmp_path / "mirror" / "part.bin"
    file.write_text("abd")
    with pytest.raises(UserError, match=f"instead of {ABC[:8]}"):
        fetch.fetch("part")
    file.write_text("abc")
    with pytest.raises(UserError, match="`prunebench assets fetch part` records it"):
        assets.locate("part")
    assert fetch.fetch("part") == assets.locate("part") == file
    assert "UNVERIFIED" not in caplog.text
    assert (tmp_path / "cache" / "part.bin.sha256").read_text().startswith(ABC)
    # Another file with the same first digits, which can't be made for a test: of a note it is one.
    (tmp_path / "cache" / "part.bin.sha256").write_text(f"{ABC[:8]}{'0' * 56}  part.bin\n")
    with pytest.raises(UserError, match=re.escape(f"instead of {ABC[:8]}00000")):
        assets.locate("part")


def test_the_registry_says_whole_hashes_or_has_them_recorded():
    whole = {f.path: len(f.sha256) for e in assets.ASSETS.values() for f in e.files if f.whole}
    assert set(whole.values()) == {64} and len(whole) > 20
    torchvisions = assets.asset("alexnet_imagenet").files[0]
    assert torchvisions.checksum and not torchvisions.whole


@pytest.mark.parametrize("variable", ["PRUNEBENCH_CACHE", "PRUNEBENCH_MIRROR"])
def test_home_is_expanded_in_the_environment(register, tmp_path, monkeypatch, variable):
    register("small", assets.File("small.bin", sha256=ABC))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.bin").write_text("abc")
    assert assets.locate("small") == tmp_path / "mine" / "small.bin"
    monkeypatch.setenv(variable, "~nobodyofthisname/mine")
    with pytest.raises(UserError, match=f"{variable}='~nobodyofthisname/mine'"):
        assets.locate("small")


def test_without_a_home_the_remedy_is_named(register, monkeypatch):
    """As of a user whom the machine does not know, in a container."""
    register("small", assets.File("small.bin", sha256=ABC))
    for variable in ("PRUNEBENCH_CACHE", "HOME"):
        monkeypatch.delenv(variable)
    monkeypatch.setattr(os, "getuid", lambda: 2**31)
    with pytest.raises(UserError, match="no home folder; name a folder in PRUNEBENCH_CACHE"):
        assets.locate("small")


def test_a_home_that_cannot_be_written_is_named_before_make_begins(monkeypatch):
    """Snakemake and uv would end in a traceback."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    command = ["make", "-C", str(tiny.ROOT), "writable"]
    told = subprocess.run(
        [*command, "HOME=/proc/nobody"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "/proc/nobody/.cache can't be written" in told.stderr
    assert "XDG_CACHE_HOME=/path/to/folder make" in told.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_file_that_is_written_again_is_hashed_again(tmp_path):
    """Also where size and time of change were put back, as `cp --preserve` does."""
    file = tmp_path / "a"
    file.write_text("abc")
    before = file.stat()
    assert store.digest_of(file) == ABC
    file.write_text("abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.digest_of(file) != ABC
