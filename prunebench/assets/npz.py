"""The npz files that data sets are kept in.

Arrays are stored uncompressed with fixed timestamps, so equal pixels give equal bytes with every
zlib, and what is stored is mapped and not read. Images are written one by one: memory does not grow
with the data set.
"""

import io
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prunebench.errors import UserError


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


def read_npz(name: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays of the data set `name`, mapped where they are stored as they are.

    Raises:
        UserError: the file is none of numpy's, or holds objects.
    """
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


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of an npz file that is stored as it is, mapped.

    Copy-on-write as torch wants it, but for the bytes of pictures: that would count as memory.
    """
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
