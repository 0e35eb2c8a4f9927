"""Apply a plan to a model, check it against the model, and save and load the result.

A saved model is a folder: `plan.json` (family, dense configuration, plan), `model.safetensors`, and
`masks.safetensors` where the plan masks weights. Loading builds the dense architecture without
memory, bypasses the removed layers and takes every other shape from the stored tensors; it needs
neither the method that made the plan nor a dependency graph.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from prunebench import models
from prunebench.errors import CellError, UserError
from prunebench.models.copies import rebuilt
from prunebench.models.units import GRANULARITIES, Width
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import UNIFORM
from prunebench.records import artefacts

PLAN, WEIGHTS, MASKS = "plan.json", "model.safetensors", "masks.safetensors"


def apply(
    model: nn.Module, plan: Plan, family: ModuleType, widths: Sequence[Width] | None = None
) -> nn.Module:
    """Carry out `plan` on a dense `model`, in place; tensors that change are replaced.

    Args:
        widths: the model's, where they are known; a family may have to trace it to find them.

    Raises:
        CellError: the plan names units that the model does not have.
    """
    if plan.kept and widths is None:
        widths = family.widths(model)
    check(model, plan, family, widths)
    if plan.kept:
        units = {unit.name: unit for unit in widths}
        shrink(model, [(units[name], kept) for name, kept in plan.kept.items()])
    _restack(model, plan, family)
    for name, mask in plan.masks.items():
        weight = model.get_parameter(name).detach()
        _set_parameter(model, name, weight * mask.to(weight.device))
    family.refresh(model)
    return model


def _restack(model: nn.Module, plan: Plan, family: ModuleType) -> None:
    """Bypass layers and copy others."""
    for name in plan.layers:
        family.remove_layer(model, name)
    for name in plan.copies:
        family.copy_layer(model, name)


def check(
    model: nn.Module, plan: Plan, family: ModuleType, widths: Sequence[Width] | None = None
) -> None:
    """Every unit a plan names must exist; only a width that may be empty can lose everything."""
    layers = {u.name: u for g in GRANULARITIES for u in family.layers(model, g)}
    _known("layer", (*plan.layers, *plan.copies), layers)
    _check_overlap(plan.layers)
    _check_copies(plan, {name for name, layer in layers.items() if layer.copyable})
    changes = []
    if plan.kept:
        units = {unit.name: unit for unit in widths or family.widths(model)}
        _known("width", plan.kept, units)
        changes = [(units[name], kept) for name, kept in plan.kept.items()]
        for unit, kept in changes:
            _check_kept(unit, kept)
    _check_masks(model, plan, family, changes)


def _check_copies(plan: Plan, copyable: Collection[str]) -> None:
    for name in plan.copies:
        if name not in copyable:
            raise CellError(
                f"the plan copies layer '{name}', which can't run twice: it changes the number of "
                "channels, takes a skip connection, or is part of a block"
            )
        if any(f"{name}.".startswith(f"{gone}.") for gone in plan.layers):
            raise CellError(f"the plan copies layer '{name}', all of which it removes")


def _check_masks(
    model: nn.Module,
    plan: Plan,
    family: ModuleType,
    changes: Sequence[tuple[Width, tuple[int, ...]]],
) -> None:
    """Masks have the shape that is left of their weights, all of which exist and stay."""
    _known("maskable weight", plan.masks, set(family.weights(model)))
    if plan.masks and plan.copies:
        raise CellError("a plan that copies layers can't mask weights: the copies' have no masks")
    named = re.fullmatch(r"unstructured|[1-9]\d*:[1-9]\d*", plan.pattern or "")
    if bool(plan.masks) != bool(named) and not (plan.pattern == UNIFORM and plan.kept):
        raise CellError(
            f"the plan has {len(plan.masks)} masks and the pattern {plan.pattern!r}; "
            "masks come with 'unstructured' or 'N:M', kept widths with 'uniform' or none"
        )
    if plan.pattern == UNIFORM and (plan.layers or plan.copies or plan.masks):
        raise CellError("a plan of the pattern 'uniform' removes widths and nothing else")
    staying = _staying(model, changes) if plan.masks else {}
    for name, mask in plan.masks.items():
        if any(name.startswith(f"{gone}.") for gone in plan.layers):
            raise CellError(f"the plan masks '{name}', which goes with a layer that it removes")
        sizes = enumerate(model.get_parameter(name).shape)
        shape = torch.Size(len(staying.get((name, axis), range(size))) for axis, size in sizes)
        if mask.shape != shape or mask.dtype != torch.bool:
            raise CellError(
                f"the mask of '{name}' is {mask.dtype} {tuple(mask.shape)}, "
                f"not bool {tuple(shape)} like the weight"
            )


def _known(what: str, names: object, known: object) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CellError(
            f"the plan names a {what} that does not exist: {unknown[0]}; "
            f"the model has {', '.join(sorted(known)) or 'none'}"
        )


def _check_overlap(layers: tuple[str, ...]) -> None:
    for name in layers:
        if layers.count(name) > 1 or any(other.startswith(f"{name}.") for other in layers):
            raise CellError(f"the plan removes layer '{name}' and then again all or part of it")


def _check_kept(unit: Width, kept: tuple[int, ...]) -> None:
    indices = set(kept)
    enough = indices or unit.may_be_empty
    if not enough or len(indices) != len(kept) or not indices <= set(range(unit.size)):
        least = "" if unit.may_be_empty else ", at least one"
        raise CellError(
            f"the plan keeps {len(kept)} channels of width '{unit.name}'; they must be distinct "
            f"indices from 0 to {unit.size - 1}{least}"
        )
    block = unit.size // unit.groups
    per_group = {sum(index // block == group for index in indices) for group in range(unit.groups)}
    if len(per_group) > 1:
        raise CellError(
            f"the plan keeps unequal numbers of channels in the {unit.groups} normalisation groups "
            f"of width '{unit.name}'"
        )


def shrink(model: nn.Module, changes: Sequence[tuple[Width, tuple[int, ...]]]) -> None:
    """Slice every member tensor of the given widths; axes shared by several widths are cut once."""
    for (name, axis), stays in _staying(model, changes).items():
        tensor = model.get_parameter(name)
        _set_parameter(model, name, tensor.detach().index_select(axis, stays.to(tensor.device)))


def _staying(
    model: nn.Module, changes: Sequence[tuple[Width, tuple[int, ...]]]
) -> dict[tuple[str, int], Tensor]:
    """What stays along every axis that the given widths shrink: (tensor, axis) -> indices."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for unit, kept in changes:
        removed = sorted(set(range(unit.size)) - set(kept))
        for member in unit.members:
            indices = member.index[removed].flatten()
            gone.setdefault((member.tensor, member.axis), []).append(indices)
    staying = {}
    for (name, axis), indices in gone.items():
        stays = torch.ones(model.get_parameter(name).shape[axis], dtype=torch.bool)
        stays[torch.cat(indices)] = False
        staying[name, axis] = stays.nonzero().flatten()
    return staying


