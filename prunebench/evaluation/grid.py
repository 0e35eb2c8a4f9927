"""A picture of a cell: its first images, one row per class."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from prunebench.records.artefacts import write_atomically

COLUMNS = 8


def write_grid(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write a PNG of the first COLUMNS images of every class.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """
    rows = [images[labels == label][:COLUMNS] for label in labels.unique()]
    chosen = torch.cat([row for row in rows if len(row) == COLUMNS] or [images[:COLUMNS]])
    write_atomically(
        path,
        lambda file: save_image(chosen.float() / 255, file, nrow=COLUMNS, padding=1, format="png"),
    )
