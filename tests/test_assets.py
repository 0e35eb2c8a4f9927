import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from prunebench import assets, cli, models, tracks
from prunebench.assets import datasets, npz, registry, store
from prunebench.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_fashion_mnist_16.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_fashion_mnist_16", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def small(register, tmp_path):
    """A registry with one unpackaged asset, an empty mirror and an empty cache."""
    register("small", assets.File("small.bin", ("https://example.org/small.bin",), ABC, size=3))
    return tmp_path


def test_dataset_shapes_and_balance():
    data = assets.load_dataset("fashion_mnist_16")
    assert data.train_images.shape == (20_000, 1, 16, 16)
    assert data.reference_images.shape == (10_000, 1, 16, 16)
    assert data.train_images.dtype == data.reference_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.reference_labels.dtype == torch.int64
    entry = assets.data_set("fashion_mnist_16")
    assert data.train_images.shape[1:] == entry.shape
    assert data.train_labels.unique().tolist() == list(range(entry.classes))
    assert data.reference_labels.bincount().tolist() == [1000] * 10
    assert data.train_labels.bincount().min() >= 1900
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0]  # as in the official file


def test_limits_give_the_first_images():
    whole = assets.load_dataset("fashion_mnist_16")
    part = assets.load_dataset("fashion_mnist_16", limit_train=7, limit_reference=3)
    assert torch.equal(part.train_images, whole.train_images[:7])
    assert torch.equal(part.reference_labels, whole.reference_labels[:3])
    for limit in (0, 20_001):
        with pytest.raises(UserError, match="1 to 20000"):
            assets.load_dataset("fashion_mnist_16", limit_train=limit)


def test_mirror_comes_before_cache_and_argument_before_environment(small):
    (small / "cache" / "small.bin").write_text("abc")
    assert assets.locate("small") == small / "cache" / "small.bin"
    (small / "mirror" / "small.bin").write_text("abc")
    assert assets.locate("small") == small / "mirror" / "small.bin"
    assert assets.locate("small", mirror=small / "cache") == small / "cache" / "small.bin"


def test_missing_asset_says_how_to_place_it(small):
    with pytest.raises(UserError) as error:
        assets.locate("small")
    message = str(error.value)
    expected = assets.ASSETS["small"]
    (file,) = expected.files
    for part in ("small", "three bytes", file.sources[0], file.sha256, "assets fetch small"):
        assert part in message
    for folder in ("mirror", "cache"):
        assert str(small / folder / "small.bin") in message


def test_wrong_file_is_refused_also_after_a_right_one(small):
    path = small / "mirror" / "small.bin"
    path.write_text("abc")
    assets.locate("small")
    path.write_text("abcd")
    (small / "cache" / "small.bin").write_text("abc")  # must not be taken in its stead
    with pytest.raises(UserError) as error:
        assets.locate("small")
    assert str(path) in str(error.value)
    assert ABC in str(error.value)
    assert "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589" in str(error.value)


def test_hash_is_computed_once(small, monkeypatch):
    (small / "cache" / "small.bin").write_text("abc")
    calls, whole = [], store.hashlib.file_digest
    count = lambda *arguments: calls.append(arguments) or whole(*arguments)  # noqa: E731
    monkeypatch.setattr(store.hashlib, "file_digest", count)
    assets.locate("small")
    assets.locate("small")
    assert len(calls) == 1


def test_several_files_are_one_folder(register, tmp_path):
    register("pair", assets.File("pair/a", sha256=ABC), assets.File("pair/b", sha256=ABC[:8]))
    folder = tmp_path / "cache" / "pair"
    folder.mkdir()
    (folder / "a").write_text("abc")
    with pytest.raises(UserError, match="pair is incomplete: pair/b is missing"):
        assets.locate("pair")
    (folder / "b").write_text("abc")
    store.note(folder / "b", ABC)
    assert assets.locate("pair") == folder
    (folder / "b").write_text("abd")
    with pytest.raises(UserError, match=f"instead of {ABC[:8]};"):
        assets.locate("pair")
    (folder / "b").unlink()
    (tmp_path / "mirror" / "pair").mkdir()
    (tmp_path / "mirror" / "pair" / "b").write_text("abc")
    with pytest.raises(UserError, match="spread over"):
        assets.locate("pair")


