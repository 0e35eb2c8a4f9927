"""Running a method, and the checks on what it returns."""

import dataclasses
import inspect
import json
import signal
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor, nn

from prunebench.errors import CellError, UserError, machine_fault
from prunebench.models.copies import rebuilt
from prunebench.models.repeats import original
from prunebench.models.units import Width
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.selection.context import Context, digest, unmetered

Select = Callable[..., Plan | tuple[Plan, nn.Module]]


def select(
    context: Context,
    function: Select,
    kind: str,
    parameters: Mapping,
    steps: float | None = None,
    updates: str = "",
) -> tuple[Plan, nn.Module]:
    """Run a method and check what it returns. The context's model is gone afterwards.

    Args:
        steps: the share of the steps that the plan keeps, where it removes more than steps.
        updates: how the method changes weights without training, as its UPDATES says.

    Returns:
        The plan and the pruned model: the method's own where it trained one, else the dense model
        with the plan applied, whose untouched tensors it shares.

    Raises:
        CellError: the plan is of another kind than the method states, names units that do not
            exist, or misses the target by more than one unit.
    """
    widths = context.widths() if "widths" in kind.split("+") else []
    plan, own = returned(function, context, parameters)
    if context.clocked:
        notes = {**plan.notes, "latencies_ms": context.clocked}
        plan = dataclasses.replace(plan, notes=notes)
    check_kind(plan, kind)
    check_record(plan)
    del context.model  # its weights and gradients make room
    dense = context._dense
    pruned = _carried_out(dense, plan, context.family, widths, context.sparsity, steps)
    if own is None:
        return plan, pruned.eval()
    own = unmetered(own)
    check_shapes(own, pruned)
    check_masks(own, plan)
    check_trained(context, own, pruned, solved(plan, widths) if updates else ())
    return plan, own.eval()


def _carried_out(
    dense: nn.Module,
    plan: Plan,
    family: ModuleType,
    widths: Sequence[Width],
    sparsity: float,
    steps: float | None,
) -> nn.Module:
    """The dense model with a plan that meets its target; tensors that stay are shared."""
    pruned = surgery.apply(rebuilt(dense), plan, family, widths)
    layers = targets.layers_of(dense, family, plan)
    unit = targets.tolerance(dense, layers, widths, plan)
    maskable = {n: pruned.get_parameter(n).shape for n in family.weights(pruned)}
    check_target(dense, pruned, plan, sparsity, unit, widths, maskable, steps)
    return pruned


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


def returned(
    function: Select, context: Context, parameters: Mapping
) -> tuple[Plan, nn.Module | None]:
    """What a method returns, unchecked: a plan, and a model where it trained one.

    Raises:
        CellError: it raises, or returns something else.
    """
    return _parts(_call(function, context, parameters))


def _call(function: Select, context: Context, parameters: Mapping) -> object:
    """Call a method; whatever it raises is its own cells' failure, no one else's."""
    try:
        return function(context, **parameters)
    except CellError:
        raise
    except KeyboardInterrupt as error:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
            raise  # Ctrl-C; where that ends the process at once, it is the method's
        raise CellError("KeyboardInterrupt") from error
    except (Exception, SystemExit) as error:
        known = isinstance(error, UserError | SystemExit) or machine_fault(error)
        if known and not _raised_in(function, error):
            raise
        raise CellError(f"{type(error).__name__}: {error}") from error


