"""The training loop every stage uses: dense training, training inside selection, and recovery."""

import hashlib
import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from prunebench.diffusion.objectives import Objective
from prunebench.diffusion.sampling import flip_some, to_float
from prunebench.errors import CellError, UserError, short_of_memory
from prunebench.models.activations import checkpoint_activations
from prunebench.models.conditions import CLASSES, Condition, Conditions, dropped, each
from prunebench.training import parallel
from prunebench.training.budget import BudgetMeter
from prunebench.training.checkpoints import Checkpoints
from prunebench.training.muon import Muon
from prunebench.training.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One batch of noised training images, every tensor [N, ...] and on the model's device.

    Attributes:
        y: what the network takes: classes, or a mapping of encoded text.
        drawn: what a recovery draws besides; see `Drawing`.
        done: the share of the training that lies behind it, from 0 to 1.
    """

    x0: Tensor
    y: Condition
    t: Tensor
    noise: Tensor
    noised: Tensor
    target: Tensor
    network_time: Tensor
    objective: Objective
    drawn: Mapping[str, Tensor] = field(default_factory=dict)
    done: float = 0.0

    def rows(self, chosen: range) -> "Batch":
        rows, whole = slice(chosen.start, chosen.stop), ("objective", "done")
        tensors = {name: value for name, value in vars(self).items() if name not in whole}
        return replace(self, **{n: each(lambda v: v[rows], value) for n, value in tensors.items()})


@dataclass(frozen=True)
class Data:
    """Training images (uint8 [N, C, H, W]) and labels with the objective that noises them.

    With `flip` half of the images that are drawn, for training and for calibration, are mirrored.
    `conditions` make of labels what the network takes.
    """

    images: Tensor
    labels: Tensor
    objective: Objective
    flip: bool = False
    conditions: Conditions = CLASSES

    def clean(self, rows: Tensor, generator: Generator) -> Tensor:
        """The images of some rows as the model is to generate them, float [N, C, H, W]."""
        return to_float(self.images[rows])

    def noised(self, x0: Tensor, y: Condition, t: Tensor, noise: Tensor) -> Batch:
        noised, target = self.objective.noised(x0, noise, t)
        network_time = self.objective.model_time(t)
        return Batch(x0, y, t, noise, noised, target, network_time, self.objective)

    def draw(self, count: int, generator: Generator, device: torch.device) -> Batch:
        """`count` random images with random times and noise."""
        rows = torch.randint(len(self.images), (count,), generator=generator)
        x0, y = self.clean(rows, generator), self.conditions.of(self.labels[rows])
        t = self.objective.sample_times(count, generator)
        noise = torch.randn(x0.shape, generator=generator)
        x0 = flip_some(x0, generator) if self.flip else x0
        y = each(lambda v: v.to(device), y)
        return self.noised(x0.to(device), y, t.to(device), noise.to(device))


@dataclass
class Progress:
    """Where a training in several parts stands: they share one schedule and one average.

    Attributes:
        total: steps of all parts together.
        done: steps taken.
        average: the averaged weights so far, by the names of the unparametrized model.
        held: steps of parts that a removal follows: the learning rate stays at its height, and its
            cosine spans the steps after them only.
        micro_batch: the most images that went through the model at once; less than the batch
            where GPU memory was short, or where several GPUs shared it. None before training.
    """

    total: int
    done: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)
    micro_batch: int | None = None
    held: int = 0


Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Drawing:
    """A loss that needs other times, or further random numbers, than a batch has.

    Attributes:
        loss: of a batch, or of a part of one.
        redraw: (batch, generator) -> batch, once for a whole batch, before it is parted. The
            generator is the training's own, whose state is saved, so that a training that was
            interrupted goes on with the same numbers. `Batch.drawn` is for what is drawn.
    """

    loss: Loss
    redraw: Callable[[Batch, Generator], Batch]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model, batch)


Adjust = Callable[[nn.Module], None]


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """All that the model puts out for a batch."""
    return model(batch.noised, batch.network_time, batch.y)


def prediction_of(output: Tensor, batch: Batch) -> Tensor:
    """The prediction of the batch's target, without further outputs such as DiT's variance."""
    return output[:, : batch.target.shape[1]]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """The model's prediction of the batch's target."""
    return prediction_of(outputs(model, batch), batch)


def simple_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error to the objective's target."""
    return nn.functional.mse_loss(predict(model, batch), batch.target)