def test_an_alternative_serves_where_the_asset_is_absent(small, register):
    register("first", assets.File("first.bin", sha256=ABC), alternatives=("small",))
    with pytest.raises(UserError, match="small will do instead"):
        assets.locate("first")
    (small / "cache" / "small.bin").write_text("abc")
    assert assets.locate("first") == small / "cache" / "small.bin"
    (small / "cache" / "first.bin").write_text("abc")
    assert assets.locate("first") == small / "cache" / "first.bin"


def test_without_a_published_hash_the_recorded_one_holds(register, tmp_path):
    register("free", assets.File("free.bin"))
    path = tmp_path / "mirror" / "free.bin"
    path.write_text("abc")
    with pytest.raises(UserError, match="none was recorded yet; `prunebench assets fetch free`"):
        assets.locate("free")
    note = tmp_path / "cache" / "free.bin.sha256"  # as sha256sum and `fetch` write it
    note.write_text(f"{ABC}  free.bin\n")
    assert assets.locate("free") == path
    path.write_text("abcd")
    with pytest.raises(UserError, match="not the expected file"):
        assets.locate("free")
    note.write_text("garbage")
    with pytest.raises(UserError, match="holds no sha256"):
        assets.locate("free")


def test_unknown_names_and_other_files(small):
    with pytest.raises(UserError, match=r"known are .*fashion_mnist_16"):
        assets.locate("cifar")
    (small / "cache" / "small.bin").write_text("abc")
    with pytest.raises(UserError, match="not a data set"):
        assets.load_dataset("small")


def test_only_data_sets_have_a_shape():
    with pytest.raises(UserError, match=r"'lpips-alex' is not a data set; .*fashion_mnist_16"):
        assets.data_set("lpips-alex")
    with pytest.raises(UserError, match="unknown asset 'cifar'"):
        assets.data_set("cifar")


def test_pickled_data_is_never_loaded(small, monkeypatch):
    path = small / "cache" / "small.bin"
    with path.open("wb") as file:
        np.savez(file, train_images=np.array([{}], dtype=object))
    entry = assets.ASSETS["small"]
    free = replace(entry, files=(replace(entry.files[0], sha256=None, md5=_md5(path)),))
    monkeypatch.setitem(assets.ASSETS, "small", free)
    with pytest.raises(UserError, match="pickle"):
        assets.load_dataset("small")


def _md5(path):
    status = path.stat()
    return store.digest(path, "md5", status.st_mtime_ns, status.st_size)


def test_training_images_can_be_the_reference(monkeypatch, register, tmp_path):
    register("tiny", assets.File("tiny.npz"), kind="dataset")
    path = tmp_path / "cache" / "tiny.npz"
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    labels = np.array([0, 1], np.uint8)
    npz.write_npz(
        path,
        {
            "train_images": images,
            "train_labels": labels,
            "reference_images": images[:1] + 1,
            "reference_labels": labels[:1],
        },
    )
    digest = store.digest(path, "sha256", path.stat().st_mtime_ns, path.stat().st_size)
    store.note_of(path).write_text(digest)
    held_out, train = (assets.load_dataset("tiny", reference=r) for r in ("held_out", "train"))
    assert torch.equal(held_out.reference_images, torch.from_numpy(images[:1] + 1))
    assert torch.equal(train.reference_images, train.train_images)
    assert len(assets.load_dataset("tiny", reference="train", limit_reference=1).reference_labels)
    flip = assets.load_dataset("tiny", flip=True)
    assert flip.flip and not train.flip
    assert torch.equal(flip.train_images, train.train_images)  # mirrored when they are drawn


def _placed(path):
    store.note_of(path).write_text(
        store.digest(path, "sha256", path.stat().st_mtime_ns, path.stat().st_size)
    )


def test_a_published_reference_brings_its_own_statistics(register, tmp_path):
    register("tiny", assets.File("tiny.npz"), kind="dataset")
    register("batch", assets.File("batch.npz"), kind="reference")
    cache, images = tmp_path / "cache", np.arange(5 * 4 * 4 * 3, dtype=np.uint8)
    images, mu, sigma = images.reshape(5, 4, 4, 3), np.arange(3.0), np.eye(3)
    train = {"train_images": images.transpose(0, 3, 1, 2).copy(), "train_labels": np.arange(5)}
    np.savez(cache / "tiny.npz", **train)
    np.savez(cache / "batch.npz", arr_0=images, mu=mu, sigma=sigma)
    for name in ("tiny", "batch"):
        _placed(cache / f"{name}.npz")
    data = assets.load_dataset("tiny", reference="batch", limit_reference=4)
    assert torch.equal(data.reference_images, data.train_images[:4])
    assert [tuple(s.shape) for s in data.statistics] == [(3,), (3, 3)]
    assert "tiny.npz" in Path("/proc/self/maps").read_text()  # mapped, not read
    with pytest.raises(UserError, match="tiny has no 'held_out' images; name an asset"):
        assets.load_dataset("tiny")
    with pytest.raises(UserError, match="'tiny' is no reference batch in ADM's format"):
        assets.load_dataset("tiny", reference="tiny")


