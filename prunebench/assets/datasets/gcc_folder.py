"""Conceptual Captions: two tables of captions and addresses, and a text file with the path of
the pictures, which are train/N.jpg and val/N.jpg, N the number of the table's line from 0.

Pictures that are not there (many addresses are dead) are left out.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prunebench.assets.datasets import CAPTIONED, REFERENCE_SIDE, captioned


def read(files: Sequence[Path]) -> dict[str, np.ndarray]:
    *tables, place = files
    root = Path(place.read_text().strip())
    for place in (root, root / "train", root / "val"):
        if not place.is_dir():
            raise ValueError(f"{place} is no folder")
    arrays = {"root": np.array(str(root.resolve())), "side": np.array(CAPTIONED),
              "reference_side": np.array(REFERENCE_SIDE)}  # fmt: skip
    for table, split, folder in zip(tables, ("train", "reference"), ("train", "val"), strict=True):
        # Python would split lines at other characters too, which captions hold.
        lines = table.read_bytes().decode().removesuffix("\n").split("\n")
        here = {entry.name: entry.stat().st_size for entry in os.scandir(root / folder)}
        kept = [n for n in range(len(lines)) if here.get(f"{n}.jpg")]
        captions = {f"{folder}/{n}.jpg": lines[n].split("\t")[0] for n in kept}
        places = [(i, 0, here[f"{n}.jpg"]) for i, n in enumerate(kept)]
        arrays |= captioned(split, list(captions), places, captions)
    return arrays
