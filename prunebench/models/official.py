"""Checkpoints as the authors of a family released them, read into the suite's modules.

A family's `LAYOUTS` names the ways in which its networks are stored. Reading is strict: every
tensor of the network must be in the file, under its official name and with its shape, and the file
must hold nothing that the layout does not know. Nothing is unpickled but tensors and plain
containers.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from prunebench import models
from prunebench.errors import UserError
from prunebench.models.stored import described, read


@dataclass(frozen=True)
class Layout:
    """How a release stores a network.

    Attributes:
        names: (network, names in the file) -> the official name of every own one; None: the same.
        convert: (network, its state dict), in place: from the release's conventions to the suite's.
            Raises ValueError, beginning with an own name, where a tensor is not what it must be.
        others: regular expression of names in the file that belong to other networks.
        pointwise: whether matrices are stored as 1x1 convolutions.
    """

    names: Callable[[nn.Module, Iterable[str]], dict[str, str]] | None = None
    convert: Callable[[nn.Module, dict[str, Tensor]], None] | None = None
    others: str | None = None
    pointwise: bool = False


SUITE = "suite"  # the suite's own state dicts, a layout of every family


def load(
    family: str, config: dict, file: Path, layout: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network of `family` and `config` with the weights of an official checkpoint.

    Built without memory; tensors are mapped from the file, cast one at a time, and assigned.

    Args:
        file: a safetensors file or its index of shards (*.safetensors.index.json), or a pickle of
            torch.save. Moving averages in it come before raw weights.
        layout: a key of the family's LAYOUTS, or "suite".

    Raises:
        UserError: the file is missing or unreadable, or the config impossible; or the first key
            that is missing, of another shape, unexpected, or not finite.
    """
    module, file = models.family(family), Path(file)
    known = {SUITE: Layout(), **getattr(module, "LAYOUTS", {})}
    if layout not in known:
        raise UserError(f"unknown layout '{layout}' of family {family}; known: {', '.join(known)}")
    try:
        with init_empty_weights(include_buffers=False):
            network = module.build(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"config of family {family}: {error}") from error
    assign(network, read(file), known[layout], str(file), dtype)
    _check_finite(network, file)
    return network.eval()


def _check_finite(network: nn.Module, file: Path) -> None:
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{file}: '{name}' has NaN or infinite values in {tensor.dtype}: the training that "
                "wrote them had diverged, or the file is damaged; get another checkpoint"
            )


def with_classes(network: nn.Module, family: str, config: dict) -> nn.Module:
    """`network` for the classes of `config`, else its own: the classes' vectors start anew.

    The vector of "no class", the last, is kept like everything else.
    """
    changed = models.family(family).build(config)
    old = network.state_dict()
    for name, tensor in changed.state_dict().items():
        if tensor.shape == old[name].shape:
            tensor.copy_(old[name])
        elif network.null_class is not None:
            tensor[-1] = old[name][-1]
    return changed


def denoiser_of(place: Path) -> Path:
    """The file with the denoiser's weights: `place` itself, or that of a diffusers repository.

    Raises:
        UserError: the folder has no such file.
    """
    if not place.is_dir():
        return place
    endings = ("safetensors.index.json", "safetensors", "bin")
    for folder in (place / "unet", place / "transformer", place):
        for ending in endings:
            file = folder / f"diffusion_pytorch_model.{ending}"
            if file.is_file():
                return file
    found = [
        str(file.relative_to(place))
        for file in sorted(place.rglob("*"))
        if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    ]
    raise UserError(
        f"{place}: no diffusion_pytorch_model.* ({', '.join(endings)}) in it, nor in its unet or "
        f"transformer; found: {', '.join(found[:10]) or 'no weights'}. Shards need their index; "
        "another file can be named by weights.file"
    )


def assign(
    network: nn.Module, stored: dict[str, Tensor], layout: Layout, where: str, dtype: torch.dtype
) -> None:
    """Give `network` the tensors of an official state dict, which is emptied on the way."""
    own = network.state_dict()
    names = layout.names(network, stored) if layout.names else {name: name for name in own}
    _unwrap(stored, set(names.values()))
    state = {}
    for name, expected in own.items():
        state[name] = _taken(stored, names[name], expected, layout, where).to(dtype)
    for name in stored:
        if layout.others is None or not re.match(layout.others, name):
            raise UserError(f"{where}: the key '{name}' is unexpected; {HINT}")
    if layout.convert:
        try:
            layout.convert(network, state)
        except ValueError as error:
            raise UserError(f"{where}: the key {error}; {HINT}") from None
    network.load_state_dict(state, strict=True, assign=True)


# What wrappers put before every name: data-parallel and sharded training, compilation, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.")


def _unwrap(stored: dict[str, Tensor], wanted: set[str]) -> None:
    """Take what wrappers put before every name off, in place, where no name is known with it."""
    while stored and not wanted & stored.keys():
        prefix = next((w for w in WRAPPERS if all(name.startswith(w) for name in stored)), None)
        if prefix is None:
            return
        for name in list(stored):
            stored[name.removeprefix(prefix)] = stored.pop(name)


HINT = "is it the checkpoint of this config, and the right layout?"


def _taken(
    stored: dict[str, Tensor], name: str, expected: Tensor, layout: Layout, where: str
) -> Tensor:
    if name not in stored:
        raise UserError(f"{where}: the key '{name}' is missing; {HINT}")
    tensor = stored.pop(name)
    if layout.pointwise and expected.dim() == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor.flatten(1)
    if tensor.shape != expected.shape or not tensor.is_floating_point():
        raise UserError(
            f"{where}: the key '{name}' is {described(tensor)}, not float "
            f"{tuple(expected.shape)}; {HINT}"
        )
    return tensor
