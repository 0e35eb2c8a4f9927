"""PNDM's linear multistep method (PLMS; Liu et al. 2022, arXiv 2202.09778, section 3).

The gradient part averages the last four predictions as Adams-Bashforth does; the transfer part
takes the average from a time to the next. The first step is the improved Euler's, as in the
releases of latent diffusion, not Runge-Kutta's: one pass more than steps.
"""

from typing import Literal

from prunebench.diffusion.samplers import Entry
from prunebench.diffusion.spacing import Spaced


class Options(Spaced):
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    set_alpha_to_one: bool = False  # the last step leads to x0 itself, not to time 0

    def refusal(self, steps: int, train_steps: int) -> str | None:
        if steps < 3:  # looking ahead from pure noise to nearly clean images amplifies
            return f"steps: {steps} are too few for a multistep method; take at least 3"
        return super().refusal(steps, train_steps)


SAMPLER = Entry(name="pndm", objectives=("noise",), options=Options)


def denoise(predict, x, *, objective, steps, options, randomness):
    abar = objective.scheduler.alphas_cumprod
    times = options.times(steps, objective.train_steps)
    last = abar.new_ones(()) if options.set_alpha_to_one else abar[0]
    noises = []
    for t, then in zip(times, [*abar[times[1:]], last], strict=True):
        noises = [*noises[-3:], predict(x, t)]
        noise = _average(noises)
        if t == times[0]:
            end = predict(_transferred(x, noise, abar[t], then), times[1])
            noise = (end + noise) / 2
        x = _transferred(x, noise, abar[t], then)
    return x


def _average(e: list):
    """The gradient part: of the newest predictions, which come last."""
    if len(e) == 1:
        return e[-1]
    if len(e) == 2:
        return (3 * e[-1] - e[-2]) / 2
    if len(e) == 3:
        return (23 * e[-1] - 16 * e[-2] + 5 * e[-3]) / 12
    return (1 / 24) * (55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4])


def _transferred(x, noise, now, then):
    """The transfer part: DDIM's step from abar `now` to `then`, as one sum."""
    denominator = now * (1 - then) ** 0.5 + (now * (1 - now) * then) ** 0.5
    return (then / now) ** 0.5 * x - (then - now) * noise / denominator
