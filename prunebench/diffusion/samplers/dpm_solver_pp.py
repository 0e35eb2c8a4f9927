"""DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2: "2M").

The last step is of first order: it ends without noise, where the second order is not defined.
"""

from typing import Literal

from prunebench.diffusion.samplers import Entry, follow
from prunebench.diffusion.spacing import Spaced


class Options(Spaced):
    solver_order: Literal[1, 2] = 2
    lower_order_final: bool = True

    def times(self, steps: int, train_steps: int) -> list[int]:
        """As diffusers: time 0, where leading and linspace end, is not visited but arrived at."""
        if self.timestep_spacing == "trailing":
            return super().times(steps, train_steps)
        return super().times(steps + 1, train_steps)[:-1]


SAMPLER = Entry(name="dpm-solver++", objectives=("noise",), options=Options)


def denoise(predict, x, *, objective, steps, options, randomness):
    from diffusers import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler(
        **objective.schedule,
        solver_order=options.solver_order,
        lower_order_final=options.lower_order_final,
    )
    solver.set_timesteps(timesteps=options.times(steps, objective.train_steps))
    return follow(solver, predict, x)
