import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prunebench import assets
from prunebench.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_fashion_mnist_16.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_fashion_mnist_16", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A registry with one unpackaged asset, an empty mirror and an empty cache."""
    entry = assets.Asset(
        name="small",
        description="three bytes",
        file="small.bin",
        sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # of "abc"
        licence="none",
        sources=("https://example.org/small.bin",),
        needed_by="this test",
    )
    monkeypatch.setitem(assets.ASSETS, "small", entry)
    for folder in ("mirror", "cache"):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(f"PRUNEBENCH_{folder.upper()}", str(tmp_path / folder))
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
    for part in ("small", "this test", expected.sources[0], expected.sha256):
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
    assert assets.ASSETS["small"].sha256 in str(error.value)
    assert "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589" in str(error.value)


def test_hash_is_computed_once(small, monkeypatch):
    (small / "cache" / "small.bin").write_text("abc")
    calls = []
    digest = assets.ASSETS["small"].sha256
    monkeypatch.setattr(assets, "sha256", lambda path: calls.append(path) or digest)
    assets.locate("small")
    assets.locate("small")
    assert len(calls) == 1


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
    entry = replace(assets.ASSETS["small"], sha256=assets.sha256(path))
    monkeypatch.setitem(assets.ASSETS, "small", entry)
    with pytest.raises(UserError, match="pickle"):
        assets.load_dataset("small")


def test_every_asset_is_documented_and_packaged_files_exist():
    for name, entry in assets.ASSETS.items():
        assert entry.name == name
        assert len(entry.sha256) == 64
        assert entry.sources
        assert entry.licence
        assert (assets.DATA / entry.file).exists() == entry.packaged
    assert (assets.DATA / "fashion_mnist_16.npz").stat().st_size < 5 * 2**20


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


def test_npz_bytes_depend_on_the_arrays_only(script, tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for name in ("a", "b"):
        script.write_npz(tmp_path / name, {"x": array})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (np.load(tmp_path / "a", allow_pickle=False)["x"] == array).all()


def test_build_refuses_other_originals(script, tmp_path):
    import gzip

    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(SystemExit, match="expected c59f468a"):
        script.build(tmp_path)
