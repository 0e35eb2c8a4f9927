"""Published archives -> the suite's layout, on small archives built like the published ones."""

import io
import tarfile
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from prunebench.assets import datasets, load, npz, pictures
from prunebench.assets.datasets import imagenet_archive
from prunebench.errors import UserError

GENERATOR = np.random.default_rng(0)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def picture(shade: int, width: int, height: int) -> bytes:
    handle = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade, shade)).save(handle, "png")
    return handle.getvalue()


def converted(name, files, tmp_path) -> dict[str, np.ndarray]:
    """The arrays, after a check of `twice` and that they are images and labels."""
    arrays = twice(name, files, tmp_path)
    assert set(arrays) == {f"{s}_{k}" for s in ("train", "reference") for k in ("images", "labels")}
    assert all(array.dtype == np.uint8 for array in arrays.values())
    return arrays


def twice(name, files, tmp_path) -> dict[str, np.ndarray]:
    """The arrays, after a check that converting twice gives the same bytes."""
    for target in ("one.npz", "two.npz"):
        datasets.convert(name, files, tmp_path / target)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def shades(images: np.ndarray) -> list[int]:
    assert (images == images[:, :1, :1, :1]).all()  # every picture is of one shade
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def cifar(tmp_path):
    """Two records a batch, as NHWC arrays and as the binary version."""
    x = GENERATOR.integers(0, 256, (12, 32, 32, 3), np.uint8)
    y = np.arange(12, dtype=np.uint8) % 10
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, x_train=x[:10], y_train=y[:10].reshape(-1, 1), x_test=x[10:], y_test=y[10:])
    records = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(12, -1)], axis=1)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    with tarfile.open(tmp_path / "binary.tar.gz", "w:gz") as tar:
        for index, name in reversed(list(enumerate(names))):  # the order in the archive is free
            content = records[2 * index : 2 * index + 2].tobytes()
            add(tar, f"cifar-10-batches-bin/{name}.bin", content)
    return x, y, arrays, tmp_path / "binary.tar.gz"


def test_both_forms_of_cifar10_give_the_same_file(cifar, tmp_path):
    x, y, arrays, binary = cifar
    ours = converted("arrays", [arrays], tmp_path)
    assert (ours["train_images"] == x[:10].transpose(0, 3, 1, 2)).all()
    assert (ours["reference_images"] == x[10:].transpose(0, 3, 1, 2)).all()
    assert (ours["train_labels"] == y[:10]).all()
    first = (tmp_path / "one.npz").read_bytes()
    converted("cifar_binary", [binary], tmp_path)
    assert (tmp_path / "one.npz").read_bytes() == first


def test_pickles_and_other_layouts_are_refused(cifar, tmp_path):
    with (tmp_path / "pickled.npz").open("wb") as file:
        np.savez(file, x_train=np.array([{}], dtype=object), y_train=[0], x_test=[0], y_test=[0])
    with pytest.raises(UserError, match="not the layout that 'arrays' reads"):
        datasets.convert("arrays", [tmp_path / "pickled.npz"], tmp_path / "out.npz")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-py/data_batch_1", b"pickle")
    with pytest.raises(
        UserError, match=r"other\.tar\.gz: not the layout that 'cifar_binary' reads"
    ):
        datasets.convert("cifar_binary", [tmp_path / "other.tar.gz"], tmp_path / "out.npz")


