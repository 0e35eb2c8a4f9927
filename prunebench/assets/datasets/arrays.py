"""x_train, y_train, x_test, y_test (images uint8 NHWC) of one npz file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def read(files: Sequence[Path]) -> dict[str, np.ndarray]:
    with np.load(files[0], allow_pickle=False) as source:
        return {
            f"{ours}_{kind}": _planes(source[f"{letter}_{theirs}"]) if letter == "x"
            else source[f"{letter}_{theirs}"].reshape(-1)
            for ours, theirs in (("train", "train"), ("reference", "test"))
            for kind, letter in (("images", "x"), ("labels", "y"))
        }  # fmt: skip


def _planes(images: np.ndarray) -> np.ndarray:
    """NHWC -> NCHW."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
