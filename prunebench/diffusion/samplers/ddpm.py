"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2), over some of the times.

The variance of a step is the posterior's (`fixed_small`), the forward process's (`fixed_large`),
or between them as the network says (`learned_range`: Nichol & Dhariwal 2021, arXiv 2102.09672,
eq. 15).
"""

from typing import Literal

from prunebench.diffusion.samplers import Entry, follow
from prunebench.diffusion.spacing import Spaced


class Options(Spaced):
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    clip_sample: bool = True  # each prediction of x0 to [-1, 1]; for pixels, not for latents
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"

    def reads_variance(self) -> bool:
        return self.variance_type == "learned_range"


SAMPLER = Entry(name="ddpm", objectives=("noise",), stochastic=True, options=Options)


def denoise(predict, x, *, objective, steps, options, randomness):
    from diffusers import DDPMScheduler

    solver = DDPMScheduler(
        **objective.schedule, clip_sample=options.clip_sample, variance_type=options.variance_type
    )
    solver.set_timesteps(timesteps=options.times(steps, objective.train_steps))
    return follow(solver, predict, x, generator=randomness)
