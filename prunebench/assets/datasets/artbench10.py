"""ArtBench-10: .../train/STYLE/*.jpg and .../test/STYLE/*.jpg; styles in alphabetical order."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from prunebench.assets.datasets import SIZE, from_tar, names_in, split_images
from prunebench.assets.npz import Stack


def read(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    pictures = [name for name in names_in(files[0]) if name.lower().endswith((".jpg", ".png"))]
    place = {name: PurePosixPath(name).parts[-3:-1] for name in pictures}
    styles = sorted({parts[1] for parts in place.values()})
    splits = {
        split: {name: styles.index(place[name][1]) for name in pictures if place[name][0] == theirs}
        for split, theirs in (("train", "train"), ("reference", "test"))
    }
    return split_images(from_tar(files[0]), splits, SIZE)
