"""Data sets in the suite's layout: an npz file of uint8 images and labels.

Arrays that are stored uncompressed, as conversions write them, are mapped and not read. In place of
training images there may be an index of pictures that are read where they lie (`Pictures`).
"""

import io
import os
import struct
import zipfile
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

    The reference images are held out, unless the track judges against the training images or a
    published reference. Such a one may bring `statistics` of its own, of more images than it has:
    mean [D] and covariance [D, D] of Inception's features.
    `flip` says whether training images are mirrored left to right with probability one half.
    """

    train_images: "Tensor | Pictures"
    train_labels: "Tensor"
    reference_images: "Tensor"
    reference_labels: "Tensor"
    flip: bool = False
    statistics: "tuple[Tensor, Tensor] | None" = None


class Pictures:
    """Pictures that are read, cropped and resized (ADM's way) only when they are asked for.

    Args:
        arrays: `train_files` names below `root`; of each picture which file it lies in
            (`train_file`), at which byte (`train_offsets`), and how many bytes it has
            (`train_sizes`); `side` of the images.
        count: only the first so many.
    """

    def __init__(self, arrays: "dict[str, np.ndarray]", count: int):
        self._root, self._arrays, self._count = str(arrays["root"]), arrays, count
        self._side = int(arrays["side"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: "slice | Tensor") -> "Tensor":
        """uint8 [n, 3, side, side] of a slice, or of a tensor of rows."""
        import numpy as np
        import torch

        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._picture, chosen))))

    def _picture(self, row: int) -> "np.ndarray":
        from prunebench.assets.convert import rgb

        keys = ("train_file", "train_offsets", "train_sizes")
        number, offset, size = (int(self._arrays[key][row]) for key in keys)
        path = Path(self._root, self._arrays["train_files"][number].decode())
        try:
            with path.open("rb") as handle:
                handle.seek(offset)
                content = handle.read(size)
            return rgb(io.BytesIO(content), self._side)
        except OSError as error:  # of the disk, or of a picture that can't be decoded
            raise UserError(f"{path}, {size} bytes from {offset}: {error}") from error


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
    train = _training(arrays, limit_train)
    if reference == "train":
        judged = {"images": arrays.get("train_images"), "labels": arrays["train_labels"]}
    elif reference == "held_out":
        judged = {key: arrays.get(f"reference_{key}") for key in ("images", "labels")}
    else:
        judged = _published(reference, _arrays(reference, locate(reference, mirror)))
    if judged["images"] is None:
        raise UserError(f"dataset.reference: {name} has no '{reference}' images; name an asset")
    images = _images(judged["images"], limit_reference, "reference")
    labels = _tensor(judged["labels"])[: len(images)].long()
    return Dataset(*train, images, labels, flip, judged.get("statistics"))


def _training(arrays: dict, limit: int | None) -> "tuple[Tensor | Pictures, Tensor]":
    labels = _tensor(arrays["train_labels"]).long()
    if "train_files" in arrays:
        images = Pictures(arrays, _count(len(labels), limit, "train"))
    else:
        images = _images(arrays["train_images"], limit, "train")
    return images, labels[: len(images)]


def _published(name: str, arrays: dict) -> dict:
    """A reference batch of ADM: images NHWC, and statistics of the whole data set."""
    import numpy as np

    if asset(name).kind != "reference" or "arr_0" not in arrays:
        raise UserError(f"dataset.reference: '{name}' is no reference batch in ADM's format")
    images = arrays["arr_0"].transpose(0, 3, 1, 2)
    labels = arrays["arr_1"] if "arr_1" in arrays else np.zeros(len(images), np.int64)
    if not {"mu", "sigma"} <= set(arrays):  # FID with the batch's few images would be another
        raise UserError(f"dataset.reference: '{name}' lacks the statistics 'mu' and 'sigma'")
    whole = tuple(_tensor(arrays[key]).double() for key in ("mu", "sigma"))
    return {"images": images, "labels": labels, "statistics": whole}


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
    """An array of an npz file that is stored as it is, mapped copy-on-write."""
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
        return np.memmap(path, dtype, "c", handle.tell(), shape, order)


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
