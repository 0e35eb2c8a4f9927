"""Networks of an efficiency track: built and pruned without memory, then given random weights.

Parameters are on the meta device until `materialised`; buffers (position tables) are real from the
start, because they are computed, not learned.
"""

import copy
from collections.abc import Mapping
from types import ModuleType

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from prunebench import models
from prunebench.errors import CellError, UserError
from prunebench.evaluation.semi_structured import PATTERN
from prunebench.models.units import Width
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.tracks.settings_efficiency import Network
from prunebench.tracks.settings_efficiency import Plan as Asked

SPREAD = 0.02  # standard deviation of random weights: activations stay finite and are not zero
Input = Tensor | dict[str, Tensor]


def dense(model: Network) -> nn.Module:
    """The network of a model of the track, without memory for parameters, in evaluation mode."""
    try:
        with init_empty_weights(include_buffers=False):
            return models.family(model.family).build(model.config).eval()
    except (TypeError, ValueError) as error:
        raise UserError(f"config of '{model.title}': {error}") from error


def pruned(model: Network, plan: Asked, seed: int) -> tuple[nn.Module, Plan, dict]:
    """As `dense`, with a plan of the track carried out.

    Which blocks and channels go is drawn: for widths it does not change what is left, for layers it
    does where they differ in size.

    Returns:
        The network, the plan and how many channels are left of each width: name -> (left, of).

    Raises:
        CellError: the units of the kind can't reach the plan's sparsity.
        UserError: the plan names a layer that the network does not have.
    """
    network, family = dense(model), models.family(model.family)
    widths = family.widths(network) if plan.kind in ("widths", "uniform") else []
    chosen = _chosen(network, family, widths, plan, torch.Generator().manual_seed(seed))
    _check_target(network, family, widths, plan, chosen)
    try:
        surgery.apply(network, chosen, family, widths)
    except CellError as error:
        raise UserError(f"{model.title}: {error}") from error
    sizes = {unit.name: unit.size for unit in widths}
    left = {name: (len(kept), sizes[name]) for name, kept in chosen.kept.items()}
    return network.eval(), chosen, left


def _chosen(
    network: nn.Module,
    family: ModuleType,
    widths: list[Width],
    plan: Asked,
    generator: torch.Generator,
) -> Plan:
    if plan.layers:
        return Plan(layers=plan.layers)
    if plan.kind == "layers":
        layers = family.layers(network, "block")
        order = torch.randperm(len(layers), generator=generator).tolist()
        return targets.plan_layers(network, [layers[i] for i in order], plan.sparsity)
    if plan.kind == PATTERN:
        return _two_of_four(network, family)
    scores = {unit.name: torch.rand(unit.size, generator=generator) for unit in widths}
    if plan.kind == "widths":
        return targets.plan_widths(network, widths, scores, plan.sparsity)
    if plan.kind == "uniform":
        return targets.plan_uniform(widths, scores, plan.sparsity)
    return Plan()


def _two_of_four(network: nn.Module, family: ModuleType) -> Plan:
    """The first two of every four inputs stay; the masks are views of a row and take no memory."""
    weights = {name: network.get_parameter(name) for name in family.weights(network)}
    return Plan(
        masks={n: _pattern(w.shape) for n, w in weights.items() if w.shape[1] % 4 == 0},
        pattern=PATTERN,
    )


def _pattern(shape: torch.Size) -> Tensor:
    row = torch.tensor([True, True, False, False]).repeat(shape[1] // 4)
    return row.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def _check_target(
    network: nn.Module, family: ModuleType, widths: list[Width], plan: Asked, chosen: Plan
) -> None:
    """A plan that can't remove what it should is no row; `uniform` and 2:4 fix their own share."""
    if plan.kind not in ("layers", "widths") or plan.layers:
        return
    layers = family.layers(network, "block")
    gone = {unit.name: unit.parameters for unit in layers}
    counts = {unit.name: unit.size - len(chosen.kept.get(unit.name, ())) for unit in widths}
    counts = {name: count for name, count in counts.items() if name in chosen.kept}
    sizes = targets.Sizes(network, widths)
    removed = sum(gone[name] for name in chosen.layers) + sizes.removed(counts)
    reached, wanted = removed / sizes.total, plan.sparsity
    if abs(reached - wanted) > targets.tolerance(network, layers, widths, chosen):
        raise CellError(
            f"{plan.kind}: {wanted:.0%} of the parameters can't be removed, only {reached:.1%}"
        )


def zeros(plan: Plan) -> int:
    """Weights that a 2:4 plan sets to zero."""
    return sum(mask.numel() // 2 for mask in plan.masks.values())


def inputs(
    model: Network, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Input]:
    """What one forward pass of `batch` images takes: (x, t, y), in `dtype` but for class labels."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype)

    wanted = model.y
    if wanted is None:
        y = torch.zeros(batch, dtype=torch.long, device=device)
    elif isinstance(wanted, Mapping):
        y = {name: noise(*shape) for name, shape in wanted.items()}
    else:
        y = noise(*wanted)
    return noise(*model.x), torch.full((batch,), 0.5, device=device), y


def materialised(
    network: nn.Module, plan: Plan, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A copy with seeded random weights, made on the device in `dtype`; masks are applied."""
    network = copy.deepcopy(network)
    generator = torch.Generator(device).manual_seed(0)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value.normal_(std=SPREAD, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    network = nn.Module.to(network, device=device, dtype=dtype)  # buffers
    for name, mask in plan.masks.items():
        network.get_parameter(name).mul_(mask.to(device))
    return network.eval()
