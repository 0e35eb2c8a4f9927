"""Data sets as published, one module for each way in which one is stored.

A module reads the verified files of an original (`Reader`); a data set of `registry.yaml` names the
reader behind the original that it can be made of (`made_from`). Nothing is unpickled.
docs/add_a_dataset.md adds one.
"""

import importlib
import pkgutil
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from prunebench.assets.npz import Stack, write_npz
from prunebench.assets.pictures import is_picture, rgb
from prunebench.errors import UserError

SIZE = 256  # side of the downstream sets, LSUN and ImageNet
# Sides of captioned sets: of training images, and of references, as BK-SDM compares them.
CAPTIONED, REFERENCE_SIDE = 512, 256


class Reader(Protocol):
    """What a module of this package offers.

    Attributes:
        UNPACKED: True where zipped LMDBs must be unpacked for as long as they are read; left out
            elsewhere.
    """

    UNPACKED: bool

    def read(self, files: Sequence[Path]) -> Mapping[str, np.ndarray | Stack]:
        """The arrays of the data set: `train_images` uint8 [N, C, H, W] (a `Stack` of images that
        are read one by one), `train_labels` integers [N], and both of "reference"; or, in place of
        images, an index of pictures (`prunebench.assets.pictures.Pictures`), with `train_captions`
        where labels are captions.

        Args:
            files: of the original, in the order of the registry.

        Raises:
            KeyError, ValueError, TarError or BadZipFile: the files have another layout.
        """


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def convert(
    name: str, files: Sequence[Path], target: Path, images: Sequence[int] | None = None
) -> None:
    """Write `target`, a data set in the suite's layout, out of verified originals.

    Args:
        images: how many the publisher states, for training and as reference; None where that is
            not known.

    Raises:
        UserError: the originals have not the layout that the reader `name` reads, or another number
            of images.
    """
    reader = importlib.import_module(f"{__name__}.{name}")
    told = ", ".join(map(str, files))
    try:
        if not getattr(reader, "UNPACKED", False):
            return write_npz(target, _counted(reader.read(files), images))
        with _folder_beside(target) as folder:
            unpacked = [_unpacked(file, folder) for file in files]
            write_npz(target, _counted(reader.read(unpacked), images))
    except (KeyError, ValueError, AttributeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{told}: not the layout that '{name}' reads ({error})") from error


def _counted(
    arrays: Mapping[str, np.ndarray | Stack], images: Sequence[int] | None
) -> Mapping[str, np.ndarray | Stack]:
    """The arrays, whose images are as many as the publisher states."""
    for split, count in zip(("train", "reference"), images or (), strict=False):
        found = len(arrays.get(f"{split}_labels", ()))
        if found != count:
            raise ValueError(f"{found} pictures of '{split}', {count} were published")
    return arrays


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


# ---- what readers share


def split_images(
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


def from_tar(path: Path) -> Callable[[Sequence[str]], Iterator[np.ndarray]]:
    """Reads named pictures of a tar archive, in the archive's order (which `names` must have)."""

    def images(names: Sequence[str]) -> Iterator[np.ndarray]:
        wanted = set(names)
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name in wanted:
                    yield rgb(tar.extractfile(member), SIZE, name=member.name)

    return images


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [m.name for m in tar if m.isfile() and is_picture(m.name)]


def captioned(
    split: str, names: list[str], places: list[tuple[int, int, int]], captions: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """What `pictures.Pictures` reads, and captions as UTF-8; label i is the i-th caption."""
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
