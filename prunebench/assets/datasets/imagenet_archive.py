"""ILSVRC2012_img_train.tar, a tar of a tar per class: where in it every picture lies."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prunebench.assets.datasets import SIZE

IMAGENET_TRAIN = 1_281_167  # pictures


def read(files: Sequence[Path]) -> dict[str, np.ndarray]:
    places, labels = [], []
    with tarfile.open(files[0]) as outer:
        classes = [member for member in outer if member.isfile()]
        for label, one in enumerate(sorted(classes, key=lambda member: member.name)):
            with tarfile.open(fileobj=outer.extractfile(one)) as inner:
                pictures = [member for member in inner if member.isfile()]
            places += [(0, one.offset_data + p.offset_data, p.size) for p in pictures]
            labels += [label] * len(pictures)
    return index(files[0].parent, [files[0].name], places, labels)


def index(
    root: Path, names: list[str], places: list[tuple[int, int, int]], labels: list[int]
) -> dict[str, np.ndarray]:
    """What `pictures.Pictures` reads. Classes are numbered in the order of their names."""
    if len(labels) != IMAGENET_TRAIN:
        raise ValueError(f"{len(labels)} pictures instead of {IMAGENET_TRAIN}")
    file, offsets, sizes = np.array(places, np.int64).T
    return {
        "root": np.array(str(root.resolve())),
        "side": np.array(SIZE),
        "train_files": np.array([name.encode() for name in names]),
        "train_file": np.ascontiguousarray(file),
        "train_offsets": np.ascontiguousarray(offsets),
        "train_sizes": np.ascontiguousarray(sizes),
        "train_labels": np.array(labels, np.int16),
    }
