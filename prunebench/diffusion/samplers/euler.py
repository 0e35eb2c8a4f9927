"""Euler's method on dx/dt = v, in even steps from time 1 to 0 (Lipman et al. 2023, 2210.02747).

`shift` s moves a time t to s t / (1 + (s - 1) t), closer to noise where s > 1 (Esser et al. 2024,
arXiv 2403.03206, eq. 23).
"""

from pydantic import Field

from prunebench.diffusion import samplers
from prunebench.diffusion.samplers import Entry, follow


class Options(samplers.Options):
    shift: float = Field(1.0, gt=0)


SAMPLER = Entry(name="euler", objectives=("flow",), options=Options)


def denoise(predict, x, *, objective, steps, options, randomness):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    solver = FlowMatchEulerDiscreteScheduler(shift=options.shift)
    solver.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return follow(solver, predict, x, scale=1000)
