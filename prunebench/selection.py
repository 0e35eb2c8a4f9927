"""What a method is given, and the checks on what it returns."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, ModuleType

import torch
from torch import Generator, Tensor, nn

from prunebench.copies import rebuilt, shell
from prunebench.errors import CellError, UserError, machine_fault
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.pruning.units import Layer, Width
from prunebench.recovery import Teaching
from prunebench.training import loop
from prunebench.training.activations import checkpoint_activations
from prunebench.training.budget import BudgetMeter
from prunebench.training.checkpoints import Checkpoints
from prunebench.training.distillation import distilled
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
        checkpoints: Checkpoints | None = None,
        device: torch.device | None = None,  # of `model`; the dense one stays where it is
    ):
        self.model = meter.watch(rebuilt(dense, lambda t: t.to(device, copy=True)).eval())
        if settings.activation_checkpointing:
            checkpoint_activations(self.model)
        self._dense = dense
        self.family, self.config, self.data = family, dict(config), data
        self.sparsity, self.seed = sparsity, seed
        self.settings, self.train_images, self.trained_images = settings, train_images, 0
        self.log = logging.getLogger(f"prunebench.methods.{method}")
        self._meter, self._method, self._calls = meter, method, 0
        self._checkpoints = checkpoints
        self.made_fresh, self._draws = False, 0
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

    @contextmanager
    def without(self, *layers: str) -> Iterator[nn.Module]:
        """The model with layers bypassed; shares all weights with `model`."""
        smaller = shell(self.model)
        for name in layers:
            self.family.remove_layer(smaller, name)
        yield smaller

    # What to return.
    def plan_layers(self, order: Sequence[Layer], **notes: object) -> Plan:
        """Remove layers in the given order until the target is met."""
        return targets.plan_layers(self.model, order, self.sparsity, **notes)

    def plan_widths(self, scores: Mapping[str, Tensor], **notes: object) -> Plan:
        """Remove the lowest-scored channels of every width at one ratio that meets the target."""
        return targets.plan_widths(self.model, self.widths(), scores, self.sparsity, **notes)

    def plan_uniform(self, scores: Mapping[str, Tensor], **notes: object) -> Plan:
        """Remove the lowest-scored channels of every width, the target being each width's share."""
        return targets.plan_uniform(self.widths(), scores, self.sparsity, **notes)

    def plan_weights(self, scores: Mapping[str, Tensor], **notes: object) -> Plan:
        """Mask the globally lowest-scored weights until the target is met."""
        return targets.plan_weights(self.model, scores, self.sparsity, **notes)

    # For methods that train.
    def train(
        self,
        model: nn.Module,
        images: int,
        masks: Mapping[str, Tensor] | None = None,
        loss: Loss = loop.own_loss,
        adjust: Adjust | None = None,
    ) -> list[float]:
        """Train `model`, a copy of `self.model`, in place; charged to the cell's budget.

        `loss` is a mean over its batch, of which it may be given parts; `adjust` may change the
        gradients once per step. What they remember from step to step must lie in the model's
        buffers, or is lost where an interrupted training goes on. Weights may be parametrized.
        All calls, and the recovery after them, are one training with one schedule and one average:
        the model has its plain weights in between.

        Raises:
            CellError: the budget does not allow it.
        """
        if images < 0 or self.trained_images + images > self.train_images:
            raise CellError(
                f"method {self._method} wants to train on {images} more images; "
                f"{self.trained_images} of its budget of {self.train_images} are spent"
            )
        self.trained_images += images
        names = trainable(model, self.family.weights(self.model))
        seed = self.generator().initial_seed()
        return loop.train(
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

    def distilled(self, weight: float) -> Loss:
        """The training loss, plus `weight` times the mean squared error to the dense prediction."""
        return distilled(Teaching(self.teacher(), {}), weight=weight) if weight else loop.own_loss

    def teacher(self) -> nn.Module:
        """The dense model, frozen; what passes through it is metered as a teacher's."""
        device = next(self.model.parameters()).device
        model = rebuilt(self._dense, lambda t: t.to(device)).requires_grad_(False)
        return self._meter.watch(model, "teacher")

    def fresh(self, plan: Plan) -> nn.Module:
        """A newly initialised model of the shape that `plan` leaves, metered."""
        self.made_fresh = True
        with torch.random.fork_rng():
            torch.manual_seed(self.generator().initial_seed())
            model = self.family.build(self.config)
        model = nn.Module.to(model, next(self.model.parameters()))
        return self._meter.watch(surgery.apply(model, plan, self.family))


def seeded(text: str) -> Generator:
    """A generator whose seed is the hash of a text."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return Generator().manual_seed(number)


Select = Callable[..., Plan | tuple[Plan, nn.Module]]


def select(
    context: Context, function: Select, kind: str, parameters: Mapping
) -> tuple[Plan, nn.Module]:
    """Run a method and check what it returns. The context's model is gone afterwards.

    Returns:
        The plan and the pruned model: the method's own where it trained one, else the dense model
        with the plan applied, whose untouched tensors it shares.

    Raises:
        CellError: the plan is of another kind than the method states, names units that do not
            exist, or misses the target by more than one unit.
    """
    layers = [unit for g in ("block", "branch") for unit in context.layers(g)]
    widths = context.widths() if kind == "widths" else []
    plan, own = _parts(_call(function, context, parameters))
    check_kind(plan, kind)
    check_record(plan)
    del context.model  # its weights and gradients make room
    dense = context._dense
    pruned = surgery.apply(rebuilt(dense), plan, context.family, widths)
    unit = targets.tolerance(dense, layers, widths, plan)
    maskable = {n: dense.get_parameter(n).shape for n in context.family.weights(dense)}
    check_target(dense, pruned, plan, context.sparsity, unit, widths, maskable)
    if own is None:
        return plan, pruned.eval()
    own = unmetered(own)
    check_shapes(own, pruned)
    check_masks(own, plan)
    check_trained(context, own, pruned)
    return plan, own.eval()


def averaged(context: Context, plan: Plan) -> dict[str, Tensor]:
    """The average of a training that the recovery goes on with, in the shapes the plan leaves.

    Empty where the method did not train, or trained to the end and has its average already.
    """
    progress = context.progress
    if not progress.average or progress.done >= progress.total:
        return {}
    model = rebuilt(context._dense)
    cut = dict(progress.average)  # by layers that went before the training
    for name, parameter in model.named_parameters():
        if name in cut and cut[name].shape == parameter.shape:
            parameter.data = cut.pop(name).to(parameter.device)
    pruned = surgery.apply(model, plan, context.family)
    return {name: cut.get(name, value.detach()) for name, value in pruned.named_parameters()}


def _call(function: Select, context: Context, parameters: Mapping) -> object:
    try:
        return function(context, **parameters)
    except Exception as error:  # whatever a method raises is its own cells' failure, no one else's
        if isinstance(error, CellError | UserError) or machine_fault(error):
            raise
        raise CellError(f"{type(error).__name__}: {error}") from error


def _parts(result: object) -> tuple[Plan, nn.Module | None]:
    """What a method returned, which is a plan or a plan and a model."""
    parts = result if isinstance(result, tuple) else (result, None)
    if not parts or not isinstance(parts[0], Plan):
        raise CellError(f"select returned {type(result).__name__}, not a Plan")
    if len(parts) != 2 or not isinstance(parts[1], nn.Module | None):
        raise CellError("select returned a tuple that is not (Plan, model)")
    return parts


def unmetered(model: nn.Module) -> nn.Module:
    """A copy over the same memory that no meter watches.

    It keeps its activations, so that it can be traced.
    """
    model = rebuilt(model)
    model._forward_hooks.clear()
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


def check_kind(plan: Plan, kind: str) -> None:
    """A plan removes what its method says it removes, and nothing else."""
    present = {
        "layers": bool(plan.layers),
        "widths": bool(plan.kept),
        "weights": bool(plan.masks),
        "steps": plan.steps != 1.0,
    }
    removed = [name for name, is_present in present.items() if is_present]
    expected = [] if kind == "none" else [kind]
    if removed != expected:
        found = " and ".join(removed) or "nothing"
        raise CellError(f"the method's KIND is '{kind}' but its plan removes {found}")


def check_record(plan: Plan) -> None:
    """A plan is stored as JSON: its indices and notes must be plain, finite values."""
    try:
        json.dumps(plan.to_json(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CellError(f"the plan cannot be stored as JSON: {error}") from error


def check_target(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    sparsity: float,
    tolerance: float,
    widths: Sequence[Width] = (),
    maskable: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> None:
    """The target is met within one unit. N:M and uniform plans fix their own; these are checked."""
    if plan.steps != 1.0:
        reached, tolerance = 1 - plan.steps, 1e-9
    elif plan.pattern == targets.UNIFORM:
        targets.check_uniform(plan, widths, sparsity)
        return
    elif plan.pattern not in (None, "unstructured"):
        targets.check_n_of_m(plan, maskable)
        return
    else:
        reached = targets.reached(dense, pruned, plan)
    if abs(reached - sparsity) > tolerance + 1e-9:
        raise CellError(
            f"the plan removes {reached:.4f} of the parameters; the target is {sparsity} "
            f"and one unit is {tolerance:.4f}"
        )


def check_shapes(own: nn.Module, pruned: nn.Module) -> None:
    """A model that a method trained has exactly the tensors that its plan leaves."""
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (own, pruned)]
    if shapes[0] != shapes[1]:
        different = sorted(
            n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)
        )
        raise CellError(f"the returned model does not fit its plan: {different[0]} differs")


def check_trained(context: Context, own: nn.Module, pruned: nn.Module) -> None:
    """Weights other than the dense model's come from training that the budget knows."""
    if context.trained_images or context.made_fresh:
        return
    ours, theirs = own.state_dict(), pruned.state_dict()
    pairs = ((tensor, theirs[name]) for name, tensor in ours.items())
    if not all(torch.equal(one.to(other.device), other) for one, other in pairs):
        raise CellError(
            "the returned model was trained, but not by context.train: its budget is unknown"
        )


def check_masks(own: nn.Module, plan: Plan) -> None:
    """A model that a method trained is zero where its plan masks it."""
    for name, mask in plan.masks.items():
        weight = own.get_parameter(name)
        if bool(weight[~mask.to(weight.device)].any()):
            raise CellError(f"the returned model does not fit its plan: '{name}' is not masked")
