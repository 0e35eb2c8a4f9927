"""Published archives -> the suite's npz layout. Nothing is unpickled, and only LMDBs are unpacked.

Arrays are stored uncompressed with fixed timestamps, so equal pixels give equal bytes with every
zlib. Images are read one by one: memory does not grow with the data set.
"""

import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from prunebench.errors import UserError

CIFAR_RECORD = 1 + 3 * 32 * 32
CELEBA_BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)  # left, top, right, bottom, as in DDIM's code
SIZE = 256  # of the downstream sets and ImageNet
IMAGENET_TRAIN = 1_281_167  # images


@dataclass(frozen=True)
class Stack:
    """Images that are yet to be read: `images` yields uint8 arrays that stack to `shape`.

    Of bytes, `shape` (N,), it yields runs.
    """

    shape: tuple[int, ...]
    images: Iterable[np.ndarray]


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray | Stack], compressed: bool = False
) -> None:
    """np.savez with fixed timestamps: equal arrays give equal bytes (compressed: equal zlib too).

    Raises:
        UserError: a Stack yields other images than its shape says.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            if compressed:
                content = io.BytesIO()
                _write_array(content, name, array)
                archive.writestr(member, content.getvalue(), zipfile.ZIP_DEFLATED, 9)
            else:
                with archive.open(member, "w", force_zip64=True) as handle:
                    _write_array(handle, name, array)


def _write_array(handle: BinaryIO, name: str, array: np.ndarray | Stack) -> None:
    if isinstance(array, np.ndarray):
        np.lib.format.write_array(handle, array, allow_pickle=False)
        return
    header = {"descr": "|u1", "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(handle, header)
    count = 0
    for image in array.images:
        run = image if image.ndim == len(array.shape) == 1 else image[None]
        if run.dtype != np.uint8 or run.shape[1:] != array.shape[1:]:
            raise UserError(f"{name}: image {count} is {image.dtype} {image.shape}")
        handle.write(np.ascontiguousarray(run).data)
        count += len(run)
    if count != array.shape[0]:
        raise UserError(f"{name}: the archive has {count} images, {array.shape[0]} were expected")


def _dataset(
    images: Callable[[Sequence[str]], Iterable[np.ndarray]],
    splits: Mapping[str, Mapping[str, int]],
    size: int,
) -> dict[str, np.ndarray | Stack]:
    """The four arrays of a data set of RGB images.

    Args:
        images: the images of the named members, in that order.
        splits: "train" and "reference" -> member name -> label, in the order of the archive.
    """
    arrays: dict[str, np.ndarray | Stack] = {}
    for split in ("train", "reference"):
        names = list(splits[split])
        arrays[f"{split}_images"] = Stack((len(names), 3, size, size), images(names))
        arrays[f"{split}_labels"] = np.array(list(splits[split].values()), np.uint8)
    return arrays


# ---- CIFAR-10


def arrays(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """x_train, y_train, x_test, y_test (images uint8 NHWC) of one npz file."""
    with np.load(files[0], allow_pickle=False) as source:
        return {
            f"{ours}_{kind}": _planes(source[f"{letter}_{theirs}"]) if letter == "x"
            else source[f"{letter}_{theirs}"].reshape(-1)
            for ours, theirs in (("train", "train"), ("reference", "test"))
            for kind, letter in (("images", "x"), ("labels", "y"))
        }  # fmt: skip


def _planes(images: np.ndarray) -> np.ndarray:
    """NHWC -> NCHW."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def cifar_binary(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """CIFAR-10's binary version: records of a label and three planes of 32x32."""
    folder = "cifar-10-batches-bin"
    with tarfile.open(files[0]) as tar:
        batches = [f"{folder}/data_batch_{i}.bin" for i in range(1, 6)]
        train = np.concatenate([_cifar_records(tar, name) for name in batches])
        test = _cifar_records(tar, f"{folder}/test_batch.bin")
    return {
        f"{split}_{kind}": value
        for split, records in (("train", train), ("reference", test))
        for kind, value in (
            ("images", np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)),
            ("labels", np.ascontiguousarray(records[:, 0])),
        )
    }


def _cifar_records(tar: tarfile.TarFile, name: str) -> np.ndarray:
    content = tar.extractfile(name).read()
    return np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)


# ---- archives of pictures


