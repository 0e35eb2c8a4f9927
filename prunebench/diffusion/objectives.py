"""What a model is trained to predict. An objective knows its times, its noising and its target."""

import functools
from typing import Protocol

import torch
from diffusers import DDPMScheduler
from torch import Generator, Tensor

from prunebench.diffusion.variance import VarianceBound
from prunebench.errors import UserError

PREDICTIONS = ("noise", "velocity")  # of networks that are trained with a noise schedule


class Objective(Protocol):
    """Times run from clean to noisy; every method sees models through these functions.

    Attributes:
        name: as in a track.
        train_steps: how many times there are; None where time is continuous.
    """

    name: str
    train_steps: int | None

    def sample_times(self, count: int, generator: Generator) -> Tensor:
        """`count` training times, [count]."""

    def grid(self, count: int) -> Tensor:
        """`count` evenly spaced times in ascending noise, [count]."""

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The model's input at time t and its target, both [N, C, H, W]."""

    def model_time(self, t: Tensor) -> Tensor:
        """The time as the network takes it."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """How much image a and how much noise s there is at times [N]: the input is
        a x0 + s noise; both [N].
        """

    def parts(self, prediction: Tensor, noised: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the noise that a prediction at times t, [N], implies; all
        [N, C, H, W]. a image + s noise is `noised`, whatever is predicted.
        """

    def native(self, output: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """A network's output as the samplers of `name` take it, at times t, [N]."""

    def variance_loss(self, output: Tensor, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The loss of what a network puts out beside its prediction: output [N, 2C, H, W] -> []."""

    def variance_apart(self, output: Tensor, lesson: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """How far it is from a teacher's: outputs [N, 2C, H, W] -> []."""


class NoisePrediction:
    """DDPM (Ho et al. 2020): predict the noise in sqrt(abar_t) x0 + sqrt(1 - abar_t) noise.

    With `prediction` "velocity" the network predicts v = a noise - s x0 instead, a and s being
    these two factors (Salimans & Ho 2022, arXiv 2202.00512, appendix D): its error in x0 has a
    bound where hardly any image is left.
    """

    name = "noise"

    def __init__(
        self,
        train_steps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: str = "noise",
    ):
        if prediction not in PREDICTIONS:
            raise UserError(
                f"objective.prediction is '{prediction}'; known: {', '.join(PREDICTIONS)}"
            )
        self.prediction = prediction
        self.schedule = {
            "num_train_timesteps": train_steps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        self.train_steps = train_steps
        self.scheduler = DDPMScheduler(**self.schedule)

    def sample_times(self, count: int, generator: Generator) -> Tensor:
        return torch.randint(self.train_steps, (count,), generator=generator)

    def grid(self, count: int) -> Tensor:
        return torch.linspace(0, self.train_steps - 1, count).round().long()

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noised = self.scheduler.add_noise(x0, noise, t)
        if self.prediction == "noise":
            return noised, noise
        return noised, self.scheduler.get_velocity(x0, noise, t)

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.scheduler.alphas_cumprod.to(t.device)[t]
        return abar.sqrt(), (1 - abar).sqrt()

    def parts(self, prediction: Tensor, noised: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = (level.view(-1, 1, 1, 1) for level in self.levels(t))
        if self.prediction == "noise":
            return (noised - s * prediction) / a, prediction
        return a * noised - s * prediction, s * noised + a * prediction

    def native(self, output: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The noise, and a variance after it where there is one."""
        if self.prediction == "noise":
            return output
        channels = noised.shape[1]
        _, noise = self.parts(output[:, :channels], noised, t)
        return torch.cat([noise, output[:, channels:]], 1)

    @functools.cached_property
    def bound(self) -> VarianceBound:
        return VarianceBound(self.scheduler.alphas_cumprod)

    def variance_loss(self, output: Tensor, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        prediction, fraction = self.native(output, noised, t).chunk(2, 1)
        return self.bound.loss(prediction, fraction, x0, noised, t)

    def variance_apart(self, output: Tensor, lesson: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        both = (self.native(found, noised, t) for found in (output, lesson))
        return self.bound.apart(*both, noised, t)


class FlowMatching:
    """Linear interpolant (SiT, Ma et al. 2024): x_t = (1 - t) x0 + t noise, velocity noise - x0.

    Training times are logit-normal (Esser et al. 2024, eq. 19) or uniform. `time_scale` multiplies
    the time the network sees; 1 is SiT's own.
    """

    name, train_steps = "flow", None

    def __init__(self, times: str = "logit_normal", time_scale: float = 1.0):
        if times not in ("logit_normal", "uniform"):
            raise UserError(f"objective.times is '{times}'; known: logit_normal, uniform")
        self.times, self.time_scale = times, time_scale

    def sample_times(self, count: int, generator: Generator) -> Tensor:
        if self.times == "uniform":
            return torch.rand(count, generator=generator)
        return torch.randn(count, generator=generator).sigmoid()

    def grid(self, count: int) -> Tensor:
        return (torch.arange(count) + 0.5) / count

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mix = t.view(-1, 1, 1, 1)
        return (1 - mix) * x0 + mix * noise, noise - x0

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.time_scale

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def parts(self, prediction: Tensor, noised: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mix = t.view(-1, 1, 1, 1)
        return noised - mix * prediction, noised + (1 - mix) * prediction

    def native(self, output: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        return output

    def variance_loss(self, output: Tensor, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """None: SiT inherits DiT's further channels and never uses them."""
        return output.new_zeros(())

    def variance_apart(self, output: Tensor, lesson: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        return output.new_zeros(())


OBJECTIVES = {kind.name: kind for kind in (NoisePrediction, FlowMatching)}


def objective(settings: dict) -> Objective:
    """Build from a track's `objective` entry: its `name` and that class's own parameters."""
    options = {key: value for key, value in settings.items() if key != "name"}
    return OBJECTIVES[settings["name"]](**options)
