"""Pictures as published: decoded, brought to one size, and read only when they are asked for."""

import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from prunebench.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class PictureError(ValueError):
    """A picture can't be read; begins with which one."""


def rgb(
    content: BinaryIO,
    size: int,
    box: tuple[int, int, int, int] | None = None,
    squash: bool = False,
    name: str = "a picture",
) -> np.ndarray:
    """A picture as uint8 [3, size, size].

    With `box`: cropped to it and resized bilinearly (CelebA as in DDIM and Diff-Pruning). With
    `squash`: the whole of it, bicubically (COCO's references as in BK-SDM). Without either:
    ADM's centre crop, which DiT trains with: halved by box filter while twice too large, resized
    bicubically until the shorter side is `size`, and cropped in the middle.

    Raises:
        PictureError: what is called `name` is no picture, is cut off, or is too large to be meant.
    """
    from PIL import Image

    picture = _decoded(content, name)
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


def _decoded(content: BinaryIO, name: str) -> "Image.Image":
    """A picture in RGB, 8 bits a channel."""
    from PIL import Image

    try:
        picture = Image.open(content)
        picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{name}: {_fault(content, error)}") from error
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL's conversion would cut off at 255
        high = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    if picture.mode == "F":
        raise PictureError(f"{name}: its pixels are floats, of which the range is not known")
    return picture.convert("RGB")


def _fault(content: BinaryIO, error: Exception) -> str:
    """What a file is that is no picture."""
    content.seek(0)
    head = content.read(512)
    if not head:
        return "it is empty"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not a picture"
    return re.sub(r"<_io\.\w+ object at 0x[0-9a-f]+>", "it", str(error))


def is_picture(path: str) -> bool:
    """Whether a member of an archive or folder may be one: not what macOS leaves beside files."""
    return not PurePosixPath(path).name.startswith("._")


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

    def __init__(self, arrays: dict[str, np.ndarray], count: int, split: str = "train"):
        self._arrays, self._count = arrays, count
        self._split = split
        self._squash = f"{split}_side" in arrays
        self._side = int(arrays[f"{split}_side" if self._squash else "side"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: "slice | Tensor | int") -> "Tensor":
        """uint8 [n, 3, side, side] of a slice, or of a tensor of rows; [3, side, side] of one."""
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

    def _picture(self, row: int) -> np.ndarray:
        offset, size = (int(self._of(key)[row]) for key in ("offsets", "sizes"))
        path = self._path(row)
        where = f"{path}, {size} bytes from {offset}"
        try:
            content = io.BytesIO(self._read(path, offset, size))
            return rgb(content, self._side, squash=self._squash, name=where)
        except PictureError as error:
            raise UserError(str(error)) from error
        except OSError as error:
            raise UserError(f"{where}: {error}") from error

    def _of(self, key: str) -> np.ndarray | None:
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
