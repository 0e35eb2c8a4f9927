"""LSUN's training and validation set of one scene, each the data.mdb of an LMDB; one class.

The encoded pictures are kept, in the order of their keys, which are hashes: the first so many are a
random choice. Decoded, bedroom would take 600 GB.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from prunebench.assets.datasets import SIZE
from prunebench.assets.npz import Stack

UNPACKED = True  # an LMDB is mapped and so must be a file: the archives are unpacked meanwhile


def read(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
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
