"""A picture of a cell: the first images of some classes, one row per class."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize
from torchvision.utils import save_image

from prunebench.records.artefacts import write_atomically

COLUMNS = 8
ROWS = 10  # classes; of more, so many that lie evenly between the first and the last
SIDE = 128  # pixels of an image at most: a board shows a grid for every cell


def write_grid(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write a PNG of the first COLUMNS images of up to ROWS classes.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """
    rows = [images[labels == label][:COLUMNS] for label in _some(labels)]
    chosen = torch.cat(rows or [images[:COLUMNS]])
    if max(chosen.shape[2:]) > SIDE:
        scale = SIDE / max(chosen.shape[2:])
        size = [max(1, round(side * scale)) for side in chosen.shape[2:]]
        chosen = resize(chosen, size, InterpolationMode.BICUBIC, antialias=True)
    write_atomically(
        path,
        lambda file: save_image(chosen.float() / 255, file, nrow=COLUMNS, padding=1, format="png"),
    )


def _some(labels: Tensor) -> Tensor:
    """Up to ROWS of the classes that have enough images for a row, evenly spaced; all of fewer."""
    classes, counts = labels.unique(return_counts=True)
    full = classes[counts >= COLUMNS]
    places = torch.linspace(0, len(full) - 1, min(ROWS, len(full))).round().long()
    return full[places]
