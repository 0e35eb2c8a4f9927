"""Build prunebench/data/fashion_mnist_16.npz from the four original Fashion-MNIST files.

    python scripts/build_fashion_mnist_16.py FOLDER

FOLDER holds the four *-ubyte.gz files, in any gzip wrapping: what is verified is the hash of their
decompressed contents. Debian ships them as /usr/share/datasets/fashion-mnist (package
dataset-fashion-mnist, which compresses them anew).

Resampling is the exact area average: a pixel of the 16x16 image is the mean of the 1.75x1.75 source
pixels under it, edge pixels weighted by overlap, rounded to the nearest integer. It is written out
because the usual calls do something else at this ratio: interpolate(mode="area") averages whole
pixels of overlapping windows, and Pillow's BOX drops or keeps whole pixels. In integers the mean is
a sum over 49 quarter pixels, so there is no tie to round and no library version to depend on.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np

from prunebench.assets import ASSETS, DATA
from prunebench.assets.npz import write_npz
from prunebench.records.artefacts import sha256, write_atomically

ORIGINALS = {Path(file.path).name: file.sha256 for file in ASSETS["fashion_mnist"].files}
TRAIN_IMAGES = 20_000  # the first ones: as many as keep the file below 5 MiB


def read_idx(folder: Path, file: str, header: int) -> np.ndarray:
    """The flat uint8 payload of one idx file, whose decompressed contents must match its hash."""
    content = gzip.decompress((folder / f"{file}.gz").read_bytes())
    found, expected = hashlib.sha256(content).hexdigest(), ORIGINALS[file]
    if found != expected:
        raise SystemExit(f"{folder / file}.gz holds sha256 {found}, expected {expected}")
    return np.frombuffer(content, np.uint8, offset=header)


def area_average(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 28, 28] -> uint8 [N, 16, 16], exact area average, rounded to nearest."""
    quarters = np.repeat(np.eye(28), 4, axis=1)  # [28, 112]: four quarters to a source pixel
    overlap = quarters.reshape(28, 16, 7).sum(axis=2)  # seven quarters to a target pixel
    sums = overlap.T @ images.astype(np.float64) @ overlap  # integers up to 49 * 255: exact
    return np.floor(sums / 49 + 0.5).astype(np.uint8)


def build(folder: Path) -> dict[str, np.ndarray]:
    train_images = read_idx(folder, "train-images-idx3-ubyte", header=16).reshape(-1, 28, 28)
    train_labels = read_idx(folder, "train-labels-idx1-ubyte", header=8)
    test_images = read_idx(folder, "t10k-images-idx3-ubyte", header=16).reshape(-1, 28, 28)
    test_labels = read_idx(folder, "t10k-labels-idx1-ubyte", header=8)
    return {
        "train_images": area_average(train_images[:TRAIN_IMAGES]),
        "train_labels": train_labels[:TRAIN_IMAGES],
        "reference_images": area_average(test_images),
        "reference_labels": test_labels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the four *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=DATA / "fashion_mnist_16.npz")
    options = parser.parse_args()
    arrays = build(options.folder)
    write_atomically(options.output, lambda path: write_npz(path, arrays, compressed=True))
    print(f"{sha256(options.output)}  {options.output}")


if __name__ == "__main__":
    main()
