"""SiT's stochastic sampler (Ma et al. 2024, arXiv 2401.08740, eq. 4) with its released settings.

From t = 1 (noise) down it follows dx = -(v - w s) dt + sqrt(2 w) dW with the diffusion w = t and
the score s = -(x + (1 - t) v) / t of the linear path, in `steps` - 1 Euler-Maruyama steps to
t = `last_step`, and from there to 0 without noise.
"""

from pydantic import Field

from prunebench.diffusion import samplers
from prunebench.diffusion.samplers import Entry


class Options(samplers.Options):
    last_step: float = Field(0.04, gt=0, lt=1)

    def refusal(self, steps: int, train_steps: int | None) -> str | None:
        return "steps: the last one takes no noise; take at least 2" if steps < 2 else None


SAMPLER = Entry(name="euler-maruyama", objectives=("flow",), stochastic=True, options=Options)


def denoise(predict, x, *, objective, steps, options, randomness):
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    times = torch.linspace(1, options.last_step, steps, dtype=torch.float64).tolist()
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        velocity, size = predict(x, t), t - after
        x = x - size * velocity - size * (x + (1 - t) * velocity)
        if after:
            x = x + (2 * t * size) ** 0.5 * randn_tensor(x.shape, randomness, x.device, x.dtype)
    return x
