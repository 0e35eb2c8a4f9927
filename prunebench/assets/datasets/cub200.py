"""CUB-200-2011 with its official split; the class is the folder's number."""

import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from prunebench.assets.datasets import SIZE, from_tar, names_in, split_images
from prunebench.assets.npz import Stack


def read(files: Sequence[Path]) -> dict[str, np.ndarray | Stack]:
    folder = "CUB_200_2011"
    with tarfile.open(files[0]) as tar:
        paths, trains = (_table(tar, f"{folder}/{n}.txt") for n in ("images", "train_test_split"))
    is_train = {f"{folder}/images/{paths[number]}": trains[number] == "1" for number in paths}
    pictures = [name for name in names_in(files[0]) if name in is_train]
    splits = {
        split: {
            name: int(PurePosixPath(name).parent.name.split(".")[0]) - 1
            for name in pictures
            if is_train[name] == wanted
        }
        for split, wanted in (("train", True), ("reference", False))
    }
    return split_images(from_tar(files[0]), splits, SIZE)


def _table(tar: tarfile.TarFile, name: str) -> dict[str, str]:
    lines = tar.extractfile(name).read().decode().splitlines()
    return dict(line.split() for line in lines if line.strip())
