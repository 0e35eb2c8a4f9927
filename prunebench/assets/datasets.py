"""Data sets in the suite's layout: an npz file of uint8 images and labels.

Arrays that are stored uncompressed, as conversions write them, are mapped and not read. In place of
images there may be pictures that are decoded when they are asked for (`Pictures`): in the file
itself, or an index of where they lie.
"""

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prunebench.assets.registry import asset
from prunebench.assets.store import locate
from prunebench.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, C, R, R] and labels int64 [N].

    The reference images are held out, unless the track compares with the training images or with a
    published reference. Such a one may bring `statistics` of its own, of more images than it has:
    mean [D] and covariance [D, D] of Inception's features.
    `flip` says whether training images are mirrored left to right with probability one half.
    In sets with captions label i is the i-th caption, of image i; both are empty elsewhere.
    """

    train_images: "Tensor | Pictures"
    train_labels: "Tensor"
    reference_images: "Tensor | Pictures"
    reference_labels: "Tensor"
    flip: bool = False
    statistics: "tuple[Tensor, Tensor] | None" = None
    train_captions: tuple[str, ...] = ()
    reference_captions: tuple[str, ...] = ()


class Pictures:
    """Pictures that are read and brought to one size only when they are asked for.

    Args:
        arrays: `train_files` names below `root`; of each picture which file it lies in
            (`train_file`), at which byte (`train_offsets`), and how many bytes it has
            (`train_sizes`); `side` of the images, which are resized and cropped (ADM's way). In
            place of files there may be `train_pictures`, the bytes of all, mapped. For "reference"
            in place of "train" there may be a `reference_side` to which the picture is squashed.
        count: only the first so many.
    """

    def __init__(self, arrays: "dict[str, np.ndarray]", count: int, split: str = "train"):
        self._arrays, self._count = arrays, count
        self._split = split
        self._squash = f"{split}_side" in arrays
        self._side = int(arrays[f"{split}_side" if self._squash else "side"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: "slice | Tensor | int") -> "Tensor":
        """uint8 [n, 3, side, side] of a slice, or of a tensor of rows; [3, side, side] of one."""
        import numpy as np
        import torch

        if isinstance(rows, int):
            return torch.from_numpy(self._picture(range(len(self))[rows]).copy())
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._picture, chosen))))

    def split(self, batch: int) -> Iterator["Tensor"]:
        """All of them in batches, as tensors are split."""
        for start in range(0, len(self), batch):
            yield self[start : start + batch]

    def _picture(self, row: int) -> "np.ndarray":
        from prunebench.assets.convert import rgb

        offset, size = (int(self._of(key)[row]) for key in ("offsets", "sizes"))
        path = self._path(row)
        try:
            return rgb(io.BytesIO(self._read(path, offset, size)), self._side, squash=self._squash)
        except OSError as error:  # of the disk, or of a picture that can't be decoded
            raise UserError(f"{path}, {size} bytes from {offset}: {error}") from error

    def _of(self, key: str) -> "np.ndarray | None":
        return self._arrays.get(f"{self._split}_{key}")

    def _path(self, row: int) -> Path:
        """The file that a picture lies in."""
        if self._of("files") is None:
            return Path(self._of("pictures").filename)
        return Path(str(self._arrays["root"]), self._of("files")[self._of("file")[row]].decode())

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        if self._of("files") is None:
            return self._of("pictures")[offset : offset + size].tobytes()
        with path.open("rb") as handle:
            handle.seek(offset)
            return handle.read(size)


def load_dataset(
    name: str,
    limit_train: int | None = None,
    limit_reference: int | None = None,
    reference: str = "held_out",
    mirror: Path | None = None,
    flip: bool = False,
) -> Dataset:
    """Load an image data set.

    Args:
        name: an asset of kind "dataset".
        limit_train, limit_reference: keep the first so many images (smoke tracks, tests).
        reference: what generated images are compared with: "held_out"; "train", the training
            images, as in the published FIDs of CIFAR-10 and CelebA; or an asset of kind
            "reference", a batch in ADM's format.
        flip: handed on; the images that are returned are not mirrored.

    Raises:
        UserError: as `locate`; not a data set; or a limit that the data set cannot give.
    """
    arrays = _arrays(name, locate(name, mirror))
    train, statistics = _split(arrays, "train", limit_train), None
    split = {"held_out": "reference", "train": "train"}.get(reference)
    if split is None:
        seen, statistics = _published(reference, locate(reference, mirror), limit_reference)
    elif {f"{split}_images", f"{split}_pictures"} & set(arrays) or (
        split == "reference" and "reference_files" in arrays
    ):
        seen = _split(arrays, split, limit_reference, "reference")
    else:
        raise UserError(f"dataset.reference: {name} has no '{reference}' images; name an asset")
    told = _captions(arrays, "train", train[0]), _captions(arrays, split, seen[0])
    return Dataset(*train, *seen, flip, statistics, *told)


def _split(
    arrays: dict, split: str, limit: int | None, key: str | None = None
) -> "tuple[Tensor | Pictures, Tensor]":
    """Images and labels of "train" or "reference"; `key` is what the limit is called."""
    labels = _tensor(arrays[f"{split}_labels"]).long()
    if f"{split}_images" in arrays:
        images = _images(arrays[f"{split}_images"], limit, key or split)
    else:
        images = Pictures(arrays, _count(len(labels), limit, key or split), split)
    return images, labels[: len(images)]


def _captions(arrays: dict, split: str | None, images: "Tensor | Pictures") -> tuple[str, ...]:
    texts = arrays.get(f"{split}_captions", ())[: len(images)]
    return tuple(text.decode() for text in texts)


def _published(name: str, path: Path, limit: int | None) -> "tuple[tuple, tuple]":
    """Images, labels and whole statistics of a reference batch of ADM, which has images NHWC."""
    import numpy as np

    arrays = _arrays(name, path)
    if asset(name).kind != "reference" or "arr_0" not in arrays:
        raise UserError(f"dataset.reference: '{name}' is no reference batch in ADM's format")
    images = _images(arrays["arr_0"].transpose(0, 3, 1, 2), limit, "reference")
    labels = arrays["arr_1"] if "arr_1" in arrays else np.zeros(len(images), np.int64)
    if not {"mu", "sigma"} <= set(arrays):  # FID with the batch's few images would be another
        raise UserError(f"dataset.reference: '{name}' lacks the statistics 'mu' and 'sigma'")
    whole = tuple(_tensor(arrays[key]).double() for key in ("mu", "sigma"))
    return (images, _tensor(labels)[: len(images)].long()), whole


def _arrays(name: str, path: Path) -> "dict[str, np.ndarray]":
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {
                info.filename.removesuffix(".npy"): info
                for info in file.zip.infolist()
                if info.compress_type == zipfile.ZIP_STORED
            }
            return {
                key: _mapped(path, stored[key]) if key in stored else file[key]
                for key in file.files
            }
    except (ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"asset {name} ({path}) is not a data set: {error}") from error


def _mapped(path: Path, info: zipfile.ZipInfo) -> "np.ndarray":
    """An array of an npz file that is stored as it is, mapped.

    Copy-on-write as torch wants it, but for the bytes of pictures: that would count as memory.
    """
    import numpy as np

    with path.open("rb") as handle:
        handle.seek(info.header_offset + 26)  # lengths of name and extra field; then these
        handle.seek(sum(struct.unpack("<HH", handle.read(4))), os.SEEK_CUR)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
        shape, fortran, dtype = read[np.lib.format.read_magic(handle)](handle)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} is a pickle")
        order = "F" if fortran else "C"
        mode = "r" if info.filename.endswith("_pictures.npy") else "c"
        return np.memmap(path, dtype, mode, handle.tell(), shape, order)


def _tensor(array: "np.ndarray") -> "Tensor":
    import torch

    return torch.from_numpy(array)


def _images(array: "np.ndarray", limit: int | None, key: str) -> "Tensor":
    images = _tensor(array)
    if images.ndim == 3:  # grey images are stored without their channel
        images = images[:, None]
    count = _count(len(images), limit, key)
    return images if count == len(images) else images[:count].clone()


def _count(most: int, limit: int | None, key: str) -> int:
    count = most if limit is None else limit
    if not 1 <= count <= most:
        raise UserError(f"limit_{key} is {count}, but the data set has 1 to {most} images")
    return count
