"""Narrow decoders: the decoder of an autoencoder with a share of the channels in every layer.

Y. Li et al., "SnapFusion: Text-to-Image Diffusion Model on Mobile Devices within Two Seconds",
NeurIPS 2023, arXiv 2306.00980, section 3.2: half of the channels, trained to decode the latents
that the denoiser draws as the whole decoder does. A decoder is no part of the denoiser, so it takes
part in no ranking of prunings.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import diffusers
import torch
from torch import Tensor, nn

from prunebench.diffusion.autoencoder import Autoencoder
from prunebench.errors import UserError

GROUPS = 32  # diffusers' default


def narrow(config: Mapping, width: float) -> nn.Module:
    """A decoder with new weights.

    Args:
        config: of an autoencoder, in diffusers' words.
        width: the share of channels.

    Raises:
        UserError: the channels that are left are no whole groups of its normalisations.
    """
    channels = [round(count * width) for count in config["block_out_channels"]]
    groups = config.get("norm_num_groups", GROUPS)
    if not all(channels) or any(count % groups for count in channels):
        raise UserError(
            f"decoder.width: {width} leaves {channels} channels, which are not all multiples of "
            f"the autoencoder's {groups} groups"
        )
    kind = getattr(diffusers, config["_class_name"])
    return kind.from_config({**config, "block_out_channels": channels}).decoder


@contextmanager
def decoding_by(coder: Autoencoder, decoder: nn.Module) -> Iterator[Autoencoder]:
    """The autoencoder with another decoder, for as long as the block runs."""
    own, coder.module.decoder = coder.module.decoder, decoder
    try:
        yield coder
    finally:
        coder.module.decoder = own


class _Nothing(nn.Module):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


@torch.no_grad()
def inputs_of(coder: Autoencoder, latents: Tensor) -> Tensor:
    """What the decoder is called with for latents: unscaled, quantised where the autoencoder does.

    Args:
        latents: as the denoiser draws them, [N, C, h, w].
    """
    with decoding_by(coder, _Nothing()):
        return coder.decode(latents)
