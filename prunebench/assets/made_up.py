"""Made-up images in a data set's place, with which a track can be rehearsed without its data."""

import dataclasses
from typing import TYPE_CHECKING

from prunebench.assets.registry import Asset, data_set

if TYPE_CHECKING:
    from prunebench.assets.load import Dataset

SHADES = 7  # an odd number: neighbouring classes differ, and two flips of labels too


def described(name: str, side: int) -> Asset:
    """A data set's entry with images of another size, and nothing to fetch."""
    entry = data_set(name)
    return dataclasses.replace(entry, shape=(entry.shape[0], side, side), images=None)


def made_up(name: str, side: int, train: int, reference: int, flip: bool = False) -> "Dataset":
    """Seeded images of a data set's channels, classes and kind: noise around a shade of the class.

    Args:
        side: in pixels.
        train, reference: numbers of images; sets with captions get one each.
    """
    import torch

    from prunebench.assets.load import Dataset

    entry = described(name, side)
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % (entry.classes or (count if entry.classes is None else 1))
        shades = 255 * (labels % SHADES)[:, None, None, None] / (SHADES - 1)
        noise = 40 * torch.randn(count, *entry.shape, generator=generator)
        return (shades + noise).clamp(0, 255).byte(), labels

    captions = [entry.captions or ()] * 2
    if entry.classes is None:
        captions = [tuple(f"picture {i % SHADES}" for i in range(n)) for n in (train, reference)]
    return Dataset(*images(train), *images(reference), flip, None, *captions)
