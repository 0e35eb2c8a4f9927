"""Sampling in which image i depends on seed and i only.

Float arithmetic of a matrix product depends on the shape it is called with, so equal noise is not
enough for equal images. Every forward pass therefore has the same number of lanes, and image i
always sits in lane i % lanes of an aligned block; batch size and sharding choose only which blocks
are computed together. `lanes` can move the last bits and so is a constant of the track.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, resize

from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import Objective
from prunebench.errors import CellError, UserError, short_of_memory
from prunebench.models.conditions import CLASSES, Condition, Conditions, each


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` in a cell with `seed`; hashed, so that neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7], "big")


def shard_range(index: int, shards: int, count: int, lanes: int) -> range:
    """Which of `count` images shard `index` draws: whole blocks of `lanes`, split nearly evenly."""
    blocks = -(-count // lanes)
    start, stop = (blocks * i // shards * lanes for i in (index, index + 1))
    return range(start, min(stop, count))


def generators(seed: int, indices: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(image_seed(seed, index)) for index in indices]


class Sampler:
    """Draws images from a model with the settings of a track.

    Args:
        model: the denoiser, (x, t, y) -> prediction.
        objective: the objective it was trained with.
        shape: (C, H, W) of what the model denoises: an image, or its latents.
        classes: image i has the label i % classes.
        settings: `sampler`, `steps`, `lanes`, and optionally `guidance`, `guidance_channels` (only
            the first so many are guided, as in DiT's and SiT's code), `options` and `size` (of the
            images that are returned).
        steps: fraction of the settings' steps to take (a plan of kind "steps").
        decode: what makes images of the model's latents, for latent models.
        conditions: what the model takes for labels.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        shape: tuple[int, int, int],
        classes: int,
        settings: dict,
        steps: float = 1.0,
        decode: Callable[[Tensor], Tensor] | None = None,
        conditions: Conditions = CLASSES,
    ):
        self.model, self.objective, self.shape, self.classes = model, objective, shape, classes
        self.settings, self.decode, self.conditions = settings, decode, conditions
        self.steps = round(settings["steps"] * steps)
        self.options = samplers.checked(
            settings["sampler"],
            self.steps,
            settings.get("options", {}),
            objective.name,
            objective.train_steps,
        )
        self.device = next(model.parameters()).device

    def labels(self, indices: range) -> Tensor:
        return torch.tensor(indices) % self.classes

    def asked(self, indices: range) -> Condition:
        """What the model takes for these images, on its device."""
        return each(lambda v: v.to(self.device), self.conditions.of(self.labels(indices)))

    def images(self, seed: int, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """uint8 images [<= batch, C, H, W] of the indices from `start` to `stop`."""
        for first in range(start, stop, batch):
            last = min(first + batch, stop)
            lanes = self.settings["lanes"]
            blocks = range(first // lanes, -(-last // lanes))
            whole = torch.cat([self._block(seed, block) for block in blocks])
            offset = blocks.start * lanes
            yield whole[first - offset : last - offset]

    @torch.no_grad()
    def _block(self, seed: int, block: int) -> Tensor:
        x = self.undecoded(seed, block)
        if self.decode:
            with self._enough_memory():
                x = _finite(self.decode(x))
        return shrunk(to_uint8(x).cpu(), self.settings.get("size"))

    @torch.no_grad()
    def undecoded(self, seed: int, block: int) -> Tensor:
        """What the model denoises in a block of lanes, [lanes, *shape], before any decoding."""
        lanes = self.settings["lanes"]
        indices = range(block * lanes, (block + 1) * lanes)
        randomness = generators(seed, indices)
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in randomness])
        asked = self.asked(indices)
        with self._enough_memory():
            return _finite(self.denoise(noise.to(self.device), asked, randomness))

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Say what can be done where a block does not fit into the device's memory."""
        try:
            yield
        except RuntimeError as error:
            if not short_of_memory(error):
                raise
            raise UserError(
                f"the device has too little memory to draw {self.settings['lanes']} images at "
                "once; take a larger one, or lower sampling.lanes, a constant of the track: all "
                "images are drawn anew"
            ) from error

    def denoise(self, x: Tensor, y: Condition, randomness: list | None = None) -> Tensor:
        """Follow the sampler from noise [N, C, H, W] to images in [-1, 1], or to latents;
        differentiable.
        """
        return samplers.denoise(
            self.settings["sampler"],
            lambda x, t: self._native(x, t, y),
            x,
            objective=self.objective,
            steps=self.steps,
            options=self.options,
            randomness=randomness,
        )

    def _native(self, x: Tensor, t: float | Tensor, y: Condition) -> Tensor:
        """The guided prediction at one time of the objective, as the sampler takes it."""
        times = torch.as_tensor(t).expand(len(x)).to(self.device)
        output = self.predict(x, self.objective.model_time(times), y)
        return self.objective.native(output, x, times)

    def predict(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The model's prediction under classifier-free guidance (1 = none, one pass)."""
        guidance = self.settings.get("guidance", 1.0)
        asked = self._forward(x, t, y)
        if guidance == 1.0:
            return asked
        null = self._forward(x, t, self.conditions.nothing(y, self.model))
        guided = self.settings.get("guidance_channels", x.shape[1])
        mixed = torch.lerp(null[:, :guided], asked[:, :guided], guidance)
        return torch.cat([mixed, asked[:, guided:]], 1)

    def _forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The model's prediction; DiT's variance after it only where the sampler uses that."""
        output = self.model(x, t, y)
        return output if self.options.reads_variance() else output[:, : x.shape[1]]


def _finite(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise CellError("the model draws images that are not finite numbers")
    return x


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return images.float() / 127.5 - 1


def flip_some(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image [N, C, H, W] left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def shrunk(images: Tensor, size: int | None) -> Tensor:
    """uint8 images [N, C, R, R] at another size, bicubically; as they are without one."""
    if size in (None, images.shape[-1]):
        return images
    return resize(images, [size, size], InterpolationMode.BICUBIC, antialias=True)


def to_uint8(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
