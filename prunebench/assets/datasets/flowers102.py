"""Flowers-102: official training and validation images train, the test images are reference."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from prunebench.assets.datasets import SIZE, from_tar, names_in, split_images
from prunebench.assets.npz import Stack


def read(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    from scipy.io import loadmat

    labels, sets = loadmat(files[1])["labels"][0], loadmat(files[2])
    train = {*sets["trnid"][0].tolist(), *sets["valid"][0].tolist()}
    test = set(sets["tstid"][0].tolist())
    pictures = [name for name in names_in(files[0]) if name.endswith(".jpg")]
    number = {name: int(PurePosixPath(name).stem.removeprefix("image_")) for name in pictures}
    splits = {
        split: {n: int(labels[number[n] - 1]) - 1 for n in pictures if number[n] in members}
        for split, members in (("train", train), ("reference", test))
    }
    return split_images(from_tar(files[0]), splits, SIZE)
