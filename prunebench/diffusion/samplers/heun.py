"""Heun's method on dx/dt = v, in even steps from time 1 to 0 (Karras et al. 2022, algorithm 1).

Two passes a step, but one in the last. `shift` as for euler.
"""

from prunebench.diffusion.samplers import Entry, follow
from prunebench.diffusion.samplers.euler import Options

SAMPLER = Entry(name="heun", objectives=("flow",), options=Options)


def denoise(predict, x, *, objective, steps, options, randomness):
    from diffusers import FlowMatchHeunDiscreteScheduler

    solver = FlowMatchHeunDiscreteScheduler(shift=options.shift)
    solver.sigma_min = 1 / steps  # diffusers' own last step would be from 0.001
    solver.set_timesteps(steps)
    return follow(solver, predict, x, scale=1000)