def loss_of(output: Tensor, batch: Batch) -> Tensor:
    """The training loss of a model's whole output: DiT's has a term for its variance."""
    prediction = prediction_of(output, batch)
    loss = nn.functional.mse_loss(prediction, batch.target)
    if output.shape == prediction.shape:
        return loss
    return loss + batch.objective.variance_loss(output, batch.x0, batch.noised, batch.t)


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss the model was trained with."""
    return loss_of(outputs(model, batch), batch)


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
    meter: BudgetMeter | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[float]:
    """Train `model` in place on `images` images and leave it with its averaged weights.

    With `progress` this is one part of a longer training: schedule and average go on from the part
    before, and the model has its plain weights until the last part is done. Masked entries are
    zeroed again after every step. `loss` is a mean over its batch, which may be a part of the whole
    one: where GPU memory is short, gradients are summed over smaller and smaller micro-batches.
    `adjust` may change the gradients after the backward passes, before they are clipped. With
    `checkpoints` a training that was interrupted goes on; `meter` then knows what it had spent.
    Returns the loss of every step.

    Raises:
        CellError: the loss is no longer a finite number.
        UserError: not even one image fits into the GPU's memory.
    """
    steps = images // settings.batch
    progress, meter = progress or Progress(steps), meter or BudgetMeter()
    run = _Run(model, settings, muon_names, progress, seed, meter)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    masks = {name: mask.to(run.device) for name, mask in (masks or {}).items()}
    if checkpoints:
        run.origin = _hash(model.state_dict(), masks)
    model.train()
    with _own_randomness(seed, run.device), (checkpoints or Checkpoints()).part(run, meter) as part:
        for step in counted(len(run.losses), steps, "train"):
            batch = data.draw(settings.batch, run.generator, run.device)
            batch = _drop_some(batch, data.conditions, model, settings, run.generator)
            batch = _redrawn(replace(batch, done=step / steps), loss, run.generator)
            run.losses.append(run.gradients(batch, loss))
            if not math.isfinite(run.losses[-1]):
                raise CellError(f"the training loss is {run.losses[-1]} at step {step} of {steps}")
            if adjust:
                adjust(model)
            run.step()
            _mask(model, masks)
            run.average.update_parameters(model)
            part.step_done()
    run.close(progress, steps)
    return run.losses


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout inside the model draws from the global generator: seeded here, put back after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + parallel.rank())
        yield


class _Run:
    """A training under way: everything that changes from step to step."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        muon_names: list[str],
        progress: Progress,
        seed: int,
        meter: BudgetMeter,
    ):
        self.model, self.settings, self.meter = model, settings, meter
        self.device = next(model.parameters()).device
        self.generator = Generator().manual_seed(seed)
        self.optimizers = _optimizers(model, settings, muon_names)
        rate = _cosine(progress, settings)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in self.optimizers]
        self.average = _average(model, settings, progress)
        self.share = parallel.share(settings.batch)
        self.micro_batch, self.losses, self.origin = len(self.share), [], ""

    def gradients(self, batch: Batch, loss: Loss) -> float:
        """Fill the gradients of the batch's mean loss, which is returned."""
        while True:
            spent, random = Counter(self.meter.counts), self._global_randomness()
            try:
                parts = self._micro_batches()
                value = sum(self._backward(batch.rows(rows), loss) for rows in parts)
                break
            except RuntimeError as error:
                if not short_of_memory(error):
                    raise
                if self.micro_batch == 1:
                    raise UserError(f"one image does not fit into memory: {error}") from None
            # The step is done again, from the start.
            self.meter.counts = spent
            self._set_global_randomness(random)
            self.model.zero_grad()
            torch.cuda.empty_cache()
            self.micro_batch = -(-self.micro_batch // 2)
            log.warning("memory is short: micro-batches of %d from now on", self.micro_batch)
        parallel.sum_gradients(self.model.parameters())
        return parallel.total(value)

    def _micro_batches(self) -> Iterator[range]:
        for start in range(self.share.start, self.share.stop, self.micro_batch):
            yield range(start, min(start + self.micro_batch, self.share.stop))

    def _backward(self, part: Batch, loss: Loss) -> float:
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            value = loss(self.model, part) * (len(part.x0) / self.settings.batch)
        value.backward()
        return value.item()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def close(self, progress: Progress, steps: int) -> None:
        """Hand the average on to the next part, or leave the model with it after the last."""
        progress.done += steps
        progress.average = {
            _plain(n): p.detach() for n, p in self.average.module.named_parameters()
        }
        progress.micro_batch = min(self.micro_batch, progress.micro_batch or self.micro_batch)
        if self.settings.ema and 0 < progress.total <= progress.done and steps:
            self.model.load_state_dict(self.average.module.state_dict())
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise CellError(
                f"training left weights that are not finite numbers after {steps} steps"
            )
        self.model.eval()

    def _stateful(self) -> dict:
        return {
            "model": self.model,
            "average": self.average,
            **{f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)},
            **{f"schedule{i}": schedule for i, schedule in enumerate(self.schedules)},
        }

    def state_dict(self) -> dict:
        """Everything that the rest of the training depends on."""
        return {
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "generator": self.generator.get_state(),
            "global_randomness": self._global_randomness(),
            "micro_batch": self.micro_batch,
            "losses": self.losses,
            "origin": self.origin,
        }

    def fits(self, state: dict) -> bool:
        """Whether a state began with these weights and masks: scoring on a GPU may not repeat."""
        return state["origin"] == self.origin

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        if not parallel.rank():  # it is the first's; with it the others would drop the same units
            self._set_global_randomness(state["global_randomness"])
        self.micro_batch = min(state["micro_batch"], len(self.share))
        self.losses = list(state["losses"])

    def _global_randomness(self) -> dict[str, Tensor]:
        """What dropout inside the model draws from, by kind of device."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_global_randomness(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)


def _hash(*groups: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, with their shapes."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain.from_iterable(group.items() for group in groups):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _average(model: nn.Module, settings: Settings, progress: Progress) -> AveragedModel:
    """The moving average, which goes on from the part before where there was one.

    A parameter that was cut since then, or belongs to a copied layer, begins anew.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    if progress.average:
        average.n_averaged.fill_(1)  # else the first update would overwrite it
        with torch.no_grad():
            for name, parameter in average.module.named_parameters():
                before = progress.average.get(_plain(name))
                if before is not None and before.shape == parameter.shape:
                    parameter.copy_(before)
    return average


