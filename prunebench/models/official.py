"""Checkpoints as the authors of a family released them, read into the suite's modules.

A family's `LAYOUTS` names the ways in which its networks are stored. Reading is strict: every
tensor of the network must be in the file, under its official name and with its shape, and the file
must hold nothing that the layout does not know. Nothing is unpickled but tensors and plain
containers.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunebench import models
from prunebench.errors import UserError
from prunebench.records import artefacts

# What training scripts leave in a pickle beside the tensors: options and names of callbacks. They
# are read as empty objects without behaviour.
INERT = ("argparse.Namespace", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")


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
            that is missing, of another shape or unexpected.
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
    return network.eval()


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
    raise UserError(f"{place}: no diffusion_pytorch_model.* in it, nor in its unet or transformer")


def assign(
    network: nn.Module, stored: dict[str, Tensor], layout: Layout, where: str, dtype: torch.dtype
) -> None:
    """Give `network` the tensors of an official state dict, which is emptied on the way."""
    own = network.state_dict()
    names = layout.names(network, stored) if layout.names else {name: name for name in own}
    state = {}
    for name, expected in own.items():
        tensor = _taken(stored, names[name], expected, layout, where)
        state[name] = tensor.to(dtype)
    for name in stored:
        if layout.others is None or not re.match(layout.others, name):
            raise UserError(f"{where}: the key '{name}' is unexpected; {HINT}")
    if layout.convert:
        try:
            layout.convert(network, state)
        except ValueError as error:
            raise UserError(f"{where}: the key {error}; {HINT}") from None
    network.load_state_dict(state, strict=True, assign=True)


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
            f"{where}: the key '{name}' is {_described(tensor)}, not float "
            f"{tuple(expected.shape)}; {HINT}"
        )
    return tensor


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


# Reading files.


def read(file: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, mapped into memory and not yet read."""
    if not file.is_file():
        raise UserError(f"checkpoint {file} does not exist")
    if file.name.endswith(".safetensors.index.json"):
        shards = sorted(set(artefacts.read_json(file)["weight_map"].values()))
        return {k: v for shard in shards for k, v in read(file.with_name(shard)).items()}
    content = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    return _state_dict(content, file)


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"checkpoint {file} is corrupt ({error})") from error


def _pickled(file: Path) -> object:
    inert = [(type(name.rpartition(".")[2], (), {}), name) for name in INERT]
    try:
        with torch.serialization.safe_globals(inert):
            # Files older than PyTorch 1.6 are no archives and cannot be mapped.
            mapped = zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {file} holds more than tensors and is not unpickled: "
            f"{str(error).splitlines()[-1]}; save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"checkpoint {file} is corrupt ({error})") from error


def _state_dict(content: object, file: Path) -> dict[str, Tensor]:
    """Unwrap what training scripts save: a moving average comes before the raw weights."""
    if isinstance(content, list) and content:  # DDIM: network, optimiser, ..., moving average
        content = content[-1]
    for key in ("ema", "state_dict", "model"):  # DiT and SiT; Lightning (LDM); DiT without average
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"checkpoint {file} holds no state dict; its content is {_described(content)}"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{file}: the key '{name}' is {_described(value)}, not a tensor")
    parallel = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if parallel else name: v for name, v in content.items()}