def rgb(
    content: BinaryIO,
    size: int,
    box: tuple[int, int, int, int] | None = None,
    squash: bool = False,
) -> np.ndarray:
    """A picture as uint8 [3, size, size].

    With `box`: cropped to it and resized bilinearly (CelebA as in DDIM and Diff-Pruning). With
    `squash`: the whole of it, bicubically (COCO's references as in BK-SDM). Without either:
    ADM's centre crop, which DiT trains with: halved by box filter while twice too large, resized
    bicubically until the shorter side is `size`, and cropped in the middle.
    """
    from PIL import Image

    picture = Image.open(content).convert("RGB")
    if box:
        picture = picture.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture).transpose(2, 0, 1)
    if squash:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture).transpose(2, 0, 1)
    while min(picture.size) >= 2 * size:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = tuple(round(side * scale) for side in picture.size)
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture).transpose(2, 0, 1)


def _from_tar(path: Path) -> Callable[[Sequence[str]], Iterator[np.ndarray]]:
    """Reads named pictures of a tar archive, in the archive's order (which `names` must have)."""

    def images(names: Sequence[str]) -> Iterator[np.ndarray]:
        wanted = set(names)
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name in wanted:
                    yield rgb(tar.extractfile(member), SIZE)

    return images


def _names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [member.name for member in tar if member.isfile()]


