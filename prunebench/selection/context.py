"""What a method is given."""

import copy
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Generator, Tensor, nn

from prunebench.diffusion.trajectory import Around, Trajectory
from prunebench.errors import CellError
from prunebench.models.activations import checkpoint_activations
from prunebench.models.conditions import Condition, each
from prunebench.models.copies import rebuilt, without
from prunebench.models.units import Layer, Width
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.recovery import Teaching
from prunebench.recovery.distillation import distilled
from prunebench.selection import unit_costs
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter, unwatched
from prunebench.training.checkpoints import Checkpoints
from prunebench.training.loop import Adjust, Batch, Data, Loss


class Context:
    """Everything a method may use. It never sees sampling quality, test data or its own score.

    Attributes:
        model: a private copy of the dense model in evaluation mode; call it as (x, t, y). What
            passes through it, forward or backward, is metered, also through copies of it. Large
            ones leave memory for few copies: `without` and `prunebench.copies` share tensors.
        data: the training images and the objective.
        sparsity: fraction of the model's parameters to remove (or, for steps, of the steps).
        seed: the cell's seed. All randomness comes from `generator()`.
        train_images: images the method may train on; 0 under budget none.
        settings: training settings of the recovery, for methods that train.
        log: logger of the stage.
    """

    def __init__(
        self,
        dense: nn.Module,
        family: ModuleType,
        config: Mapping,
        data: Data,
        *,
        sparsity: float,
        seed: int,
        method: str,
        meter: BudgetMeter,
        settings: loop.Settings,
        train_images: int = 0,
        sampling: Mapping | None = None,  # how the track samples the model
        checkpoints: Checkpoints | None = None,
        device: torch.device | None = None,  # of `model`; the dense one stays where it is
    ):
        model = rebuilt(dense, lambda t: t.to(device, copy=True)).eval()
        self.model = meter.watch(model, parts=_blocks(family, model))
        if settings.activation_checkpointing:
            checkpoint_activations(self.model)
        self._dense = dense
        self.family, self.config, self.data = family, dict(config), data
        self.sparsity, self.seed = sparsity, seed
        self.settings, self.train_images, self.trained_images = settings, train_images, 0
        self._sampling = sampling
        self.log = logging.getLogger(f"prunebench.methods.{method}")
        self._meter, self._method, self._calls = meter, method, 0
        self._checkpoints = checkpoints
        self.fresh_tensors: set[str] = set()  # digests of what `fresh` made
        self.trained: dict[str, list[Tensor]] = {}  # what the last training left, see `weights_of`
        self._draws = 0
        self.clocked: dict[str, float] = {}  # measured latencies, which no seed repeats
        self.progress = loop.Progress(train_images // settings.batch)

    # What can be pruned.
    def layers(self, granularity: str = "block") -> list[Layer]:
        return self.family.layers(self.model, granularity)

    def widths(self) -> list[Width]:
        # Some families trace a forward pass to find them, which is no pass of the method's.
        return self.family.widths(unmetered(self.model))

    def weights(self) -> dict[str, Tensor]:
        """The weights that may be masked, by name."""
        return {name: self.model.get_parameter(name) for name in self.family.weights(self.model)}

    @property
    def backward_images(self) -> int:
        """Images that went backward through the model so far."""
        return self._meter.counts["student_backward"]

    def macs(self, granularity: str = "block") -> dict[str, int]:
        """Multiply-accumulates that each layer adds to the forward pass of one image, exactly."""
        bare = unmetered(self.model)
        batch = self.data.draw(1, seeded("macs"), next(bare.parameters()).device)
        inputs = (batch.noised, batch.network_time, batch.y)
        return unit_costs.macs(bare, self.family, self.layers(granularity), inputs)

    def latencies(
        self, granularity: str = "block", batch: int = 8, rounds: int = 10, warmup: int = 2
    ) -> dict[str, float]:
        """Milliseconds that each layer takes alone for `batch` images, on this machine.

        Measured once for layers of one type and shape. A clock repeats no number: a plan that rests
        on it is not repeated by its seed. The table is therefore put into the plan's notes, and the
        contract does not ask such a method for one plan a seed; `macs` has no such cost.
        """
        names = [layer.name for layer in self.layers(granularity)]
        (calibration,) = self.draws(batch, batch)
        self.clocked = unit_costs.latencies(
            self.model,
            names,
            lambda: self.predict(self.model, calibration),
            unmetered(self.model),
            rounds,
            warmup,
        )
        return self.clocked

    # What to score with.
    def generator(self) -> Generator:
        """A new generator: same seed, method and order of calls, same numbers."""
        self._calls += 1
        return seeded(f"{self._method}/{self.seed}/{self._calls}")

    def draws(self, count: int, batch: int) -> list[Batch]:
        """`count` seeded draws of (image, class or text, time, noise) in batches of up to `batch`.

        They are the calibration data, the same for all methods that draw as many in such batches.
        """
        self._draws += 1
        generator = seeded(f"calibration/{self.seed}/{self._draws}")
        device = next(self.model.parameters()).device
        sizes = [batch] * (count // batch) + [count % batch] * bool(count % batch)
        return [self.data.draw(size, generator, device) for size in sizes]

    def at_time(self, batch: Batch, t: Tensor) -> Batch:
        """The same images, classes or texts, and noise at another time (one number)."""
        return self.data.noised(
            batch.x0, batch.y, t.expand(len(batch.x0)).to(batch.x0.device), batch.noise
        )

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """What `model` predicts for a batch, without further outputs such as DiT's variance."""
        return loop.predict(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error to the target: what scores are made of, and all but DiT's training."""
        return loop.simple_loss(model, batch)

    def asked(self, count: int) -> Condition:
        """What `count` random training images show, on the model's device: classes, or captions.

        What is sampled for the evaluation is asked otherwise; in a class nothing differs.
        """
        rows = torch.randint(len(self.data.labels), (count,), generator=self.generator())
        device = next(self.model.parameters()).device
        return each(lambda v: v.to(device), self.data.conditions.of(self.data.labels[rows]))

    def nothing(self, asked: Condition) -> Condition:
        """What the network takes for as many images of which nothing is asked; like `asked`."""
        return self.data.conditions.nothing(asked, self.model)

    def seeds(self, count: int) -> list[int]:
        """Seeds of sampling noise; no image of the evaluation has one of them."""
        return torch.randint(2**62, (count,), generator=self.generator()).tolist()

    def sampler(
        self,
        model: nn.Module | None = None,
        around: Around = nullcontext,
        generators: Sequence[Generator] = (),
    ) -> Trajectory:
        """The track's sampler over `model` (default: `self.model`), with gradients if wanted.

        Its steps, guidance and noise are those the model is sampled with, but latents are not
        decoded. Every pass of it is metered, those that the backward pass repeats too. For `around`
        and `generators` see Trajectory.

        Raises:
            CellError: the context was made without a sampler.
        """
        if self._sampling is None:
            raise CellError(f"method {self._method} asks for a sampler; the context has none")
        return Trajectory(
            self.model if model is None else model,
            self.data.objective,
            tuple(self.data.images[0].shape),
            1,
            dict(self._sampling),
            conditions=self.data.conditions,
            around=around,
            generators=generators,
        )

    @contextmanager
    def without(self, *layers: str) -> Iterator[nn.Module]:
        """The model with layers bypassed; shares all weights with `model`."""
        yield without(self.model, self.family, layers)

    # What to return.
    # `sparsity` is the cell's where it is None; methods that remove several kinds share it out.
    def plan_layers(
        self, order: Sequence[Layer], sparsity: float | None = None, **notes: object
    ) -> Plan:
        """Remove layers in the given order until the target is met."""
        return targets.plan_layers(self.model, order, self._share(sparsity), **notes)

    def plan_widths(
        self, scores: Mapping[str, Tensor], sparsity: float | None = None, **notes: object
    ) -> Plan:
        """Remove the lowest-scored channels of every width at one ratio that meets the target."""
        share = self._share(sparsity)
        return targets.plan_widths(self.model, self.widths(), scores, share, **notes)

    def plan_ranked(
        self, scores: Mapping[str, Tensor], scope: str = "global", **notes: object
    ) -> Plan:
        """Remove the lowest-ranked channels of the widths that have scores until the target is met.

        `scope` says what is compared: "global" all, "kinds" heads with heads and so on, "local" the
        channels of a width.
        """
        units = [unit for unit in self.widths() if unit.name in scores]
        return targets.plan_ranked(self.model, units, scores, self.sparsity, scope, **notes)

    def plan_uniform(self, scores: Mapping[str, Tensor], **notes: object) -> Plan:
        """Remove the lowest-scored channels of every width, the target being each width's share."""
        return targets.plan_uniform(self.widths(), scores, self.sparsity, **notes)

    def plan_weights(
        self, scores: Mapping[str, Tensor], sparsity: float | None = None, **notes: object
    ) -> Plan:
        """Mask the globally lowest-scored weights until the target is met."""
        return targets.plan_weights(self.model, scores, self._share(sparsity), **notes)

    def check_reachable(self, units: Sequence[Width], one_stays: bool = False) -> None:
        """Refuse a target that these widths can't reach, before anything is spent on it.

        Args:
            one_stays: no width is emptied.

        Raises:
            CellError: says what they hold.
        """
        gone = {u.name: u.size - u.groups * (one_stays or not u.may_be_empty) for u in units}
        sizes = targets.Sizes(self.model, units)
        if self.sparsity > (most := sizes.removed(gone) / sizes.total):
            raise CellError(
                f"sparsity {self.sparsity} can't be reached: the widths that {self._method} prunes "
                f"hold {most:.3f} of the parameters; lower it, or exclude the method"
            )

    def _share(self, sparsity: float | None) -> float:
        return self.sparsity if sparsity is None else sparsity

    def pruned(self, plan: Plan) -> nn.Module:
        """A copy of the model with a plan carried out, metered, with memory of its own."""
        widths = self.widths() if plan.kept else None
        return surgery.apply(copy.deepcopy(self.model), plan, self.family, widths)

    # For methods that train.
    def train(
        self,
        model: nn.Module,
        images: int,
        masks: Mapping[str, Tensor] | None = None,
        loss: Loss = loop.own_loss,
        adjust: Adjust | None = None,
        before_removal: bool = False,
    ) -> list[float]:
        """Train `model`, a copy of `self.model`, in place; charged to the cell's budget.

        `loss` is a mean over its batch, of which it may be given parts; `adjust` may change the
        gradients once per step. What they remember from step to step must lie in the model's
        buffers, or is lost where an interrupted training goes on. Weights may be parametrized.
        All calls, and the recovery after them, are one training with one schedule and one average:
        the model has its plain weights in between. That does not fit a part which a removal
        follows: the cut network would heal at a rate near 0, and be averaged with weights of before
        the cut. With `before_removal` the rate stays at its height during the part, the cosine
        spans what follows, and the average begins anew.

        Raises:
            CellError: the budget does not allow it.
        """
        if images < 0 or self.trained_images + images > self.train_images:
            raise CellError(
                f"method {self._method} wants to train on {images} more images; "
                f"{self.trained_images} of its budget of {self.train_images} are spent"
            )
        self.trained_images += images
        before = self.progress.done
        names = trainable(model, self.family.weights(model))
        seed = self.generator().initial_seed()
        if before_removal:
            self.progress.held = self.progress.done + images // self.settings.batch
        losses = loop.train(
            model,
            self.data,
            self.settings,
            images=images,
            seed=seed,
            muon_names=names,
            masks=masks,
            loss=loss,
            adjust=adjust,
            progress=self.progress,
            meter=self._meter,
            checkpoints=self._checkpoints,
        )
        if self.progress.done > before:
            self.trained = weights_of(model)
        if before_removal:
            self.progress.average = {}
        return losses

    def distilled(self, weight: float) -> Loss:
        """The training loss, plus `weight` times the mean squared error to the dense prediction."""
        return distilled(Teaching(self.teacher(), {}), weight=weight) if weight else loop.own_loss

    def teacher(self) -> nn.Module:
        """A copy of the dense model, frozen; its passes are metered as a teacher's."""
        device = next(self.model.parameters()).device
        model = rebuilt(self._dense, lambda t: t.to(device, copy=True)).requires_grad_(False)
        return self._meter.watch(model, "teacher", _blocks(self.family, model))

    def fresh(self, plan: Plan) -> nn.Module:
        """A newly initialised model of the shape that `plan` leaves, metered."""
        with torch.random.fork_rng():
            torch.manual_seed(self.generator().initial_seed())
            model = self.family.build(self.config)
        model = nn.Module.to(model, next(self.model.parameters()))
        model = surgery.apply(model, plan, self.family)
        self.fresh_tensors |= {digest(tensor) for tensor in model.state_dict().values()}
        return self._meter.watch(model, parts=_blocks(self.family, model))


def _blocks(family: ModuleType, model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(layer.name) for layer in family.layers(model, "block")]


def weights_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of a model's tensors on the CPU, by name; of parametrized ones also what they give."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.partition(".parametrizations.")
        plain = f"{path}.{leaf.removesuffix('.original')}" if leaf else name
        found.setdefault(plain, []).append(tensor.detach().to("cpu", copy=True))
    with torch.no_grad():
        for path, module in model.named_modules():
            for leaf in getattr(module, "parametrizations", ()):
                given = getattr(module, leaf).detach().to("cpu", copy=True)
                found.setdefault(f"{path}.{leaf}", []).append(given)
    return found


def digest(tensor: Tensor) -> str:
    """The hash of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy()).hexdigest()


def seeded(text: str) -> Generator:
    """A generator whose seed is the hash of a text."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return Generator().manual_seed(number)


def unmetered(model: nn.Module) -> nn.Module:
    """A copy over the same memory that no meter watches.

    It keeps its activations, so that it can be traced.
    """
    model = unwatched(rebuilt(model))
    checkpoint_activations(model, False)
    return model


def trainable(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The tensors behind the named weights, which torch moves aside when they are parametrized."""
    found, present = [], {name for name, _ in model.named_parameters()}
    for name in names:
        path, _, leaf = name.rpartition(".")
        moved = f"{path}.parametrizations.{leaf}.original"
        found.append(moved if moved in present else name)
    return found
