"""Reading state dicts: safetensors, indexes of shards, and pickles of tensors and plain containers.

Training scripts store moving averages in many ways; where a file holds one, it is taken, because
papers' numbers are an average's. Nothing is unpickled but tensors and plain containers.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunebench.errors import UserError
from prunebench.records import artefacts

# What training scripts leave in a pickle beside the tensors: options and names of callbacks. They
# are read as empty objects without behaviour.
INERT = ("argparse.Namespace", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
# What a download leaves in place of a file -> what it is, and the remedy.
STAND_INS = {
    rb"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull`",
    rb"\s*<(!doctype\s+)?html": "is a web page, not the file: sign in or accept its licence, and "
    "fetch it again",
}
AVERAGE = re.compile(r"(^|_)(ema|averaged?|swa|shadow)(_|$)")  # a key that holds an average
NETWORK = ("state_dict", "model", "network", "net", "params", "unet", "shadow_params")
LITEMA = "model_ema."  # CompVis: the average of a.b.c beneath "model." is "model_ema.abc"


def read(file: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, mapped into memory and not yet read.

    Raises:
        UserError: the file is missing, corrupt, or no checkpoint; it holds no state dict; or it
            holds several averages, or one without names.
    """
    if not file.is_file():
        raise UserError(f"checkpoint {file} does not exist")
    _refuse_stand_ins(file)
    if file.name.endswith(".safetensors.index.json"):
        return _sharded(file)
    content = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    return _with_averages(_state_dict(content, file), file)


def described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


def _refuse_stand_ins(file: Path) -> None:
    with file.open("rb") as handle:
        head = handle.read(512)
    for pattern, words in STAND_INS.items():
        if re.match(pattern, head, re.IGNORECASE):
            raise UserError(f"checkpoint {file} {words}")


def _sharded(file: Path) -> dict[str, Tensor]:
    """Every tensor from the shard that the index names; what else the shards hold comes too."""
    where = artefacts.read_json(file).get("weight_map")
    if not (isinstance(where, Mapping) and all(isinstance(v, str) for v in where.values())):
        raise UserError(f"checkpoint {file} is no index of shards: it has no weight_map")
    shards = {name: read(file.parent / Path(name).name) for name in sorted(set(where.values()))}
    for name, shard in where.items():
        if name not in shards[shard]:
            raise UserError(f"{file}: the key '{name}' is not in {shard}, as weight_map says")
    others = {name: value for shard in shards.values() for name, value in shard.items()}
    return {**others, **{name: shards[shard][name] for name, shard in where.items()}}


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
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {foreign[1]}" if foreign else str(error).splitlines()[-1]
        raise UserError(
            f"checkpoint {file} holds more than tensors and is not unpickled: {what}; save its "
            "state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"checkpoint {file} is corrupt ({error})") from error


# ---- which of a file's state dicts


def _state_dict(content: object, file: Path) -> dict[str, Tensor]:
    """Unwrap what training scripts save: a moving average comes before the raw weights."""
    if isinstance(content, list) and content:  # DDIM: network, optimiser, ..., moving average
        content = content[-1]
    content = _unwrapped(content, file)
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"checkpoint {file} holds no state dict; its content is {described(content)}"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{file}: the key '{name}' is {described(value)}, not a tensor")
    return {name: value for name, value in content.items() if name != "n_averaged"}  # a count


def _unwrapped(content: object, file: Path) -> object:
    """The state dict in what a script saved; the only average in it, where there is one."""
    if not isinstance(content, Mapping):
        return content
    averages = [name for name, value in content.items() if _is_average(name, value)]
    raw = [name for name in NETWORK if isinstance(content.get(name), Mapping)]
    if len(averages) > 1:
        raise UserError(
            f"checkpoint {file} holds several averages, {' and '.join(map(repr, averages))}; save "
            "the one that is meant alone"
        )
    if averages and not isinstance(content[averages[0]], Mapping):
        raise UserError(
            f"checkpoint {file} holds an average, '{averages[0]}', without names, beside "
            f"{' and '.join(map(repr, raw)) or 'no network'}; save the one that is meant alone"
        )
    chosen = [*averages, *raw][:1]
    return _unwrapped(content[chosen[0]], file) if chosen else content


def _is_average(name: object, value: object) -> bool:
    """Containers of tensors under the name of an average; a rate or a count is none."""
    return (
        isinstance(name, str)
        and bool(AVERAGE.search(name))
        and isinstance(value, Mapping | list | tuple)
    )


def _with_averages(stored: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """CompVis's averages in place of the raw weights that they are of."""
    averages = {
        name: value
        for name, value in stored.items()
        if name.startswith(LITEMA) and name.removeprefix(LITEMA) not in ("decay", "num_updates")
    }
    if not averages:
        return stored
    raw = {LITEMA + n.removeprefix("model.").replace(".", ""): n for n in stored
           if n.startswith("model.")}  # fmt: skip
    unknown = sorted(set(averages) - set(raw))
    if unknown:
        raise UserError(f"{file}: '{unknown[0]}' is the average of no weight beneath 'model.'")
    taken = {raw[name]: value for name, value in averages.items()}
    return {name: taken.get(name, value) for name, value in stored.items() if name not in averages}
