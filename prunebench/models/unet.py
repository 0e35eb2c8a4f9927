"""DDPM UNets (Ho et al. 2020) as diffusers' UNet2DModel, class-conditional where asked for."""

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch_pruning
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from prunebench.models.official import Layout
from prunebench.models.precision import takes_single
from prunebench.models.repeats import is_copy, repeat
from prunebench.models.units import (
    Layer,
    Member,
    Width,
    bias_alone,
    filled,
    inner_width,
    parameter_count,
    unemptied,
)


class UNet(UNet2DModel):
    """UNet2DModel with the suite's call: (x [N, C, H, W], t [N], y [N]) -> [N, C, H, W]."""

    null_class: int | None = None

    @takes_single
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = None if self.null_class is None else y
        return super().forward(x, t, class_labels=labels).sample


class Shortcut(nn.Module):
    """What is left of a removed ResNet block: its projection where the width changes."""

    def __init__(self, conv_shortcut: nn.Module | None):
        super().__init__()
        self.conv_shortcut = conv_shortcut

    def forward(self, x: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


def build(config: dict) -> UNet:
    """`config` holds UNet2DModel's own keys, and `classes` (None for an unconditional network)."""
    config = dict(config)
    classes = config.pop("classes", None)
    model = UNet(**config, num_class_embeds=None if classes is None else classes + 1)
    model.null_class = classes
    for attention in _attentions(model).values():
        if not attention.heads:
            raise ValueError("attention_head_dim is more than the channels of an attention layer")
        attention.head_dim = attention.to_q.out_features // attention.heads
    return model


def _attentions(model: UNet) -> dict[str, Attention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Attention)}


def layers(model: UNet, granularity: str) -> list[Layer]:
    """ResNet blocks without their shortcut, and attention layers, at either granularity."""
    units = []
    for name, module in originals(model):
        if isinstance(module, ResnetBlock2D):
            units.append(resnet(name, module))
        elif isinstance(module, Attention):
            units.append(Layer(name, parameter_count(module), copyable=True))
    return units


