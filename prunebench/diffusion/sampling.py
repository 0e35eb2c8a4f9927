"""Sampling in which image i depends on seed and i only.

Float arithmetic of a matrix product depends on the shape it is called with, so equal noise is not
enough for equal images. Every forward pass therefore has the same number of lanes, and image i
always sits in lane i % lanes of an aligned block; batch size and sharding choose only which blocks
are computed together. `lanes` can move the last bits and so is a constant of the track.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, resize

from prunebench.diffusion.objectives import FlowMatching, Objective
from prunebench.errors import CellError, UserError, short_of_memory
from prunebench.models.conditions import CLASSES, Condition, Conditions, each


class EulerMaruyama:
    """SiT's stochastic sampler (Ma et al. 2024, eq. 4) with its released settings.

    From t = 1 (noise) down it follows dx = -(v - w s) dt + sqrt(2 w) dW with the diffusion w = t
    and the score s = -(x + (1 - t) v) / t of the linear path, in `steps` - 1 Euler-Maruyama steps
    to t = `last_step`, and from there to 0 without noise. It has the interface of diffusers'
    schedulers, flow times from 0 to 1000 included.
    """

    def __init__(self, last_step: float = 0.04):
        self.last_step = last_step

    def set_timesteps(self, steps: int) -> None:
        times = torch.linspace(1, self.last_step, steps, dtype=torch.float64)
        self.timesteps = (times * 1000).float()
        self._sizes = dict(zip(self.timesteps.tolist(), [*(-times.diff()), times[-1]], strict=True))

    def step(
        self, velocity: Tensor, t: Tensor, x: Tensor, generator: list | None = None
    ) -> SimpleNamespace:
        """x [N, C, H, W] after the step from t; image n draws from generator n."""
        size, time = float(self._sizes[t.item()]), t.item() / 1000
        mean = x - size * velocity - size * (x + (1 - time) * velocity)
        if t == self.timesteps[-1]:
            return SimpleNamespace(prev_sample=mean)
        noise = randn_tensor(x.shape, generator, x.device, x.dtype)
        return SimpleNamespace(prev_sample=mean + math.sqrt(2 * time * size) * noise)


class DDIM(diffusers.DDIMScheduler):
    """diffusers' DDIM, and `timestep_spacing: quadratic`, the times of DDIM's code for CIFAR-10.

    These are the squares of an even grid from 0 to sqrt(0.8 T), rounded down; of 100 steps 96 are
    left, because a step from a time to itself does nothing. diffusers derives the time that a step
    leads to from even spacing. So it is given the schedule thinned to the times, in which every
    step leads to the entry before.
    """

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        if self.config.timestep_spacing != "quadratic":
            super().set_timesteps(num_inference_steps, device)
            return
        if num_inference_steps < 2:
            raise UserError("timestep_spacing: quadratic starts at time 0 with one step; take more")
        span = 0.8 * self.config.num_train_timesteps
        grid = np.linspace(0, np.sqrt(span), num_inference_steps) ** 2
        self.thin(np.unique(grid.astype(np.int64)).tolist(), device)

    def thin(self, times: list[int], device: torch.device | None = None) -> None:
        """Take these ascending times, from the last one down."""
        self.timesteps = torch.tensor(times[::-1], device=device)
        self.alphas_cumprod = self.alphas.cumprod(0)[times]
        self.num_inference_steps = self.config.num_train_timesteps  # a stride of one

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options) -> object:
        if self.config.timestep_spacing == "quadratic":
            timestep = (self.timesteps < timestep).sum()  # its place in the thinned schedule
        return super().step(model_output, timestep, sample, **options)


SAMPLERS = {
    "ddim": functools.partial(DDIM, timestep_spacing="trailing"),
    "ddpm": diffusers.DDPMScheduler,
    "dpm-solver++": functools.partial(
        diffusers.DPMSolverMultistepScheduler, timestep_spacing="trailing"
    ),
    "pndm": functools.partial(diffusers.PNDMScheduler, skip_prk_steps=True),
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "euler-maruyama": EulerMaruyama,
}
STOCHASTIC = ("ddpm", "euler-maruyama")  # they draw noise on the way


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


def scheduler(name: str, objective: Objective, steps: int, options: dict) -> object:
    """A diffusers scheduler set to `steps` steps; flow samplers use an even grid from 1 to 0."""
    schedule = {} if isinstance(objective, FlowMatching) else objective.schedule
    solver = SAMPLERS[name](**schedule, **options)
    if name == "euler":
        solver.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        return solver
    if name == "heun":
        solver.sigma_min = 1 / steps  # diffusers' own last step would be from 0.001
    solver.set_timesteps(steps)
    return solver


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
        lanes = self.settings["lanes"]
        indices = range(block * lanes, (block + 1) * lanes)
        randomness = generators(seed, indices)
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in randomness])
        asked = self.asked(indices)
        try:
            x = self.denoise(noise.to(self.device), asked, randomness)
            if self.decode and x.isfinite().all():
                x = self.decode(x)
        except RuntimeError as error:
            if not short_of_memory(error):
                raise
            raise UserError(
                f"the device has too little memory to draw {lanes} images at once; take a larger "
                "one, or lower sampling.lanes, a constant of the track: all images are drawn anew"
            ) from error
        if not x.isfinite().all():
            raise CellError("the model draws images that are not finite numbers")
        return shrunk(to_uint8(x).cpu(), self.settings.get("size"))

    def denoise(self, x: Tensor, y: Condition, randomness: list | None = None) -> Tensor:
        """Follow the sampler from noise [N, C, H, W] to images in [-1, 1], or to latents;
        differentiable.
        """
        solver = scheduler(
            self.settings["sampler"], self.objective, self.steps, self.settings.get("options", {})
        )
        stochastic = {"generator": randomness} if self.settings["sampler"] in STOCHASTIC else {}
        for t in solver.timesteps:
            prediction = self.predict(x, self._network_time(t, len(x)), y)
            x = solver.step(prediction, t, x, **stochastic).prev_sample
        return x

    def _network_time(self, t: Tensor, count: int) -> Tensor:
        # Schedulers count flow time from 0 to 1000 as well; the objective's own runs from 0 to 1.
        t = t / 1000 if isinstance(self.objective, FlowMatching) else t
        return self.objective.model_time(t).expand(count).to(self.device)

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
        learned = self.settings.get("options", {}).get("variance_type") == "learned_range"
        return output if learned else output[:, : x.shape[1]]


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
