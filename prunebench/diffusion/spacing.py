"""Which of the T times of a noise schedule a sampler visits: the part of it that needs no torch.

Lists descend, from the noisiest time visited to the cleanest.
"""

from fractions import Fraction
from math import sqrt
from typing import Literal

from pydantic import Field

from prunebench.diffusion.options import Options


def leading(steps: int, train_steps: int) -> list[int]:
    """0, k, 2k, ... with k = T // steps: the start of each part. `steps` times."""
    return [i * (train_steps // steps) for i in reversed(range(steps))]


def linspace(steps: int, train_steps: int) -> list[int]:
    """An even grid from 0 to T - 1, rounded as numpy does. `steps` times."""
    if steps == 1:
        return [0]
    stride = (train_steps - 1) / (steps - 1)
    return [round(i * stride) for i in reversed(range(steps))]


def trailing(steps: int, train_steps: int) -> list[int]:
    """An even grid from T - 1 down, which stops before -1, rounded. `steps` times.

    Exact: sums of floats go on to -1, the noisiest time, at 62 of the 1,000 numbers of steps.
    """
    return [round(Fraction(i * train_steps, steps)) - 1 for i in range(steps, 0, -1)]


def quadratic(steps: int, train_steps: int) -> list[int]:
    """The squares of an even grid from 0 to sqrt(0.8 T), rounded down: DDIM's code for CIFAR-10.

    Of 100 times 96 are left, because a step from a time to itself does nothing.
    """
    if steps == 1:
        return [0]
    top = sqrt(0.8 * train_steps)
    grid = [i * (top / (steps - 1)) for i in range(steps - 1)] + [top]
    return sorted({int(root**2) for root in grid}, reverse=True)


SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing, "quadratic": quadratic}


class Spaced(Options):
    """Options of a sampler that visits some of the T times of a noise schedule."""

    timestep_spacing: Literal["leading", "linspace", "trailing"] = "trailing"
    steps_offset: int = Field(0, ge=0)  # added to the times of "leading"

    def times(self, steps: int, train_steps: int) -> list[int]:
        """The times visited, descending."""
        found = SPACINGS[self.timestep_spacing](steps, train_steps)
        offset = self.steps_offset if self.timestep_spacing == "leading" else 0
        return [time + offset for time in found]

    def refusal(self, steps: int, train_steps: int) -> str | None:
        if steps > train_steps:
            return f"steps: {steps} of {train_steps} times; take at most {train_steps}"
        times, spacing = self.times(steps, train_steps), self.timestep_spacing
        if times[0] >= train_steps:
            return f"options.steps_offset: {steps} steps would begin after the last time; lower it"
        here = f"options.timestep_spacing: '{spacing}' with {steps} steps"
        if len(set(times)) < len(times):
            return f"{here} visits times twice; take fewer, or another spacing"
        if times[0] < train_steps / 2:
            return f"{here} begins at time {times[0]} of {train_steps}, which is not noise"
        left = train_steps - 1 - times[0]
        # An even step is left out by definition; what its rounding leaves out must be little.
        if spacing == "leading" and left > train_steps * (1 / 10 + 1 / steps):
            return (
                f"{here} never visits the noisiest {left} of {train_steps} times; "
                "use linspace or trailing"
            )
        return None