def kept_rows(model: nn.Module, plan: Plan, family: ModuleType) -> dict[str, Tensor | None]:
    """The channels that `plan` leaves of every feature of a dense `model`; None: all of them.

    The names are those of `family.features`, without the features of levels that go. A plan of
    widths traces the model where the family finds them so.
    """
    features, staying = _features_left(model, plan, family), {}
    if plan.kept and any(features.values()):
        units = {unit.name: unit for unit in family.widths(model)}
        staying = _staying(model, [(units[name], kept) for name, kept in plan.kept.items()])
    return {name: staying.get((parameter, 0)) for name, parameter in features.items()}


def _features_left(model: nn.Module, plan: Plan, family: ModuleType) -> dict[str, str | None]:
    thinned = rebuilt(model)
    for name in plan.layers:
        family.remove_layer(thinned, name)
    left = family.features(thinned)
    return {name: rows for name, rows in family.features(model).items() if name in left}


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter and bring its module's own record of the sizes up to date."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    grad = module.get_parameter(leaf).requires_grad
    setattr(module, leaf, nn.Parameter(value, requires_grad=grad))
    if leaf != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = value.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = value.shape[0], value.shape[1] * module.groups
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(value)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = value.shape


def save(folder: Path, model: nn.Module, plan: Plan, family: str, config: dict) -> list[Path]:
    """Write the folder and return its files; `config` is the dense configuration of the family."""
    folder = Path(folder)
    files = [folder / PLAN, folder / WEIGHTS]
    artefacts.write_tensors(folder / WEIGHTS, model.state_dict())
    if plan.masks:
        artefacts.write_tensors(folder / MASKS, _packed(plan.masks))
        files.append(folder / MASKS)
    artefacts.write_json(
        folder / PLAN, {"family": family, "config": config, "plan": plan.to_json()}
    )
    return files


def _packed(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Eight mask entries to the byte; a mask is otherwise a quarter of the model's size."""
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    padded = {
        n: nn.functional.pad(m.flatten().byte(), (0, -m.numel() % 8)) for n, m in masks.items()
    }
    return {n: (m.view(-1, 8) * bits).sum(1, dtype=torch.uint8) for n, m in padded.items()}


def _unpacked(packed: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bits = torch.arange(8, dtype=torch.uint8)
    flat = {name: ((p.unsqueeze(1) >> bits) & 1).bool().flatten() for name, p in packed.items()}
    return {n: m[: shapes[n].numel()].view(shapes[n].shape) for n, m in flat.items()}


def load(folder: Path) -> tuple[nn.Module, Plan]:
    """Rebuild a saved model, bit-identically, in evaluation mode.

    Raises:
        UserError: a file is missing or corrupt, or does not fit the plan.
    """
    folder = Path(folder)
    content = artefacts.read_json(folder / PLAN)
    state = artefacts.read_tensors(folder / WEIGHTS)
    masked = content.get("plan", {}).get("pattern") not in (None, UNIFORM)
    masks = artefacts.read_tensors(folder / MASKS) if masked else {}
    try:
        plan = Plan.from_json(content["plan"], _unpacked(masks, state))
        return _rebuilt(content, plan, state), plan
    except (KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{folder / WEIGHTS} does not fit its plan: {error}; delete {folder}"
        ) from error


def _rebuilt(content: Mapping, plan: Plan, state: dict[str, Tensor]) -> nn.Module:
    family = models.family(content["family"])
    with init_empty_weights(include_buffers=False):
        model = family.build(content["config"])
        _restack(model, plan, family)
    for name, parameter in list(model.named_parameters()):
        if parameter.shape != state[name].shape:
            _set_parameter(model, name, state[name])
    model.load_state_dict(state, strict=True, assign=True)
    family.refresh(model)
    return model.eval()