def celeba64(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    """CelebA: partition 0 trains, partition 2 is the reference; one class."""
    lines = files[1].read_text().split("\n")
    parts = dict(line.split() for line in lines if line.strip())
    splits = {
        split: {f"img_align_celeba/{name}": 0 for name, part in parts.items() if part == number}
        for split, number in (("train", "0"), ("reference", "2"))
    }

    def images(names: Sequence[str]) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(files[0]) as archive:
            for name in names:
                yield rgb(io.BytesIO(archive.read(name)), 64, CELEBA_BOX)

    return _dataset(images, splits, 64)


def flowers102(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    """Flowers-102: official training and validation images train, the test images are reference."""
    from scipy.io import loadmat

    labels, sets = loadmat(files[1])["labels"][0], loadmat(files[2])
    train = {*sets["trnid"][0].tolist(), *sets["valid"][0].tolist()}
    test = set(sets["tstid"][0].tolist())
    pictures = [name for name in _names(files[0]) if name.endswith(".jpg")]
    number = {name: int(PurePosixPath(name).stem.removeprefix("image_")) for name in pictures}
    splits = {
        split: {n: int(labels[number[n] - 1]) - 1 for n in pictures if number[n] in members}
        for split, members in (("train", train), ("reference", test))
    }
    return _dataset(_from_tar(files[0]), splits, SIZE)


def cub200(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    """CUB-200-2011 with its official split; the class is the folder's number."""
    folder = "CUB_200_2011"
    with tarfile.open(files[0]) as tar:
        paths, trains = (_table(tar, f"{folder}/{n}.txt") for n in ("images", "train_test_split"))
    is_train = {f"{folder}/images/{paths[number]}": trains[number] == "1" for number in paths}
    pictures = [name for name in _names(files[0]) if name in is_train]
    splits = {
        split: {
            name: int(PurePosixPath(name).parent.name.split(".")[0]) - 1
            for name in pictures
            if is_train[name] == wanted
        }
        for split, wanted in (("train", True), ("reference", False))
    }
    return _dataset(_from_tar(files[0]), splits, SIZE)


def _table(tar: tarfile.TarFile, name: str) -> dict[str, str]:
    lines = tar.extractfile(name).read().decode().splitlines()
    return dict(line.split() for line in lines if line.strip())


def artbench10(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    """ArtBench-10: .../train/STYLE/*.jpg and .../test/STYLE/*.jpg; styles in alphabetical order."""
    pictures = [name for name in _names(files[0]) if name.lower().endswith((".jpg", ".png"))]
    place = {name: PurePosixPath(name).parts[-3:-1] for name in pictures}
    styles = sorted({parts[1] for parts in place.values()})
    splits = {
        split: {name: styles.index(place[name][1]) for name in pictures if place[name][0] == theirs}
        for split, theirs in (("train", "train"), ("reference", "test"))
    }
    return _dataset(_from_tar(files[0]), splits, SIZE)


# ---- LSUN: the pictures as published, which are decoded when they are asked for


def lsun(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    """LSUN's training and validation set of one scene, each the data.mdb of an LMDB; one class.

    The encoded pictures are kept, in the order of their keys, which are hashes: the first so many
    are a random choice. Decoded, bedroom would take 600 GB.
    """
    arrays: dict[str, np.ndarray | Stack] = {"side": np.array(SIZE)}
    for path, split in zip(files, ("train", "reference"), strict=True):
        sizes = np.fromiter(map(len, _values(path)), np.int64)
        content = (np.frombuffer(value, np.uint8) for value in _values(path))
        arrays |= {
            f"{split}_pictures": Stack((int(sizes.sum()),), content),
            f"{split}_offsets": np.cumsum(sizes) - sizes,
            f"{split}_sizes": sizes,
            f"{split}_labels": np.zeros(len(sizes), np.uint8),
        }
    return arrays


def _values(path: Path) -> Iterator[memoryview]:
    """The values of an LMDB in the order of their keys, each valid until the next."""
    import lmdb

    try:
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment:
            least = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if path.stat().st_size < least:  # reading on would end the process: SIGBUS
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {least}")
            with environment.begin(buffers=True) as transaction:
                yield from transaction.cursor().iternext(keys=False)
    except lmdb.Error as error:
        raise ValueError(f"{path.name} is no sound LMDB: {error}") from error


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """An empty folder for the time of a block; one that a killed conversion left goes first."""
    folder = target.with_name(f"{target.name}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpacked(archive: Path, folder: Path) -> Path:
    """The data.mdb of a zip archive, unpacked: an LMDB is mapped and so must be a file."""
    with zipfile.ZipFile(archive) as source:
        (member,) = [name for name in source.namelist() if PurePosixPath(name).name == "data.mdb"]
        target = folder / f"{archive.stem}.mdb"
        with source.open(member) as packed, target.open("wb") as handle:
            shutil.copyfileobj(packed, handle, 2**20)
    return target


# ---- ImageNet: an index of the pictures where they lie


def imagenet_archive(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """ILSVRC2012_img_train.tar, a tar of a tar per class: where in it every picture lies."""
    places, labels = [], []
    with tarfile.open(files[0]) as outer:
        classes = [member for member in outer if member.isfile()]
        for label, one in enumerate(sorted(classes, key=lambda member: member.name)):
            with tarfile.open(fileobj=outer.extractfile(one)) as inner:
                pictures = [member for member in inner if member.isfile()]
            places += [(0, one.offset_data + p.offset_data, p.size) for p in pictures]
            labels += [label] * len(pictures)
    return _index(files[0].parent, [files[0].name], places, labels)


def imagenet_folder(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """A folder of a folder per class, which the text file files[0] names."""
    root = Path(files[0].read_text().strip())
    if not root.is_dir():
        raise ValueError(f"it names {root}, which is no folder")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    names, places, labels = [], [], []
    for label, one in enumerate(classes):
        for picture in sorted(os.scandir(root / one), key=lambda entry: entry.name):
            places.append((len(names), 0, picture.stat().st_size))
            names.append(f"{one}/{picture.name}")
            labels.append(label)
    return _index(root, names, places, labels)


def _index(
    root: Path, names: list[str], places: list[tuple[int, int, int]], labels: list[int]
) -> dict[str, np.ndarray]:
    """What `datasets.Pictures` reads. Classes are numbered in the order of their names."""
    if len(labels) != IMAGENET_TRAIN:
        raise ValueError(f"{len(labels)} pictures instead of {IMAGENET_TRAIN}")
    file, offsets, sizes = np.array(places, np.int64).T
    return {
        "root": np.array(str(root.resolve())),
        "side": np.array(SIZE),
        "train_files": np.array([name.encode() for name in names]),
        "train_file": np.ascontiguousarray(file),
        "train_offsets": np.ascontiguousarray(offsets),
        "train_sizes": np.ascontiguousarray(sizes),
        "train_labels": np.array(labels, np.int16),
    }


# ---- captioned pictures: an index of where they lie, and the first caption of each

SIDE, REFERENCE_SIDE = 512, 256  # of training images; of references, as BK-SDM compares them
YEARS = ("2014", "2017")


def coco(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """COCO's annotations, training and validation pictures, three archives of one year."""
    annotations, *archives = files
    (year,) = [year for year in YEARS if year in annotations.name]
    names, arrays = [path.name for path in archives], {}
    with zipfile.ZipFile(annotations) as archive:
        told = {
            split: json.loads(archive.read(f"annotations/captions_{split}{year}.json"))
            for split in ("train", "val")
        }
    for split, theirs in (("train", "train"), ("reference", "val")):
        captions = _first_captions(told[theirs])
        path = archives[theirs == "val"]
        places = _stored(path)
        pictures = [f"{theirs}{year}/{name}" for name in captions]
        found = [places[name] for name in pictures]
        arrays |= _captioned(split, [path.name], [(0, *place) for place in found], captions)
    if len({path.parent for path in archives}) > 1:
        raise ValueError(f"{' and '.join(names)} lie in different folders")
    root = np.array(str(archives[0].parent.resolve()))
    return {"root": root, "side": np.array(SIDE), "reference_side": np.array(REFERENCE_SIDE),
            **arrays}  # fmt: skip


def _first_captions(content: Mapping) -> dict[str, str]:
    """File name -> the caption of lowest id, in the order of the pictures' ids."""
    first: dict[int, str] = {}
    for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
        first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
    pictures = sorted(content["images"], key=lambda entry: entry["id"])
    return {entry["file_name"]: first[entry["id"]] for entry in pictures if entry["id"] in first}


def _stored(path: Path) -> dict[str, tuple[int, int]]:
    """Member -> (offset, size) of an archive whose members are stored as they are."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as handle:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed; unpack and store it again")
            handle.seek(member.header_offset + 26)  # lengths of name and extra field; then these
            lengths = sum(struct.unpack("<HH", handle.read(4)))
            places[member.filename] = (member.header_offset + 30 + lengths, member.file_size)
    return places


def gcc_folder(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Conceptual Captions: two tables of captions and addresses, and a text file with the path of
    the pictures, which are train/N.jpg and val/N.jpg, N the number of the table's line from 0.

    Pictures that are not there (many addresses are dead) are left out.
    """
    *tables, place = files
    root = Path(place.read_text().strip())
    for place in (root, root / "train", root / "val"):
        if not place.is_dir():
            raise ValueError(f"{place} is no folder")
    arrays = {"root": np.array(str(root.resolve())), "side": np.array(SIDE),
              "reference_side": np.array(REFERENCE_SIDE)}  # fmt: skip
    for table, split, folder in zip(tables, ("train", "reference"), ("train", "val"), strict=True):
        # Python would split lines at other characters too, which captions hold.
        lines = table.read_bytes().decode().removesuffix("\n").split("\n")
        here = {entry.name: entry.stat().st_size for entry in os.scandir(root / folder)}
        kept = [n for n in range(len(lines)) if here.get(f"{n}.jpg")]
        captions = {f"{folder}/{n}.jpg": lines[n].split("\t")[0] for n in kept}
        places = [(i, 0, here[f"{n}.jpg"]) for i, n in enumerate(kept)]
        arrays |= _captioned(split, list(captions), places, captions)
    return arrays


def _captioned(
    split: str, names: list[str], places: list[tuple[int, int, int]], captions: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """What `datasets.Pictures` reads, and captions as UTF-8; label i is the i-th caption."""
    if not places:
        raise ValueError(f"no picture of '{split}' has a caption")
    file, offsets, sizes = np.array(places, np.int64).T
    return {
        f"{split}_files": np.array([name.encode() for name in names]),
        f"{split}_file": np.ascontiguousarray(file),
        f"{split}_offsets": np.ascontiguousarray(offsets),
        f"{split}_sizes": np.ascontiguousarray(sizes),
        f"{split}_labels": np.arange(len(places)),
        f"{split}_captions": np.array([text.encode() for text in captions.values()]),
    }


CONVERSIONS: dict[str, Callable[[Sequence[Path]], Mapping[str, np.ndarray | Stack]]] = {
    function.__name__: function
    for function in (
        *(arrays, cifar_binary, celeba64, flowers102, cub200, artbench10),
        *(imagenet_archive, imagenet_folder),
        *(coco, gcc_folder, lsun),
    )
}
UNPACKED = {"lsun"}  # their archives are unpacked beside the target while it is written


def convert(name: str, files: Sequence[Path], target: Path) -> None:
    """Write `target`, a data set in the suite's layout, out of verified originals.

    Raises:
        UserError: the originals have not the layout that the conversion `name` reads.
    """
    read = ", ".join(map(str, files))
    try:
        if name not in UNPACKED:
            return write_npz(target, CONVERSIONS[name](files))
        with _folder_beside(target) as folder:
            write_npz(target, CONVERSIONS[name]([_unpacked(file, folder) for file in files]))
    except (KeyError, ValueError, AttributeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{read}: not the layout that '{name}' reads ({error})") from error
