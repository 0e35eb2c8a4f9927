"""DDIM without noise (Song et al. 2021, arXiv 2010.02502): eq. 12 with sigma = 0."""

from typing import Literal

from prunebench.diffusion.samplers import Entry
from prunebench.diffusion.spacing import Spaced


class Options(Spaced):
    timestep_spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "trailing"
    clip_sample: bool = True  # each prediction of x0 to [-1, 1]; for pixels, not for latents
    set_alpha_to_one: bool = True  # the last step leads to x0 itself, not to time 0


def path(options: Options, steps: int, train_steps: int) -> list[float | None]:
    return [*options.times(steps, train_steps), None if options.set_alpha_to_one else 0]


SAMPLER = Entry(name="ddim", objectives=("noise",), options=Options, path=path)


def denoise(predict, x, *, objective, steps, options, randomness):
    abar = objective.scheduler.alphas_cumprod
    times = options.times(steps, objective.train_steps)
    last = 1.0 if options.set_alpha_to_one else abar[0]
    for t, then in zip(times, [*abar[times[1:]], last], strict=True):
        now, noise = abar[t], predict(x, t)
        x0 = (x - (1 - now) ** 0.5 * noise) / now**0.5
        if options.clip_sample:
            x0 = x0.clamp(-1, 1)
        x = then**0.5 * x0 + (1 - then) ** 0.5 * noise
    return x
