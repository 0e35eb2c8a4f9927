"""The training loop every stage uses: dense training, training inside selection, and recovery."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from prunebench.diffusion.objectives import Objective
from prunebench.diffusion.sampling import to_float
from prunebench.errors import CellError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to train. Muon (Jordan et al. 2024) takes the prunable matrices when it has a rate."""

    batch: int
    learning_rate: float
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.0
    ema: float = 0.0
    warmup: float = 0.0  # share of the steps with rising learning rate; cosine to 0 after it
    clip_norm: float = 1.0
    class_dropout: float = 0.0  # share of labels replaced by "no class"
    precision: str = "fp32"  # or "bf16": autocast forward and loss; weights stay fp32


@dataclass(frozen=True)
class Batch:
    """One batch of noised training images, everything [N, ...] and on the model's device."""

    x0: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    noised: Tensor
    target: Tensor
    network_time: Tensor = field(repr=False)


@dataclass(frozen=True)
class Data:
    """Training images (uint8 [N, C, H, W]) and labels with the objective that noises them."""

    images: Tensor
    labels: Tensor
    objective: Objective

    def noised(self, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Batch:
        noised, target = self.objective.noised(x0, noise, t)
        return Batch(x0, y, t, noise, noised, target, self.objective.model_time(t))

    def draw(self, count: int, generator: Generator, device: torch.device) -> Batch:
        """`count` random images with random times and noise."""
        rows = torch.randint(len(self.images), (count,), generator=generator)
        x0, y = to_float(self.images[rows]), self.labels[rows]
        t = self.objective.sample_times(count, generator)
        noise = torch.randn(x0.shape, generator=generator)
        return self.noised(x0.to(device), y.to(device), t.to(device), noise.to(device))


@dataclass
class Progress:
    """Where a training in several parts stands: they share one schedule and one average.

    Attributes:
        total: steps of all parts together.
        done: steps taken.
        average: the averaged weights so far, by the names of the unparametrized model.
    """

    total: int
    done: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[nn.Module, Batch], Tensor]
Adjust = Callable[[nn.Module], None]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """The prediction of the batch's target, without further outputs such as DiT's variance."""
    return model(batch.noised, batch.network_time, batch.y)[:, : batch.target.shape[1]]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss the model was trained with: mean squared error to the objective's target."""
    return nn.functional.mse_loss(predict(model, batch), batch.target)


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    *,
    images: int,
    seed: int,
    muon_names: list[str],
    masks: Mapping[str, Tensor] | None = None,
    loss: Loss = own_loss,
    adjust: Adjust | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train `model` in place on `images` images and leave it with its averaged weights.

    With `progress` this is one part of a longer training: schedule and average go on from the part
    before, and the model has its plain weights until the last part is done. Masked entries are
    zeroed again after every step. `adjust` may change the gradients after each backward pass,
    before they are clipped. Returns the loss of every step.

    Raises:
        CellError: the loss is no longer a finite number.
    """
    steps = images // settings.batch
    progress = progress or Progress(steps)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model, settings, muon_names)
    rate = _cosine(progress, settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    masks = {name: mask.to(device) for name, mask in (masks or {}).items()}
    average = _average(model, settings, progress)
    losses = []
    model.train()
    for step in counted(steps, "train"):
        batch = data.draw(settings.batch, generator, device)
        batch = _drop_classes(batch, model, settings.class_dropout, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            value = loss(model, batch)
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise CellError(f"the training loss is {losses[-1]} at step {step} of {steps}")
        value.backward()
        if adjust:
            adjust(model)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        _mask(model, masks)
        average.update_parameters(model)
    progress.done += steps
    progress.average = {_plain(n): p.detach() for n, p in average.module.named_parameters()}
    if settings.ema and 0 < progress.total <= progress.done and steps:
        model.load_state_dict(average.module.state_dict())
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise CellError(f"training left weights that are not finite numbers after {steps} steps")
    model.eval()
    return losses


def _average(model: nn.Module, settings: Settings, progress: Progress) -> AveragedModel:
    """The moving average, which goes on from the part before where there was one."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    if progress.average:
        average.n_averaged.fill_(1)  # else the first update would overwrite it
        with torch.no_grad():
            for name, parameter in average.module.named_parameters():
                parameter.copy_(progress.average[_plain(name)])
    return average


def _plain(name: str) -> str:
    """A parameter's name without what torch adds to it when it is parametrized."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", name)


def counted(total: int, label: str) -> Iterator[int]:
    """A progress bar on a terminal, plain log lines at every tenth elsewhere."""
    bar = tqdm(range(total), desc=label, disable=None, leave=False)
    for index in bar:
        if bar.disable and index % max(1, total // 10) == 0:
            log.info("%s %d/%d", label, index, total)
        yield index


def _optimizers(
    model: nn.Module, settings: Settings, muon_names: list[str]
) -> list[torch.optim.Optimizer]:
    chosen = set(muon_names) if settings.muon_learning_rate else set()
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if name in chosen and p.dim() == 2]
    others = [p for name, p in named.items() if name not in chosen or p.dim() != 2]
    decay = {"weight_decay": settings.weight_decay}
    optimizers = [torch.optim.AdamW(others, lr=settings.learning_rate, **decay)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=settings.muon_learning_rate, **decay))
    return optimizers


def _cosine(progress: Progress, settings: Settings) -> Callable[[int], float]:
    steps, done = progress.total, progress.done
    warmup = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        step += done
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _drop_classes(batch: Batch, model: nn.Module, share: float, generator: Generator) -> Batch:
    if not share:
        return batch
    dropped = (torch.rand(len(batch.y), generator=generator) < share).to(batch.y.device)
    y = batch.y.masked_fill(dropped, model.null_class)
    return Batch(**{**batch.__dict__, "y": y})


@torch.no_grad()
def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
