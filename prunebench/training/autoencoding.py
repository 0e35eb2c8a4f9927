"""Training autoencoders: a small one on the images of a track, and narrow decoders of any.

Both compare pixels by their mean squared error. Published autoencoders add a perceptual and an
adversarial term (Rombach et al. 2022, section 3.1), which tiny grey images do not need.
"""

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from prunebench.diffusion.sampling import to_float
from prunebench.training.loop import Batch, Data, Loss


class Reconstruction(nn.Module):
    """What an autoencoder is trained by, per image.

    The mean squared error of the pixels in [-1, 1], plus `kl` times the divergence of the posterior
    from a standard normal distribution, a mean over the latent's entries.
    """

    def __init__(self, coder: AutoencoderKL, kl: float):
        super().__init__()
        self.coder, self.kl = coder, kl

    def forward(self, images: Tensor) -> Tensor:
        """The loss [N] of images [N, C, H, W]."""
        posterior = self.coder.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        error = (self.coder.decode(latents).sample - images).square().flatten(1).mean(1)
        return error + self.kl * posterior.kl() / latents[0].numel()


def reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a batch's clean images, of a `Reconstruction`."""
    return model(batch.x0).mean()


@torch.no_grad()
def standardise(coder: AutoencoderKL, images: Tensor, batch: int) -> None:
    """Have latents of mean 0 and variance 1 in every channel; images decode as before.

    The 1x1 convolutions around the latents take the change up, so that it is part of the weights.

    Args:
        images: uint8 [N, C, H, W], whose latents count.
        batch: how many go through at once.
    """
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    found = [coder.encode(to_float(part).to(coder.device)).latent_dist for part in parts]
    means = torch.cat([posterior.mean for posterior in found])
    variances = torch.cat([posterior.var for posterior in found])
    mean = means.mean((0, 2, 3))
    deviation = (means.var((0, 2, 3), unbiased=False) + variances.mean((0, 2, 3))).sqrt()
    before, after, channels = coder.quant_conv, coder.post_quant_conv, len(mean)
    before.weight[:channels] /= deviation[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()  # of a log-variance
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]


class Inputs(Data):
    """What a decoder is called with, float [N, C, h, w], as the images of a training."""

    def clean(self, rows: Tensor, generator: Generator) -> Tensor:
        return self.images[rows]


def imitation_loss(teacher: nn.Module) -> Loss:
    """Mean squared error to the images that another decoder makes of the same inputs."""

    def value(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch.x0)
        return mse_loss(student(batch.x0), wanted)

    return value
