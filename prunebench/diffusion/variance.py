"""The loss of a variance that a network predicts beside the noise, as DiT does."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.special import ndtr

SMALLEST = 1e-12  # of a likelihood, before its logarithm


class VarianceBound:
    """L_vlb of Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 4 to 6), of the variance alone.

    The network's v in [-1, 1] places the log variance of a step between those of the posterior
    (-1) and of the forward process (1): eq. 15. The predicted mean is taken as it is, without
    gradient (sec. 3.1). The loss is the mean of L_t in bits per dimension over the times drawn,
    which is their 0.001 L_vlb for 1,000 steps and what the released DiTs were trained with.

    Args:
        alphas_cumprod: abar_t, [T].
    """

    def __init__(self, alphas_cumprod: Tensor):
        abar = alphas_cumprod.double()
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        beta = 1 - abar / before
        posterior = beta * (1 - before) / (1 - abar)
        posterior[0] = posterior[1]  # is 0, and has no logarithm
        self.tables = {
            "abar": abar,
            "x0_weight": before.sqrt() * beta / (1 - abar),  # of the posterior's mean (DDPM, eq. 7)
            "low": posterior.log(),
            "high": beta.log(),
        }

    def loss(
        self, prediction: Tensor, fraction: Tensor, x0: Tensor, noised: Tensor, t: Tensor
    ) -> Tensor:
        """Bits per dimension, []. Noise predicted, v, image and input [N, C, H, W]; t int64 [N]."""
        at = {name: _at(table, t) for name, table in self.tables.items()}
        guess = _guess(prediction.detach().float(), noised, at)
        spread = _spread(fraction, at)
        # Means relative to the posterior's: the part that both have of `noised` cancels.
        mean = at["x0_weight"] * (guess - x0)
        kl = kl_divergence(
            Normal(torch.zeros_like(mean), (at["low"] / 2).exp().expand_as(mean)),
            Normal(mean, spread, validate_args=False),  # the training loop finds what is no number
        )
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -_log_likelihood(x0, guess, spread), kl)
        return nats.mean() / math.log(2)

    def apart(self, output: Tensor, lesson: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """KL divergence of the step that a student takes from its teacher's, in bits, [].

        As in `loss` the student's mean is taken as it is. Both outputs, noise and v, are
        [N, 2C, H, W].
        """
        at = {name: _at(table, t) for name, table in self.tables.items()}
        steps = []
        for found in (lesson, output):
            prediction, fraction = found.chunk(2, 1)
            mean = at["x0_weight"] * _guess(prediction.detach().float(), noised, at)
            steps.append(Normal(mean, _spread(fraction, at), validate_args=False))
        return kl_divergence(*steps).mean() / math.log(2)


def _guess(prediction: Tensor, noised: Tensor, at: Mapping[str, Tensor]) -> Tensor:
    """The image that a predicted noise implies."""
    return (noised - (1 - at["abar"]).sqrt() * prediction) / at["abar"].sqrt()


def _spread(fraction: Tensor, at: Mapping[str, Tensor]) -> Tensor:
    """The standard deviation that a network's v in [-1, 1] stands for."""
    return (torch.lerp(at["low"], at["high"], (fraction.float() + 1) / 2) / 2).exp()


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table.to(t.device)[t].float().view(-1, 1, 1, 1)


def _log_likelihood(x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Of 8-bit values x in [-1, 1]: a Gaussian's mass in their bins, open at both ends (DDPM, 13).

    DiT applies it to latents just so.
    """
    above, below = (ndtr((x - mean + side / 255) / spread) for side in (1, -1))
    above = torch.where(x > 0.999, torch.ones_like(above), above)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp_min(SMALLEST).log()
