"""The loss of DiT's variance: Nichol & Dhariwal 2021."""

import math

import pytest
import tiny
import torch
from torch import Tensor
from torch.distributions import Normal

from prunebench.diffusion.objectives import FlowMatching, NoisePrediction
from prunebench.training import loop

GOAL = NoisePrediction()


def _batch(t: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit images, noise, times and what both make."""
    generator = torch.Generator().manual_seed(t)
    x0 = torch.randint(0, 256, (size, 1, 4, 4), generator=generator) / 127.5 - 1
    x0[0], x0[1] = -1, 1
    noise, times = torch.randn(x0.shape, generator=generator), torch.full((size,), t)
    return x0, noise, times, GOAL.noised(x0, noise, times)[0]


def _loss(prediction: Tensor, fraction: Tensor, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    return GOAL.variance_loss(torch.cat([prediction, fraction], 1), x0, noised, t)


def _ends(t: int) -> tuple[float, float]:
    """Variances of the posterior and of the forward process."""
    abar = GOAL.scheduler.alphas_cumprod.double()
    beta = 1 - abar[t] / abar[t - 1]
    return (beta * (1 - abar[t - 1]) / (1 - abar[t])).item(), beta.item()


@pytest.mark.parametrize("t", [1, 20, 500, 999])
def test_the_true_noise_with_the_posteriors_variance_costs_nothing(t):
    x0, noise, times, noised = _batch(t)
    low, high = _ends(t)
    assert _loss(noise, -torch.ones_like(x0), x0, noised, times).item() == pytest.approx(
        0, abs=1e-6
    )
    ratio = low / high  # and with the forward process's it costs the divergence of two spreads
    expected = (math.log(1 / ratio) + ratio - 1) / 2 / math.log(2)
    value = _loss(noise, torch.ones_like(x0), x0, noised, times).item()
    assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("t", [3, 20])
def test_the_best_variance_is_the_posteriors_plus_the_mean_squared_error_of_the_mean(t):
    """d/dv = 0 where log sigma^2 = log(posterior + (mean - mean_q)^2), whatever units v has."""
    x0, noise, times, noised = _batch(t)
    low, high = _ends(t)
    wrong = noise + 0.3
    abar = GOAL.scheduler.alphas_cumprod.double()
    # Of the mean (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha): DDPM, eq. 11.
    error = 0.3 * high / math.sqrt((1 - abar[t]) * (1 - high))
    best = (math.log(low + error**2) - math.log(low)) / (math.log(high) - math.log(low)) * 2 - 1
    fraction = torch.full_like(x0, best).requires_grad_()
    _loss(wrong, fraction, x0, noised, times).backward()
    slope = torch.full_like(x0, best - 0.5).requires_grad_()
    _loss(wrong, slope, x0, noised, times).backward()
    assert fraction.grad.abs().max() < 1e-2 * slope.grad.abs().min()


def test_the_last_step_is_the_likelihood_of_8_bit_values():
    x0, noise, times, noised = _batch(0)
    prediction, fraction = noise + 1, torch.zeros_like(x0)
    abar = GOAL.scheduler.alphas_cumprod.double()
    low, high = _ends(1)[0], (1 - abar[0]).item()
    spread = (low * high) ** 0.25  # v = 0: the geometric mean of the variances
    mean = ((noised - (1 - abar[0]).sqrt() * prediction) / abar[0].sqrt()).double()
    model, x = Normal(mean, spread), x0.double()
    mass = model.cdf(x + 1 / 255) - model.cdf(x - 1 / 255)
    mass = torch.where(x < -0.999, model.cdf(x + 1 / 255), mass)
    mass = torch.where(x > 0.999, 1 - model.cdf(x - 1 / 255), mass)
    expected = -mass.clamp_min(1e-12).log2().mean().item()
    value = _loss(prediction, fraction, x0, noised, times).item()
    assert value == pytest.approx(expected, rel=1e-3) and value > 1


def test_it_trains_the_variance_and_nothing_else():
    """No gradient reaches the prediction, whose own loss stays the mean squared error."""
    x0, noise, times, noised = _batch(50)
    times[:2] = 0
    prediction = (noise + 0.1).requires_grad_()
    fraction = torch.zeros_like(x0).requires_grad_()
    _loss(prediction, fraction, x0, noised, times).backward()
    assert not prediction.grad.any()
    assert fraction.grad.isfinite().all()
    assert fraction.grad[:2].any() and fraction.grad[2:].abs().amin() > 0


def test_a_flow_models_further_channels_have_no_loss():
    output, t = torch.randn(2, 6, 4, 4), torch.rand(2)
    assert FlowMatching().variance_loss(output, *[torch.randn(2, 3, 4, 4)] * 2, t).item() == 0


def test_training_lowers_the_bound_of_a_dit():
    model, data = tiny.dense("dit_sigma"), tiny.data("dit_sigma")
    batch = data.draw(64, torch.Generator().manual_seed(9), torch.device("cpu"))

    @torch.no_grad()
    def bound() -> float:
        return (loop.own_loss(model, batch) - loop.simple_loss(model, batch)).item()

    before = bound()
    loop.train(model, data, tiny.settings(learning_rate=5e-3), images=8 * 40, seed=0, muon_names=[])
    assert bound() < 0.9 * before
