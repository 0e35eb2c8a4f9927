"""Latents of the training set, encoded once and then mapped from disk, never read whole.

What is stored are the posterior's moments, so that every draw samples it anew, as training with the
autoencoder in the loop would; and where the track asks for flips, those of the mirrored images too:
mirroring a latent gives other images. float16 rounds by 2^-11 of the value, which moves a decoded
image less than rounding it to 8 bits does.

The moments lie in parts, each written in one go, so that a killed `encode` goes on where it was.
A part is read row by row; every row is checked against its CRC when it is drawn, because hashing
tens of gigabytes would take every job longer than its work.
"""

import functools
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from prunebench import artefacts
from prunebench.diffusion.autoencoder import Autoencoder
from prunebench.errors import UserError
from prunebench.training.loop import Data, counted

log = logging.getLogger(__name__)

PART = 4096  # images of one file: 268 MB of ImageNet-256's latents with flips
INDEX, IDENTITY = "index.safetensors", "encoding.json"
AGAIN = "delete it and latents.json beside it and run again, other parts are kept"


def part_file(folder: Path, index: int) -> Path:
    return folder / f"moments{index:05d}.safetensors"


def encode(
    folder: Path,
    images: Sequence,
    labels: Tensor,
    autoencoder: Autoencoder,
    flip: bool,
    identity: dict,
    part: int = PART,
) -> Path:
    """Write the moments of all images; parts that an interrupted call left are kept.

    Args:
        images: uint8, of which slices are taken, [N, C, H, W] as a whole.
        labels: int64 [N].
        flip: whether the mirrored images are encoded as well.
        identity: what the latents depend on; parts of another identity are removed.
        part: images of a file; rounded to whole batches of the autoencoder.

    Returns:
        the index, which holds the checksums of all parts: who has verified it needs no more.

    Raises:
        UserError: the autoencoder's latents are not finite, or the disk is full.
    """
    part = max(part // autoencoder.batch, 1) * autoencoder.batch  # only the last batch is filled up
    _claim(folder, {**identity, "flip": flip, "part": part, "count": len(images)})
    checks = []
    for index in counted(0, -(-len(images) // part), "encode"):
        rows = range(index * part, min((index + 1) * part, len(images)))
        encoded = functools.partial(_moments, images, rows, autoencoder, flip)
        checks.append(_part(part_file(folder, index), encoded))
    content = {"labels": labels, "checks": torch.cat(checks), "part": torch.tensor(part)}
    artefacts.write_tensors(folder / INDEX, content)
    return folder / INDEX


def _claim(folder: Path, identity: dict) -> None:
    note, text = folder / IDENTITY, json.dumps(identity, sort_keys=True)
    if note.exists() and note.read_text() == text:
        return
    if folder.exists():
        log.info("%s: parts of other images, another autoencoder or code are removed", folder)
        shutil.rmtree(folder)
    artefacts.write_atomically(note, lambda temporary: temporary.write_text(text))


def _part(file: Path, encoded: Callable[[], Tensor]) -> Tensor:
    """The checksums of a part, which is written unless it is there and sound."""
    if file.exists():
        kept = artefacts.read_tensors(file)
        if torch.equal(_checks(kept["moments"]), kept["checks"]):
            return kept["checks"]
        log.warning("%s is corrupt: encoded anew", file)
    moments = encoded()
    checks = _checks(moments)
    artefacts.write_tensors(file, {"moments": moments, "checks": checks})
    return checks


def _moments(images: Sequence, rows: range, autoencoder: Autoencoder, flip: bool) -> Tensor:
    """Moments of some images, float16 [n, views, 2, C, h, w]."""
    found = []
    for start in range(rows.start, rows.stop, autoencoder.batch):
        some = images[start : min(start + autoencoder.batch, rows.stop)]
        views = [some, some.flip(-1)] if flip else [some]
        found.append(torch.stack([autoencoder.moments(view) for view in views], 1).half())
        if not found[-1].isfinite().all():
            raise UserError(f"{autoencoder.place}: latents from image {start} on are not finite")
    return torch.cat(found)


def _checks(moments: Tensor) -> Tensor:
    """CRC-32 of each image's moments, int64 [n]."""
    return torch.tensor([_check(image) for image in moments])


def _check(moments: Tensor) -> int:
    return zlib.crc32(moments.numpy())


class Latents:
    """Encoded images in a folder that `encode` wrote, scaled for the denoiser.

    `latents[i]` is the mean of image i's posterior; `draw` samples posteriors. Both raise UserError
    where a part is missing or corrupt.
    """

    def __init__(self, folder: Path, scale: float):
        self.folder, self.scale = Path(folder), scale
        index = artefacts.read_tensors(self.folder / INDEX)
        self.labels, self._all_checks = index["labels"], index["checks"]
        self._size = int(index["part"])
        self._parts: dict[int, object] = {}  # mapped tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Tensor:
        return self._moments(row)[0, 0] * self.scale

    def draw(self, rows: Tensor, generator: Generator) -> Tensor:
        """A sample of each image's posterior, [N, C, h, w]; of a random view where it has two."""
        moments = torch.stack([self._moments(row) for row in rows.tolist()])
        views = torch.randint(moments.shape[1], (len(rows),), generator=generator)
        mean, deviation = moments[torch.arange(len(rows)), views].unbind(1)
        noise = torch.randn(mean.shape, generator=generator)
        return (mean + deviation * noise) * self.scale

    def _moments(self, row: int) -> Tensor:
        """float32 [views, 2, C, h, w] of one image, checked."""
        index, place = divmod(row, self._size)
        file = part_file(self.folder, index)
        try:
            if index not in self._parts:
                self._parts[index] = safe_open(file, "pt").get_slice("moments")
            stored = self._parts[index][place : place + 1][0]
        except FileNotFoundError:
            raise UserError(f"{file} is missing; {AGAIN}") from None
        except (SafetensorError, IndexError) as error:
            raise UserError(f"{file} is corrupt ({error}); {AGAIN}") from error
        if _check(stored) != self._all_checks[row]:
            raise UserError(f"{file} is corrupt (image {row}); {AGAIN}")
        return stored.float()


@dataclass(frozen=True)
class LatentData(Data):
    """Training data whose `images` are Latents."""

    images: Latents

    def clean(self, rows: Tensor, generator: Generator) -> Tensor:
        return self.images.draw(rows, generator)