def _raised_in(function: Select, error: BaseException) -> bool:
    """Whether the method's own file raised it, and not what it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code.co_filename == inspect.unwrap(function).__code__.co_filename


def _parts(result: object) -> tuple[Plan, nn.Module | None]:
    """What a method returned, which is a plan or a plan and a model."""
    parts = result if isinstance(result, tuple) else (result, None)
    if not parts or not isinstance(parts[0], Plan):
        raise CellError(f"select returned {type(result).__name__}, not a Plan")
    if len(parts) != 2 or not isinstance(parts[1], nn.Module | None):
        raise CellError("select returned a tuple that is not (Plan, model)")
    return parts


def check_choices(choices: Mapping[str, Sequence[str]], **given: str) -> None:
    """Each given parameter of a method is one of its choices.

    Raises:
        CellError: names the first that is not, with what it may be.
    """
    for name, value in given.items():
        if value not in choices[name]:
            raise CellError(f"{name} is '{value}'; known: {', '.join(choices[name])}")


def check_kind(plan: Plan, kind: str) -> None:
    """A plan removes what its method says it removes, and nothing else.

    Of several kinds a plan may leave some alone, but not all.
    """
    present = {
        "layers": bool(plan.layers or plan.copies),
        "widths": bool(plan.kept),
        "weights": bool(plan.masks),
        "steps": plan.steps != 1.0,
    }
    removed = [name for name, is_present in present.items() if is_present]
    expected = [] if kind == "none" else kind.split("+")
    if not set(removed) <= set(expected) or len(removed) < min(1, len(expected)):
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
    steps: float | None = None,
) -> None:
    """Every part of a plan meets its target.

    What is removed and zeroed together meets `sparsity` within `tolerance`, one unit of each kind.
    A pattern (N:M, uniform) fixes its own share, which is checked, and `sparsity` is the target of
    the rest. Steps meet `steps`; where nothing else goes, `sparsity` is the share that is left out.

    Args:
        maskable: shapes of the weights of `pruned` that may be masked.
        steps: the share of the steps that stays beside what else is removed.
    """
    check_steps(plan, sparsity, steps)
    counted = plan
    if plan.pattern == targets.UNIFORM:
        targets.check_uniform(plan, widths, sparsity)
        return
    if plan.pattern not in (None, "unstructured"):
        targets.check_n_of_m(plan, maskable)
        counted = Plan()
    used = plan.layers or plan.copies or plan.kept or plan.pattern == "unstructured"
    if not used and (steps is None or plan.masks):  # steps alone, or a pattern
        return
    reached = targets.reached(dense, pruned, counted)
    if abs(reached - sparsity) > tolerance + 1e-9:
        raise CellError(
            f"the plan removes {reached:.4f} of the parameters; the target is {sparsity} "
            f"and one unit is {tolerance:.4f}"
        )


def check_steps(plan: Plan, sparsity: float, steps: float | None) -> None:
    """The steps that stay are those that the method states, or that the sparsity leaves."""
    wanted = sparsity if steps is None else 1 - steps
    if (steps is not None or plan.steps != 1.0) and abs(1 - plan.steps - wanted) > 1e-9:
        raise CellError(
            f"the plan leaves out {1 - plan.steps:.4f} of the sampling steps; the target is "
            f"{wanted:.4g}"
        )


def check_shapes(own: nn.Module, pruned: nn.Module) -> None:
    """A model that a method trained has exactly the tensors that its plan leaves."""
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (own, pruned)]
    if shapes[0] != shapes[1]:
        different = sorted(
            n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)
        )
        raise CellError(f"the returned model does not fit its plan: {different[0]} differs")


def solved(plan: Plan, widths: Sequence[Width]) -> set[str]:
    """The weights that a method with UPDATES may change: those it masks, or cuts columns of."""
    readers = {
        member.tensor
        for unit in widths
        if unit.name in plan.kept
        for member in unit.members
        if member.axis == 1
    }
    return {*plan.masks, *readers}


def check_trained(
    context: Context, own: nn.Module, pruned: nn.Module, may_differ: Collection[str] = ()
) -> None:
    """Weights other than the dense model's come from training that the budget knows.

    Of a model that was trained they are those that the last training left, some of which went or
    are zero. Those of `may_differ` may be solved for in closed form, which takes no backward pass.
    """
    theirs, gradients = pruned.state_dict(), context.backward_images
    for name, tensor in own.state_dict().items():
        same = torch.equal(tensor.to(theirs[name].device), theirs[name])
        if same or digest(tensor) in context.fresh_tensors:
            continue
        wholes = (w for n in {name, original(name)} for w in context.trained.get(n, ()))
        if any(_part_of(tensor, whole) for whole in wholes):
            continue
        if name in may_differ and not gradients:
            continue
        if name in may_differ:
            raise CellError(
                f"UPDATES says that weights are solved for in closed form, but {gradients} images "
                "went backward through the model: that is training, which is context.train's"
            )
        raise CellError(
            "the returned model was trained, but not by context.train: its budget is unknown"
        )


def _part_of(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor holds numbers of another one, in any place, and zeros."""
    tensor = tensor.detach().to("cpu", whole.dtype)
    if tensor.shape == whole.shape:
        return bool(((tensor == whole) | (tensor == 0)).all())
    return bool((torch.isin(tensor, whole) | (tensor == 0)).all())


def recheck(
    dense: nn.Module,
    found: nn.Module,
    plan: Plan,
    family: ModuleType,
    kind: str,
    sparsity: float,
    steps: float | None,
    untouched: bool,
    updates: str = "",
) -> None:
    """Check a stored result of a method again, where no method's code runs.

    Args:
        dense: which the method pruned.
        found: the model that is stored beside the plan.
        kind, steps, updates: what the method says that it does, as for `select`.
        untouched: the weights that stay have to be the dense model's, but for those it solves for.

    Raises:
        CellError: as `select`; or a weight differs from the dense model's.
    """
    widths = family.widths(dense) if "widths" in kind.split("+") else []
    check_kind(plan, kind)
    expected = _carried_out(dense, plan, family, widths, sparsity, steps)
    check_shapes(found, expected)
    check_masks(found, plan)
    theirs = expected.state_dict() if untouched else {}
    may_differ = solved(plan, widths) if updates else ()
    for name, value in theirs.items():
        if name not in may_differ and not torch.equal(found.state_dict()[name], value):
            raise CellError(f"'{name}' of the pruned model is not the dense model's")


def check_masks(own: nn.Module, plan: Plan) -> None:
    """A model that a method trained is zero where its plan masks it."""
    for name, mask in plan.masks.items():
        weight = own.get_parameter(name)
        if bool(weight[~mask.to(weight.device)].any()):
            raise CellError(f"the returned model does not fit its plan: '{name}' is not masked")
