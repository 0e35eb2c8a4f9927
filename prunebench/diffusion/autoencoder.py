"""Autoencoders of latent models, as diffusers' classes: images in [-1, 1] <-> scaled latents.

Both ways work on batches of one fixed size, so that neither a latent nor a decoded image depends on
what comes with it (see `sampling`).
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import pad

from prunebench.diffusion.sampling import to_float
from prunebench.errors import UserError
from prunebench.models import official
from prunebench.models.official import Layout
from prunebench.models.unet import DDPM, LAYOUTS
from prunebench.records.artefacts import read_json, sha256

KINDS = ("AutoencoderKL", "VQModel")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# LDM-4's first stage, VQ-f4 (Rombach et al. 2022, table 8), which lies in the model's own file.
VQ_F4 = {
    "_class_name": "VQModel",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [128, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
}
FIRST_STAGE = "first_stage_model."


def _compvis_names(module: nn.Module, _: Iterable[str]) -> dict[str, str]:
    """Their parts are called as DDPM's; "up" counts from the finest level."""
    top = len(module.decoder.up_blocks) - 1

    def official(name: str) -> str:
        for pattern, replacement in DDPM.items():
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\bup\.(\d+)", lambda match: f"up.{top - int(match[1])}", name)
        return FIRST_STAGE + name

    return {name: official(name) for name in module.state_dict()}


DIFFUSERS = replace(LAYOUTS["diffusers"], pointwise=True)
COMPVIS = Layout(names=_compvis_names, others=f"(?!{FIRST_STAGE})", pointwise=True)


class Autoencoder:
    """An autoencoder: AutoencoderKL in diffusers' layout, or an LDM-4 file with its VQ-f4.

    A VQ model's latents are those before quantisation, which is part of decoding, as LDM's are.

    Args:
        place: a folder of config.json and a safetensors file, that of a pipeline with such a one
            as "vae", or the file of an LDM-4. Its weights are read when they are first needed.
        scale: what latents are multiplied with for the denoiser,
        batch: images that go through it at once.
        device: where they do.
        shift: after this was taken away (FLUX).

    Raises:
        UserError: the folder holds no autoencoder that is known, or (later) not its weights.
    """

    def __init__(
        self,
        place: Path,
        scale: float,
        batch: int,
        device: torch.device | str = "cpu",
        shift: float = 0.0,
    ):
        place = Path(place)
        self.place = place / "vae" if (place / "vae").is_dir() else place
        self.scale, self.shift, self.batch, self.device = scale, shift, batch, device
        own = self.place.is_dir()
        self.config = read_json(self.place / "config.json") if own else VQ_F4
        self.file, self.layout = (self.place / WEIGHTS, DIFFUSERS) if own else (self.place, COMPVIS)
        if self.config.get("_class_name") not in KINDS:
            raise UserError(
                f"{self.place / 'config.json'}: autoencoder '{self.config.get('_class_name')}'; "
                f"known: {', '.join(KINDS)}"
            )

    @functools.cached_property
    def module(self) -> nn.Module:
        kind = getattr(diffusers, self.config["_class_name"])
        with init_empty_weights(include_buffers=False):
            module = kind.from_config(self.config)
        stored = official.read(self.file)
        official.assign(module, stored, self.layout, str(self.file), torch.float32)
        return module.eval().requires_grad_(False).to(self.device)

    def sha256(self) -> dict[str, str]:
        """Hashes of the weights' file and, where there is one, the configuration's."""
        files = [self.file, *([self.place / "config.json"] if self.place.is_dir() else [])]
        return {file.name: sha256(file) for file in files}

    def latent_shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images (C, H, W)."""
        channels, height, width = image
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        if channels != self.config["in_channels"] or height % factor or width % factor:
            raise UserError(f"{self.place}: no autoencoder of images {channels}x{height}x{width}")
        return self.config["latent_channels"], height // factor, width // factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the unscaled latents, [N, 2, C, h, w].

        Args:
            images: uint8 [N <= batch, C, H, W].
        """
        encoded = self.module.encode(to_float(self._full(images)).to(self.device))
        if self.config["_class_name"] == "VQModel":  # a point
            moments = encoded.latents, torch.zeros_like(encoded.latents)
        else:
            moments = encoded.latent_dist.mean, encoded.latent_dist.std
        return torch.stack(moments, 1)[: len(images)].cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, C, H, W] in about [-1, 1] of scaled latents [N, C, h, w]."""
        parts = latents.split(self.batch)
        return torch.cat([self._decoded(self._full(part))[: len(part)] for part in parts])

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents / self.scale + self.shift).sample

    def _full(self, batch: Tensor) -> Tensor:
        """A batch that is too short, filled up with zeros."""
        return pad(batch, (0, 0) * 3 + (0, self.batch - len(batch)))
