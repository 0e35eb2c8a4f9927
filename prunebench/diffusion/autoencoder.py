"""Autoencoders of latent models, as diffusers' classes: images in [-1, 1] <-> scaled latents.

Both ways work on batches of one fixed size, so that neither a latent nor a decoded image depends on
what comes with it (see `sampling`).
"""

import functools
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import pad

from prunebench import official
from prunebench.artefacts import read_json, sha256
from prunebench.diffusion.sampling import to_float
from prunebench.errors import UserError
from prunebench.models.unet import LAYOUTS

KINDS = ("AutoencoderKL",)
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Autoencoder:
    """An autoencoder in diffusers' layout: a folder of config.json and a safetensors file.

    Args:
        folder: where it lies; its weights are read when they are first needed.
        scale: what latents are multiplied with for the denoiser.
        batch: images that go through it at once.
        device: where they do.

    Raises:
        UserError: the folder holds no autoencoder that is known, or (later) not its weights.
    """

    def __init__(self, folder: Path, scale: float, batch: int, device: torch.device | str = "cpu"):
        self.folder, self.scale, self.batch, self.device = Path(folder), scale, batch, device
        self.config = read_json(self.folder / "config.json")
        if self.config.get("_class_name") not in KINDS:
            raise UserError(
                f"{self.folder / 'config.json'}: autoencoder '{self.config.get('_class_name')}'; "
                f"known: {', '.join(KINDS)}"
            )

    @functools.cached_property
    def module(self) -> nn.Module:
        kind = getattr(diffusers, self.config["_class_name"])
        with init_empty_weights(include_buffers=False):
            module = kind.from_config(self.config)
        file = self.folder / WEIGHTS
        layout = LAYOUTS["diffusers"]
        official.assign(module, official.read(file), layout, str(file), torch.float32)
        return module.eval().requires_grad_(False).to(self.device)

    def sha256(self) -> str:
        """Hash of the weights' file."""
        return sha256(self.folder / WEIGHTS)

    def latent_shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images (C, H, W)."""
        channels, height, width = image
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        if channels != self.config["in_channels"] or height % factor or width % factor:
            raise UserError(f"{self.folder}: no autoencoder of images {channels}x{height}x{width}")
        return self.config["latent_channels"], height // factor, width // factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the unscaled latents, [N, 2, C, h, w].

        Args:
            images: uint8 [N <= batch, C, H, W].
        """
        posterior = self.module.encode(to_float(self._full(images)).to(self.device)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1)[: len(images)].cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, C, H, W] in about [-1, 1] of scaled latents [N, C, h, w]."""
        parts = latents.split(self.batch)
        return torch.cat([self._decoded(self._full(part))[: len(part)] for part in parts])

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents / self.scale).sample

    def _full(self, batch: Tensor) -> Tensor:
        """A batch that is too short, filled up with zeros."""
        return pad(batch, (0, 0) * 3 + (0, self.batch - len(batch)))
