"""ImageNet as a folder of a folder per class, which the text file files[0] names."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prunebench.assets.datasets.imagenet_archive import index
from prunebench.assets.pictures import is_picture


def read(files: Sequence[Path]) -> dict[str, np.ndarray]:
    root = Path(files[0].read_text().strip())
    if not root.is_dir():
        raise ValueError(f"it names {root}, which is no folder")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    names, places, labels = [], [], []
    for label, one in enumerate(classes):
        found = (entry for entry in os.scandir(root / one) if is_picture(entry.name))
        for picture in sorted(found, key=lambda entry: entry.name):
            places.append((len(names), 0, picture.stat().st_size))
            names.append(f"{one}/{picture.name}")
            labels.append(label)
    return index(root, names, places, labels)
