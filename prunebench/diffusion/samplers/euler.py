"""Euler's method on dx/dt = v, in even steps from time 1 to 0 (Lipman et al. 2023, 2210.02747).

`shift` s moves a time t to s t / (1 + (s - 1) t), closer to noise where s > 1 (Esser et al. 2024,
arXiv 2403.03206, eq. 23).
"""

from pydantic import Field

from prunebench.diffusion import samplers
from prunebench.diffusion.samplers import Entry, follow


class Options(samplers.Options):
    shift: float = Field(1.0, gt=0)


def path(options: Options, steps: int, train_steps: None) -> list[float | None]:
    even = [i / steps for i in range(steps, 0, -1)]
    return [options.shift * t / (1 + (options.shift - 1) * t) for t in even] + [0.0]


SAMPLER = Entry(name="euler", objectives=("flow",), options=Options, path=path)


def denoise(predict, x, *, objective, steps, options, randomness):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    solver = FlowMatchEulerDiscreteScheduler(shift=options.shift)
    solver.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return follow(solver, predict, x, scale=1000)