def originals(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names, but for copies."""
    return ((name, module) for name, module in model.named_modules() if not is_copy(name))


def resnet(name: str, block: ResnetBlock2D) -> Layer:
    """A ResNet block without its shortcut; one that changes width or size can't run twice."""
    shortcut = parameter_count(block.conv_shortcut) if block.use_in_shortcut else 0
    alike = not (block.use_in_shortcut or block.upsample or block.downsample)
    return Layer(name, parameter_count(block) - shortcut, copyable=alike)


def copy_layer(model: UNet, name: str) -> None:
    repeat(model.get_submodule(name))


def remove_layer(model: UNet, name: str) -> None:
    module = model.get_submodule(name)
    model.set_submodule(name, Shortcut(getattr(module, "conv_shortcut", None)))


def widths(model: UNet) -> list[Width]:
    """Channel groups by torch-pruning's dependency graph (DepGraph), and whole attention heads.

    The graph is traced, which takes memory for the weights; a model on the meta device gets it for
    as long as that lasts.
    """
    if model.device.type == "meta":
        model = _with_memory(model)
    names = {module: name for name, module in model.named_modules()}
    inner = {
        linear
        for attention in _attentions(model).values()
        for linear in (attention.to_q, attention.to_k, attention.to_v)
    }
    graph = torch_pruning.DependencyGraph().build_dependency(model, _example(model))
    groups = graph.get_all_groups(
        ignored_layers=[model.conv_out], root_module_types=[nn.Conv2d, nn.Linear]
    )
    found = [group for group in groups if group[0].dep.target.module not in inner]
    units = [_channels(group, names, turn) for turn, group in enumerate(found)]
    whole = filled(heads(name, attention) for name, attention in _attentions(model).items())
    units += [replace(unit, turn=len(units)) for unit in whole]  # torch-pruning has no such groups
    return sorted(units, key=lambda unit: unit.name)


def _with_memory(model: UNet) -> UNet:
    model = copy.deepcopy(model).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()  # the graph does not depend on values, but denormal ones take long
    return model


def _example(model: UNet) -> tuple[Tensor, Tensor, Tensor]:
    """A small image, as channels depend on each other at any size: 2x2 at the lowest level.

    One pixel there is too few for torch-pruning, whose tracing normalises over it.
    """
    size = 2 ** len(model.down_blocks)
    x = torch.zeros(1, model.config.in_channels, size, size, device=model.device)
    index = torch.zeros(1, dtype=torch.long, device=model.device)
    return x, index, index


def _channels(group: torch_pruning.Group, names: dict[nn.Module, str], turn: int) -> Width:
    size, members, norm_groups = len(group[0].idxs), {}, 1
    for item in group:
        module = item.dep.target.module
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        incoming = "in_channels" in item.dep.handler.__name__
        # An embedding's channels are its columns; every other layer's output channels are rows.
        axis = 1 if incoming or isinstance(module, nn.Embedding) else 0
        tensors = ["weight"] if axis == 1 or module.bias is None else ["weight", "bias"]
        for tensor in tensors:
            rows = members.setdefault(
                (f"{names[module]}.{tensor}", axis), [[] for _ in range(size)]
            )
            for root, index in zip(item.root_idxs, item.idxs, strict=True):
                rows[root].append(index)
        if isinstance(module, nn.GroupNorm):
            norm_groups = max(norm_groups, module.num_groups)
    packed = tuple(Member(t, axis, torch.tensor(rows)) for (t, axis), rows in members.items())
    return Width(names[group[0].dep.target.module], size, packed, norm_groups, turn=turn)


def heads(name: str, attention: Attention) -> Width:
    """Heads of diffusers' attention with a projection each for queries, keys and values."""
    return inner_width(
        name,
        attention,
        "heads",
        attention.heads,
        ("to_q", "to_k", "to_v"),
        ("to_out.0",),
        block=attention.head_dim,
        may_be_empty=True,
    )


def weights(model: UNet) -> list[str]:
    """Every convolution and matrix, as SparseDM masks UNets; norms and embeddings stay dense."""
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return unemptied(model, names)


def features(model: UNet) -> dict[str, str | None]:
    """The output of every down and up block, as BK-SDM compares UNets; not the middle block's."""
    blocks = {
        f"{part}.{index}": block
        for part in ("down_blocks", "up_blocks")
        for index, block in enumerate(getattr(model, part))
    }
    return {name: f"{name}.{_last_writer(block)}.weight" for name, block in blocks.items()}


def _last_writer(block: nn.Module) -> str:
    """The convolution whose rows are the channels of a block's output.

    Attention after the last ResNet block adds to the same channels, so they leave together.
    """
    for samplers in ("downsamplers", "upsamplers"):
        if getattr(block, samplers, None):
            return f"{samplers}.0.conv"
    return f"resnets.{len(block.resnets) - 1}.conv2"


def refresh(model: UNet) -> None:
    """Derive the attributes that follow from tensor shapes after surgery."""
    for module in model.modules():
        if isinstance(module, Downsample2D | Upsample2D) and module.conv is not None:
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    for attention in _attentions(model).values():
        attention.heads = attention.to_q.out_features // attention.head_dim
        if not attention.heads:
            attention.set_processor(Headless())


class Headless:
    """What diffusers' attention does without heads, in place of its processor."""

    def __call__(self, attn: Attention, x: Tensor, *_: object, **__: object) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        out = attn.to_out[1](bias_alone(attn.to_out[0], tokens))
        if x.dim() == 4:
            out = out.transpose(1, 2).reshape(x.shape)
        return (out + x if attn.residual_connection else out) / attn.rescale_output_factor


# Official checkpoints.

# What diffusers called the parts of attention when the DDPM checkpoints on its hub were written.
EARLY = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
# Our names and those of the PyTorch releases of DDPM and DDIM; "up" counts from the finest level.
DDPM = {
    r"time_embedding\.linear_1": "temb.dense.0",
    r"time_embedding\.linear_2": "temb.dense.1",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"(down|up)_blocks\.(\d+)\.resnets": r"\1.\2.block",
    r"(down|up)_blocks\.(\d+)\.attentions": r"\1.\2.attn",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0": r"\1.\2.\3sample",
    r"conv_norm_out": "norm_out",
    r"time_emb_proj": "temb_proj",
    r"conv_shortcut": "nin_shortcut",
    r"group_norm": "norm",
    r"to_out\.0": "proj_out",
    r"to_([qkv])": r"\1",
}


def _diffusers_names(model: UNet, stored: Iterable[str]) -> dict[str, str]:
    early = any(".query." in name for name in stored)
    return {name: _substituted(name, EARLY if early else {}) for name in model.state_dict()}


def _substituted(name: str, parts: dict[str, str]) -> str:
    for own, official in parts.items():
        name = name.replace(own, official)
    return name


def _ddpm_names(model: UNet, _: Iterable[str]) -> dict[str, str]:
    def official(name: str) -> str:
        for pattern, replacement in DDPM.items():
            name = re.sub(pattern, replacement, name)
        top = len(model.up_blocks) - 1
        return re.sub(r"^up\.(\d+)", lambda match: f"up.{top - int(match[1])}", name)

    return {name: official(name) for name in model.state_dict()}


LAYOUTS = {
    "diffusers": Layout(names=_diffusers_names),
    "ddpm": Layout(names=_ddpm_names, pointwise=True),
}
