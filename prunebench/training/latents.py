"""Latents of the training set, encoded once.

What is stored are the posterior's moments, so that every draw samples it anew, as training with the
autoencoder in the loop would; and where the track asks for flips, those of the mirrored images too:
mirroring a latent gives other images. float16 rounds by 2^-11 of the value, which moves a decoded
image less than rounding it to 8 bits does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from prunebench.errors import UserError
from prunebench.training import rows
from prunebench.training.loop import Data

if TYPE_CHECKING:  # slow to import
    from prunebench.diffusion.autoencoder import Autoencoder

PART = 4096  # images of one file: 268 MB of ImageNet-256's latents with flips
STEM = "moments"


def encode(
    folder: Path,
    images: Sequence,
    labels: Tensor,
    autoencoder: "Autoencoder",
    flip: bool,
    identity: dict,
    part: int = PART,
) -> Path:
    """Write the moments of all images; see `rows.write`.

    Args:
        images: uint8, of which slices are taken, [N, C, H, W] as a whole.
        labels: int64 [N].
        flip: whether the mirrored images are encoded as well.
        identity: what the latents depend on.
        part: images of a file; rounded to whole batches of the autoencoder.

    Returns:
        the index.

    Raises:
        UserError: the autoencoder's latents are not finite, or the disk is full.
    """
    part = max(part // autoencoder.batch, 1) * autoencoder.batch  # only the last batch is filled up

    def encoded(chosen: range) -> dict[str, Tensor]:
        return {STEM: _moments(images, chosen, autoencoder, flip)}

    def source(chosen: range) -> Iterator[bytes]:
        for row in chosen:
            yield images[row : row + 1].numpy().tobytes() + labels[row].numpy().tobytes()

    identity = {**identity, "flip": flip}
    return rows.write(folder, STEM, len(images), part, encoded, source, identity, labels=labels)


def _moments(images: Sequence, chosen: range, autoencoder: "Autoencoder", flip: bool) -> Tensor:
    """Moments of some images, float16 [n, views, 2, C, h, w]."""
    found = []
    for start in range(chosen.start, chosen.stop, autoencoder.batch):
        some = images[start : min(start + autoencoder.batch, chosen.stop)]
        views = [some, some.flip(-1)] if flip else [some]
        found.append(torch.stack([autoencoder.moments(view) for view in views], 1).half())
        if not found[-1].isfinite().all():
            raise UserError(f"{autoencoder.place}: latents from image {start} on are not finite")
    return torch.cat(found)


class Latents:
    """Encoded images in a folder that `encode` wrote, shifted and scaled for the denoiser.

    `latents[i]` is the mean of image i's posterior; `draw` samples posteriors. Both raise UserError
    where a part is missing or corrupt.
    """

    def __init__(self, folder: Path, scale: float, shift: float = 0.0):
        self.scale, self.shift = scale, shift
        self._rows = rows.Rows(folder, STEM)
        self.labels = self._rows.index["labels"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Tensor:
        return (self._rows[row][STEM][0, 0] - self.shift) * self.scale

    def draw(self, chosen: Tensor, generator: Generator) -> Tensor:
        """A sample of each image's posterior, [N, C, h, w]; of a random view where it has two."""
        moments = torch.stack([self._rows[row][STEM] for row in chosen.tolist()])
        views = torch.randint(moments.shape[1], (len(chosen),), generator=generator)
        mean, deviation = moments[torch.arange(len(chosen)), views].unbind(1)
        noise = torch.randn(mean.shape, generator=generator)
        return (mean + deviation * noise - self.shift) * self.scale


@dataclass(frozen=True)
class LatentData(Data):
    """Training data whose `images` are Latents."""

    images: Latents

    def clean(self, rows: Tensor, generator: Generator) -> Tensor:
        return self.images.draw(rows, generator)
