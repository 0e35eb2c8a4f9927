"""CelebA: partition 0 trains, partition 2 is the reference; one class."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from prunebench.assets.datasets import split_images
from prunebench.assets.npz import Stack
from prunebench.assets.pictures import rgb

BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)  # left, top, right, bottom, as in DDIM's code


def read(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    lines = files[1].read_text().split("\n")
    parts = dict(line.split() for line in lines if line.strip())
    splits = {
        split: {f"img_align_celeba/{name}": 0 for name, part in parts.items() if part == number}
        for split, number in (("train", "0"), ("reference", "2"))
    }

    def images(names: Sequence[str]) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(files[0]) as archive:
            for name in names:
                yield rgb(io.BytesIO(archive.read(name)), 64, BOX, name=name)

    return split_images(images, splits, 64)
