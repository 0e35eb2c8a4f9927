"""The grid of a cell's images has a bounded size, whatever the data set."""

import numpy as np
import pytest
import torch
from PIL import Image

from prunebench.evaluation.grid import COLUMNS, ROWS, SIDE, write_grid


@pytest.mark.parametrize(
    ("classes", "side", "rows", "shown"),
    [(1, 16, 1, 16), (10, 16, 10, 16), (1000, 2, ROWS, 2), (3, 512, 3, SIDE)],
)
def test_a_grid_shows_some_classes_at_a_bounded_size(tmp_path, classes, side, rows, shown):
    labels = torch.arange(classes * COLUMNS) % classes
    images = (labels * 255 // max(classes - 1, 1)).byte()[:, None, None, None]
    write_grid(tmp_path / "grid.png", images.expand(-1, 1, side, side), labels)
    pixels = np.array(Image.open(tmp_path / "grid.png"))[..., 0]
    assert pixels.shape == (rows * (shown + 1) + 1, COLUMNS * (shown + 1) + 1)
    middles = pixels[1 + shown // 2 :: shown + 1, 1 + shown // 2]
    expected = np.round(np.linspace(0, classes - 1, rows)).astype(int) * 255 // max(classes - 1, 1)
    assert (np.abs(middles.astype(int) - expected) <= 1).all()


def test_classes_of_too_few_images_have_no_row(tmp_path):
    labels = torch.tensor([0] * COLUMNS + [1] * (COLUMNS - 1))
    write_grid(tmp_path / "grid.png", torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), labels)
    assert Image.open(tmp_path / "grid.png").height == 4 + 2