def test_celeba_is_cropped_as_in_ddim(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index in range(4):
            image = np.full((218, 178, 3), 255, np.uint8)
            image[57:185, 25:153] = 10 * index  # the official crop: 128x128 around (89, 121)
            handle = io.BytesIO()
            Image.fromarray(image).save(handle, "png")
            archive.writestr(f"img_align_celeba/{index:06}.jpg", handle.getvalue())
    (tmp_path / "p.txt").write_text("000000.jpg 0\n000001.jpg 1\n000002.jpg 2\n000003.jpg 0\n")
    arrays = converted("celeba64", [tmp_path / "a.zip", tmp_path / "p.txt"], tmp_path)
    assert arrays["train_images"].shape == (2, 3, 64, 64)
    assert shades(arrays["train_images"]) == [0, 30]
    assert shades(arrays["reference_images"]) == [20]
    assert arrays["train_labels"].tolist() == [0, 0]


def test_flowers_follow_the_official_split(tmp_path):
    with tarfile.open(tmp_path / "102flowers.tgz", "w:gz") as tar:
        for index in (3, 1, 2, 4):
            add(tar, f"jpg/image_{index:05}.jpg", picture(50 * index, 300 + index, 280))
    savemat(tmp_path / "labels.mat", {"labels": np.array([[7, 5, 102, 1]], np.uint8)})
    split = {"trnid": [[1]], "valid": [[3]], "tstid": [[2, 4]]}
    savemat(tmp_path / "setid.mat", {k: np.array(v, np.uint16) for k, v in split.items()})
    files = [tmp_path / name for name in ("102flowers.tgz", "labels.mat", "setid.mat")]
    arrays = converted("flowers102", files, tmp_path)
    assert arrays["train_images"].shape == (2, 3, 256, 256)
    assert shades(arrays["train_images"]) == [150, 50]  # in the archive's order
    assert arrays["train_labels"].tolist() == [101, 6]
    assert shades(arrays["reference_images"]) == [100, 200]
    assert arrays["reference_labels"].tolist() == [4, 0]


def test_cub_follows_the_official_split(tmp_path):
    names = ["001.Auk/a.jpg", "001.Auk/b.jpg", "200.Wren/c.jpg"]
    with tarfile.open(tmp_path / "cub.tgz", "w:gz") as tar:
        lines = "".join(f"{i} {name}\n" for i, name in enumerate(names, 1))
        add(tar, "CUB_200_2011/images.txt", lines.encode())
        add(tar, "CUB_200_2011/train_test_split.txt", b"1 1\n2 0\n3 1\n")
        for shade, name in enumerate(names):
            add(tar, f"CUB_200_2011/images/{name}", picture(shade, 256, 400))
    arrays = converted("cub200", [tmp_path / "cub.tgz"], tmp_path)
    assert shades(arrays["train_images"]) == [0, 2]
    assert arrays["train_labels"].tolist() == [0, 199]
    assert shades(arrays["reference_images"]) == [1]
    assert arrays["reference_labels"].tolist() == [0]


def test_artbench_takes_its_labels_from_the_folders(tmp_path):
    with tarfile.open(tmp_path / "art.tar", "w") as tar:
        for shade, name in enumerate(["train/ukiyo_e/a", "test/baroque/b", "train/baroque/c"]):
            add(tar, f"artbench-10-imagefolder-split/{name}.jpg", picture(shade, 256, 256))
    arrays = converted("artbench10", [tmp_path / "art.tar"], tmp_path)
    assert shades(arrays["train_images"]) == [0, 2]
    assert arrays["train_labels"].tolist() == [1, 0]
    assert arrays["reference_labels"].tolist() == [0]


@pytest.fixture
def imagenet(tmp_path, monkeypatch) -> dict[str, Path]:
    """Three pictures of two classes, as the archive of archives and as folders."""
    monkeypatch.setattr(imagenet_archive, "IMAGENET_TRAIN", 3)
    pictures = {"n02/b.JPEG": 0, "n01/c.JPEG": 1, "n01/a.JPEG": 2}
    root = tmp_path / "unpacked" / "train"
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for one in ("n02", "n01"):  # in no order
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                for name, shade in pictures.items():
                    if name.startswith(one):
                        add(part, Path(name).name, picture(shade, 300, 260))
                        (root / one).mkdir(parents=True, exist_ok=True)
                        (root / name).write_bytes(picture(shade, 300, 260))
            add(tar, f"{one}.tar", inner.getvalue())
    (tmp_path / "folder.txt").write_text(f"{root}\n")
    return {"imagenet_archive": tmp_path / "train.tar", "imagenet_folder": tmp_path / "folder.txt"}


@pytest.mark.parametrize("form", ["imagenet_archive", "imagenet_folder"])
def test_imagenet_is_indexed_and_read_where_it_lies(imagenet, form, tmp_path):
    arrays = twice(form, [imagenet[form]], tmp_path)
    assert arrays["train_labels"].tolist() == [0, 0, 1]
    images = pictures.Pictures(arrays, 3)
    assert len(images) == 3 and len(pictures.Pictures(arrays, 2)[0:9]) == 2
    every = images[0:3]
    assert every.dtype == torch.uint8 and every.shape == (3, 3, 256, 256)
    assert sorted(shades(every[:2].numpy())) == [1, 2] and shades(every[2:].numpy()) == [0]
    assert torch.equal(images[torch.tensor([2, 0])], every[[2, 0]])
    root = Path(str(arrays["root"]))
    broken = root / "n02/b.JPEG" if form == "imagenet_folder" else imagenet[form]
    broken.write_bytes(b"")
    where = f"{broken.name}, [0-9]+ bytes from [0-9]+"
    with pytest.raises(UserError, match=f"{where}: it is empty"):
        images[2:3]


def test_an_incomplete_imagenet_is_refused(imagenet, monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet_archive, "IMAGENET_TRAIN", 4)
    for name, file in imagenet.items():
        with pytest.raises(UserError, match="3 pictures instead of 4"):
            datasets.convert(name, [file], tmp_path / "out.npz")
    imagenet["imagenet_folder"].write_text("/nowhere")
    with pytest.raises(UserError, match="it names /nowhere, which is no folder"):
        datasets.convert("imagenet_folder", [imagenet["imagenet_folder"]], tmp_path / "out.npz")


SCENES = {"church_outdoor_train_lmdb": 7, "church_outdoor_val_lmdb": 2}


@pytest.fixture
def church(tmp_path) -> tuple[list[Path], dict[str, list[np.ndarray]]]:
    """LSUN's two archives with a few pictures, and what PIL makes of them, in the keys' order."""
    files, expected = [], {}
    (tmp_path / "lsun_church").mkdir()
    for name, count in SCENES.items():
        with lmdb.open(str(tmp_path / name), map_size=2**24) as environment:
            keys = [GENERATOR.bytes(20).hex().encode() for _ in range(count)]
            pictures = {key: encoded(*shape(i)) for i, key in enumerate(keys)}
            with environment.begin(write=True) as transaction:
                for key, content in pictures.items():
                    transaction.put(key, content)
        files.append(tmp_path / "lsun_church" / f"{name}.zip")
        with zipfile.ZipFile(files[-1], "w", zipfile.ZIP_DEFLATED) as archive:
            for part in ("data.mdb", "lock.mdb"):
                archive.write(tmp_path / name / part, f"{name}/{part}")
        expected[name] = [cropped(pictures[key]) for key in sorted(keys)]
    return files, expected


def shape(index: int) -> tuple[int, int, str]:
    width, height = ((256, 384), (340, 256), (256, 256))[index % 3]
    return width, height, ("webp", "jpeg")[index % 2]


def encoded(width: int, height: int, kind: str) -> bytes:
    handle = io.BytesIO()
    coarse = GENERATOR.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(handle, kind, quality=75)
    return handle.getvalue()


def cropped(content: bytes) -> np.ndarray:
    """The middle of a picture with a shorter side of 256, as torchvision's Resize + CenterCrop."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    return np.asarray(image.crop((left, top, left + 256, top + 256))).transpose(2, 0, 1)


def test_lsun_is_kept_as_published_and_decoded_when_read(church, tmp_path, monkeypatch):
    files, expected = church
    left = tmp_path / "one.npz.unpacked" / "data.mdb"  # by a conversion that was killed
    left.parent.mkdir()
    left.write_bytes(bytes(9))
    arrays = twice("lsun", files, tmp_path)
    train, held_out = expected.values()
    assert arrays["train_labels"].tolist() == [0] * 7 and arrays["reference_labels"].shape == (2,)
    assert not list(tmp_path.glob("*.unpacked"))
    monkeypatch.setattr(load, "locate", lambda name, mirror: tmp_path / "one.npz")
    data = load.load_dataset("lsun_church256", limit_train=6)
    assert (data.train_images[0:9].numpy() == np.stack(train[:6])).all()
    assert (data.train_images[torch.tensor([4, 1])].numpy() == np.stack([train[4], train[1]])).all()
    assert (data.train_images[5].numpy() == train[5]).all()
    assert (data.reference_images[0:2].numpy() == np.stack(held_out)).all()
    compared = load.load_dataset("lsun_church256", reference="train", limit_reference=5)
    batches = list(compared.reference_images.split(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert (torch.cat(batches).numpy() == np.stack(train[:5])).all()


def test_a_picture_of_lsun_that_cannot_be_decoded_is_named(church, tmp_path, monkeypatch):
    datasets.convert("lsun", church[0], tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as file:
        arrays = dict(file)
    arrays["train_pictures"][arrays["train_offsets"][3] :][:20] = 0
    npz.write_npz(tmp_path / "broken.npz", arrays)
    monkeypatch.setattr(load, "locate", lambda name, mirror: tmp_path / "broken.npz")
    data = load.load_dataset("lsun_church256")
    with pytest.raises(UserError, match=r"broken\.npz, [0-9]+ bytes from [0-9]+: cannot identify"):
        data.train_images[3:4]


@pytest.mark.parametrize(
    ("share", "reason"),
    [(0.6, r"has [0-9]+ bytes instead of [0-9]+"), (0, "is no sound LMDB"), (None, "not enough")],
)
def test_a_truncated_lmdb_is_refused(church, share, reason, tmp_path):
    """Reading a mapped file past its end would kill the process."""
    files, _ = church
    with zipfile.ZipFile(files[0]) as archive:
        content = archive.read("church_outdoor_train_lmdb/data.mdb")
    with zipfile.ZipFile(files[0], "w") as archive:
        if share is not None:
            archive.writestr("x/data.mdb", content[: int(share * len(content))])
    where = r"lsun_church/church_outdoor_train_lmdb\.zip, .*: not the layout that 'lsun' reads"
    with pytest.raises(UserError, match=f"{where} .*{reason}"):
        datasets.convert("lsun", files, tmp_path / "out.npz")
    files[0].write_bytes(files[0].read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{where} .*not a zip file"):
        datasets.convert("lsun", files, tmp_path / "out.npz")


def test_centre_crop_halves_then_resizes_the_shorter_side():
    image = np.zeros((600, 1100, 3), np.uint8)
    image[:, 300:800] = 200  # the middle: 550 of 1100 wide, 256 / 300 of it after halving
    handle = io.BytesIO()
    Image.fromarray(image).save(handle, "png")
    handle.seek(0)
    cropped = pictures.rgb(handle, 256)
    assert cropped.shape == (3, 256, 256)
    row = cropped[0, 128].astype(int)
    edges = np.flatnonzero(np.abs(np.diff(row)) > 50)
    # 1100 x 600 -> 550 x 300 -> 469 x 256, cropped from column 106: 150 / 550 of 469 is at 22
    assert abs(edges.min() - 21) <= 1
    assert abs(edges.max() - 235) <= 1


def _encoded(image: Image.Image, kind: str = "png") -> bytes:
    handle = io.BytesIO()
    image.save(handle, kind)
    return handle.getvalue()


GREY = Image.fromarray(np.full((8, 8), 128, np.uint8))
NO_PICTURES = {
    "truncated": (_encoded(GREY.resize((200, 200)), "jpeg")[:-200], "truncated"),
    "empty": (b"", "it is empty"),
    "a web page": (b"<!DOCTYPE html><html>", "it is a web page, not a picture"),
    "text": (b"hello", "cannot identify image file it"),
    "a resource fork": (b"\x00\x05\x16\x07" + bytes(100), "cannot identify image file it"),
    "floats": (_encoded(Image.fromarray(np.ones((8, 8), np.float32)), "tiff"), "floats"),
    "a bomb": (_encoded(Image.new("1", (20_000, 10_000))), "could be decompression bomb"),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_what_is_no_picture_is_named_for_what_it_is(kind):
    content, words = NO_PICTURES[kind]
    with pytest.raises(pictures.PictureError, match=f"^a/b.jpg: .*{words}"):
        pictures.rgb(io.BytesIO(content), 8, name="a/b.jpg")


def test_deep_grey_keeps_its_brightness():
    """16 bits a pixel; 128 of 255 is 32,896 of 65,535."""
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    expected = pictures.rgb(io.BytesIO(_encoded(GREY)), 8)
    assert (pictures.rgb(io.BytesIO(_encoded(deep)), 8) == expected).all()
    assert (expected == 128).all()


def test_a_broken_picture_of_an_archive_is_named_and_no_fork_is_one(tmp_path):
    good, file = _encoded(GREY), tmp_path / "artbench.tar"
    names = {f"a/{split}/x/{n}.png": good for split in ("train", "test") for n in range(2)}
    _tar(file, names | {"a/train/x/._0.png": b"\x00\x05\x16\x07"})
    datasets.convert("artbench10", [file], tmp_path / "out.npz", (2, 2))
    assert len(np.load(tmp_path / "out.npz")["train_labels"]) == 2
    with pytest.raises(UserError, match="2 pictures of 'train', 3 were published"):
        datasets.convert("artbench10", [file], tmp_path / "out.npz", (3, 2))
    _tar(file, names | {"a/train/x/1.png": NO_PICTURES["truncated"][0]})
    with pytest.raises(UserError, match=r"a/train/x/1\.png: .*truncated"):
        datasets.convert("artbench10", [file], tmp_path / "out.npz")


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_npz_bytes_depend_on_the_arrays_only(tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    stack = npz.Stack(array.shape, iter(array))
    for name, values, compressed in (("a", array, False), ("b", stack, False), ("c", array, True)):
        npz.write_npz(tmp_path / name, {"x": values}, compressed)
        assert (np.load(tmp_path / name, allow_pickle=False)["x"] == array).all()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_stack_that_lies_is_refused(tmp_path):
    array = np.zeros((2, 4), np.uint8)
    with pytest.raises(UserError, match="has 2 images, 3 were expected"):
        npz.write_npz(tmp_path / "x", {"images": npz.Stack((3, 4), iter(array))})
    with pytest.raises(UserError, match=r"image 0 is uint8 \(4,\)"):
        npz.write_npz(tmp_path / "x", {"images": npz.Stack((2, 5), iter(array))})