# ---- the registry


@pytest.mark.parametrize("entry", assets.ASSETS.values(), ids=str)
def test_every_entry_is_whole(entry):
    assert entry.kind in registry.KINDS
    assert entry.description and entry.licence
    assert entry.home.startswith("https://")
    assert entry.files
    for file in entry.files:
        assert not Path(file.path).is_absolute()
        assert ".." not in Path(file.path).parts
        assert all(source.startswith(("http://", "https://")) for source in file.sources)
        assert re.fullmatch(r"([0-9a-f]{8}){1,8}", file.sha256 or "0" * 8)
        assert re.fullmatch(r"[0-9a-f]{32}", file.md5 or "0" * 32)
        assert (store.DATA / file.path).exists() == entry.packaged
    assert set(entry.alternatives) | set(entry.made_from or ()) <= set(assets.ASSETS)
    assert set((entry.made_from or {}).values()) <= set(datasets.names())
    assert (entry.kind == "dataset") == bool(entry.shape) >= bool(entry.classes)  # captions
    # There is always a way: a source for every file, the package, originals, or words.
    assert entry.downloadable or entry.packaged or entry.made_from or entry.by_hand


def test_files_of_the_registry_never_collide():
    paths = [file.path for entry in assets.ASSETS.values() for file in entry.files]
    assert len(paths) == len(set(paths))


def test_hub_files_are_addressed_by_commit():
    (config, _) = assets.ASSETS["ddpm_cifar10"].files
    assert config.path == "ddpm_cifar10/config.json"
    assert config.sources == (
        "https://huggingface.co/google/ddpm-cifar10-32/resolve/"
        "267b167dc01f0e4e61923ea244e8b988f84deb80/config.json",
    )
    assert registry.pinned(assets.ASSETS["ddpm_cifar10"])
    assert not registry.pinned(assets.ASSETS["ddpm_church256"])


def test_a_published_configuration_names_the_files_that_are_fetched():
    content = yaml.safe_load(registry.REGISTRY.read_text())
    hubs = {name: entry["hub"] for name, entry in content.items() if "hub" in entry}
    found = {
        name: entry.checkpoint.partition(": ")
        for family in models.family_names()
        for name, entry in models.published(family).items()
        if name in hubs
    }
    assert {"sd15", "ddpm_cifar10", "ddpm_church256", "flux_dev"} <= set(found)
    for name, (repository, _, part) in found.items():
        assert repository == hubs[name]
        assert any(
            f"{file.path}/".startswith(f"{name}/{part}/") for file in assets.ASSETS[name].files
        )


def test_packaged_data_is_small():
    assert (assets.DATA / "fashion_mnist_16.npz").stat().st_size < 5 * 2**20


def test_the_registry_is_free_of_torch():
    code = "import sys, prunebench.assets.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DOCUMENT = (Path(__file__).parents[1] / "docs" / "assets.md").read_text()


@pytest.mark.parametrize("entry", assets.ASSETS.values(), ids=str)
def test_the_document_lists_the_registry(entry):
    row = f"| `{entry.name}` | {entry.description} | {entry.licence} |"
    assert row in DOCUMENT


def test_the_document_lists_nothing_else():
    tables = DOCUMENT.partition("\n## The registry\n")[2]
    listed = re.findall(r"^\| `([\w-]+)` \|", tables, re.MULTILINE)
    assert sorted(listed) == sorted(assets.ASSETS)


# ---- the command