def _plain(name: str) -> str:
    """A parameter's name without what torch adds to it when it is parametrized."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", name)


def counted(start: int, total: int, label: str) -> Iterator[int]:
    """A progress bar on a terminal, plain log lines at every tenth elsewhere."""
    bar = tqdm(range(start, total), desc=label, disable=None, leave=False)
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
    optimizers = [torch.optim.AdamW(others, lr=settings.learning_rate, fused=True, **decay)]
    if matrices:
        optimizers.append(Muon(matrices, lr=settings.muon_learning_rate, **decay))
    return optimizers


def _cosine(progress: Progress, settings: Settings) -> Callable[[int], float]:
    steps, done = progress.total, progress.done
    warmup = max(1, round(settings.warmup * steps))
    top = max(warmup, progress.held)

    def factor(step: int) -> float:
        step += done
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * max(0, step - top) / max(1, steps - top)))

    return factor


def _drop_some(
    batch: Batch, conditions: Conditions, model: nn.Module, settings: Settings, generator: Generator
) -> Batch:
    """Ask for nothing in a share of the images, as guidance needs it."""
    if not settings.class_dropout:
        return batch
    chosen = torch.rand(len(batch.x0), generator=generator) < settings.class_dropout
    y = dropped(conditions, batch.y, model, chosen.to(batch.x0.device))
    return replace(batch, y=y)


def _redrawn(batch: Batch, loss: Loss, generator: Generator) -> Batch:
    return loss.redraw(batch, generator) if isinstance(loss, Drawing) else batch


@torch.no_grad()
def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