def test_list_says_what_is_there(small, capsys):
    assert cli.main(["assets", "list", "small", "fashion_mnist_16", "cifar10", "imagenet"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "to fetch" in lines["small"]
    assert "3 B" in lines["small"]
    assert "packaged" in lines["fashion_mnist_16"]
    assert "184 MB" in lines["cifar10"]
    assert "by hand" in lines["imagenet"]
    (small / "mirror" / "small.bin").write_text("abc")
    assert cli.main(["assets", "list"]) == 0
    assert re.search("^small .*in the mirror", capsys.readouterr().out, re.MULTILINE)


def test_list_says_which_tracks_read_an_asset(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[1]
    (tmp_path / "config").mkdir()
    (tmp_path / "methods").symlink_to(root / "methods")
    monkeypatch.chdir(tmp_path)
    for name in ("celeba64", "text2image_flux"):
        (tmp_path / f"config/{name}.yaml").symlink_to(root / f"config/{name}.yaml")
    (tmp_path / "config/unfinished.yaml").write_text("title: mine")
    names = ("celeba_aligned", "inception_pool3", "flux_dev", "sd15")
    assert cli.main(["assets", "list", *names]) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert told["celeba_aligned"].endswith(" celeba64")  # converted to what the track reads
    assert told["inception_pool3"].endswith(" celeba64, text2image_flux")  # serves as inception
    assert told["flux_dev"].endswith(" text2image_flux")
    assert told["sd15"].endswith(" text2image")  # a shipped track


def test_verify_tells_corrupt_from_missing(small, capsys):
    assert cli.main(["assets", "verify"]) == 0  # what is missing is nobody's business
    assert cli.main(["assets", "verify", "small"]) == 2
    assert "was not found" in capsys.readouterr().err
    (small / "cache" / "small.bin").write_text("abd")
    assert cli.main(["assets", "verify"]) == 2
    streams = capsys.readouterr()
    assert "NOT OK   small" in streams.out
    assert "ok       fashion_mnist_16" in streams.out
    assert "not the expected file" in streams.err


def test_a_track_names_its_assets(capsys, tmp_path):
    track = str(Path(__file__).parents[1] / "config" / "smoke.yaml")
    assert cli.main(["assets", "fetch", "--track", track, "--record", f"{tmp_path}/r.json"]) == 0
    assert "fashion_mnist_16.npz" in capsys.readouterr().out
    assert "7992ba25e7dd12cf" in (tmp_path / "r.json").read_text()
    names = ["imagenet256", "adm_imagenet256", "inception", "lpips-alex", "dit_xl_2_256"]
    found = tracks.load(str(Path(__file__).parents[1] / "config" / "imagenet256.yaml")).assets()
    assert found[:5] == names and found[-1] == "sd_vae_ft_ema"
    assert cli.main(["assets", "fetch"]) == 2
    assert "name assets, or a track" in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_asset_stops_the_workflow_before_any_job(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "mirror"))
    root, project = Path(__file__).parents[1], tmp_path / "project"
    project.mkdir()
    for part in ("Snakefile", "workflow", "methods", "envs"):
        (project / part).symlink_to(root / part)
    shutil.copytree(root / "config", project / "config")
    mine = "base: celeba64\ntitle: On the CPU\nneeds: {default: {cpu_instead: true}}\n"
    (project / "config" / "mine.yaml").write_text(mine)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["snakemake", "--cores", "1", "--config", "track=mine", "disk=any"],
        cwd=project,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 1
    assert "asset celeba64 cannot be downloaded" in output
    assert "agree to the terms" in output
    assert f"{tmp_path}/mirror/celeba_aligned" in output
    assert "rule dense" not in output


# ---- scripts/build_fashion_mnist_16.py


def test_area_average_is_exact(script):
    columns = np.zeros((1, 28, 28), np.uint8)
    columns[:, :, 1] = 70  # source column 1 covers .75 of target column 0 and .25 of column 1
    expected = [30, 10] + [0] * 14  # of 1.75: 3/7 and 1/7
    assert script.area_average(columns)[0].tolist() == [expected] * 16
    rows = columns.transpose(0, 2, 1)
    assert script.area_average(rows)[0].T.tolist() == [expected] * 16
    assert (script.area_average(np.full((2, 28, 28), 255, np.uint8)) == 255).all()


def test_area_average_agrees_with_torch(script):
    images = torch.randint(0, 256, (3, 28, 28), generator=torch.Generator().manual_seed(0))
    quarters = images.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].float()
    expected = torch.nn.functional.avg_pool2d(quarters, 7).round()[:, 0]
    result = script.area_average(images.numpy().astype(np.uint8))
    assert torch.equal(torch.from_numpy(result).float(), expected)


def test_build_refuses_other_originals(script, tmp_path):
    import gzip

    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(SystemExit, match="expected c59f468a"):
        script.build(tmp_path)
