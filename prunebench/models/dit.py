"""Class-conditional diffusion transformers: DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024).

Both papers use one network; they differ in the objective it is trained with. Built on timm's
Attention, Mlp and PatchEmbed, with the parameter names and initialisation of the papers' releases.
diffusers' DiT gives every block its own embedders and is therefore not the network of the papers.
"""

import math

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from prunebench.models.activations import run
from prunebench.models.official import Layout
from prunebench.models.precision import takes_single
from prunebench.models.repeats import repeat
from prunebench.models.units import (
    Layer,
    Width,
    bias_alone,
    filled,
    inner_width,
    parameter_count,
    unemptied,
)

BRANCHES = ("attn", "mlp")


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of a scalar time, then an MLP."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def rates(self, device: torch.device | str) -> Tensor:
        """Angles per unit of time, [frequencies / 2]."""
        half = self.frequencies // 2
        return torch.exp(-math.log(10_000) * torch.arange(half, device=device) / half)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.rates(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight))


class LabelEmbedder(nn.Module):
    """One vector per class and one, the last, for "no class" (classifier-free guidance)."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    """Transformer block with adaLN-Zero; either residual branch can be taken out."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=lambda: nn.GELU("tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = iter(self.adaLN_modulation(c).unsqueeze(1).split(x.shape[-1], dim=-1))
        for branch, norm in ((self.attn, self.norm1), (self.mlp, self.norm2)):
            if branch is not None:
                shift, scale, gate = next(modulation), next(modulation), next(modulation)
                x = x + gate * branch(norm(x) * (1 + scale) + shift)
        return x

    def drop(self, branch: str) -> None:
        """Take out "attn" or "mlp" and the three rows of the modulation that only it reads."""
        linear = self.adaLN_modulation[1]
        middle = 3 * linear.in_features
        kept = slice(middle, None) if branch == "attn" else slice(0, middle)
        keep_rows(linear, kept)
        setattr(self, branch, None)


def keep_rows(linear: nn.Linear, kept: slice) -> None:
    """Cut a linear layer with a bias down to some of its outputs, in place."""
    linear.weight = nn.Parameter(linear.weight.detach()[kept].clone())
    linear.bias = nn.Parameter(linear.bias.detach()[kept].clone())
    linear.out_features = linear.weight.shape[0]


class Bypass(nn.Module):
    """Stands where a removed block stood: the residual stream passes unchanged."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Predicts noise or velocity from (x [N, C, H, W], t [N], y [N]); output [N, C', H, W]."""

    gradient_checkpointing = False

    def __init__(
        self,
        resolution: int,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
    ):
        super().__init__()
        self.patch, self.out_channels = patch, channels * (2 if learn_sigma else 1)
        self.null_class = classes
        self.x_embedder = PatchEmbed(resolution, patch, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.register_buffer("pos_embed", sincos_2d(width, resolution // patch))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """The papers' initialisation: Xavier linears, zero modulation, zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero = [module.adaLN_modulation[1] for module in self.modules() if hasattr(module, "norm2")]
        for linear in (*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @takes_single
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side = x.shape[-1] // self.patch
        # timm's patches are strided; every block would work on them as they lie, and more slowly.
        tokens = (self.x_embedder(x) + self.pos_embed).contiguous()
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = run(self, block, tokens, c)
        patches = self.final_layer(tokens, c).unflatten(-1, (self.patch, self.patch, -1))
        patches = patches.unflatten(1, (side, side))  # [N, h, w, p, q, C]
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(
            len(x), self.out_channels, x.shape[-2], x.shape[-1]
        )


def sincos_2d(width: int, side: int) -> Tensor:
    """Fixed sine-cosine position embedding, [1, side * side, width]; columns first, then rows."""
    rates = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * rates for axis in (column, row)]
    parts = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


def build(config: dict) -> DiT:
    return DiT(**config)


def layers(model: DiT, granularity: str) -> list[Layer]:
    """Whole blocks ("block"), or the attention and MLP branches of the blocks ("branch")."""
    units = []
    for index, block in enumerate(model.blocks):
        if isinstance(block, Bypass):
            continue
        if granularity != "branch":
            units.append(Layer(f"blocks.{index}", parameter_count(block), copyable=True))
            continue
        present = [branch for branch in BRANCHES if getattr(block, branch) is not None]
        modulation = parameter_count(block.adaLN_modulation) // len(present)
        units += [
            Layer(f"blocks.{index}.{branch}", parameter_count(getattr(block, branch)) + modulation)
            for branch in present
        ]
    return units


def copy_layer(model: DiT, name: str) -> None:
    repeat(model.get_submodule(name))


def remove_layer(model: DiT, name: str) -> None:
    _, index, *branch = name.split(".")
    block = model.blocks[int(index)]
    other = [b for b in BRANCHES if branch and b != branch[0] and getattr(block, b) is not None]
    if other:
        block.drop(branch[0])
    else:
        model.blocks[int(index)] = Bypass()


def widths(model: DiT) -> list[Width]:
    """Attention heads and MLP hidden neurons of each block; the residual stream keeps its width."""
    return filled(
        unit
        for name, block in model.named_modules()
        if isinstance(block, Block)
        for unit in _block_widths(name, block)
    )


def _block_widths(prefix: str, block: Block) -> list[Width]:
    kinds = {"attn": heads, "mlp": neurons}
    return [
        kinds[branch](f"{prefix}.{branch}", getattr(block, branch))
        for branch in BRANCHES
        if getattr(block, branch) is not None
    ]


def heads(name: str, attention: Attention) -> Width:
    """Heads of timm's attention, whose fused matrix holds all queries, then keys, then values."""
    size = attention.num_heads
    return inner_width(
        name,
        attention,
        "heads",
        size,
        ("qkv",),
        ("proj",),
        block=attention.head_dim,
        may_be_empty=True,
    )


def neurons(name: str, mlp: Mlp) -> Width:
    """Hidden neurons of timm's MLP."""
    size = mlp.fc1.out_features
    return inner_width(name, mlp, "neurons", size, ("fc1",), ("fc2",), may_be_empty=True)


def weights(model: DiT) -> list[str]:
    """The matrices of the blocks' attention and MLP; embedders, modulation and head stay dense."""
    names = [
        f"{name}.{matrix}.weight"
        for name, block in model.named_modules()
        if isinstance(block, Block)
        for matrix in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        if getattr(block, matrix.split(".")[0]) is not None
    ]
    return unemptied(model, names)


def features(model: DiT) -> dict[str, str | None]:
    """The residual stream after every block; a bypassed block passes it on and still compares."""
    return {f"blocks.{index}": None for index in range(len(model.blocks))}


def refresh(model: nn.Module) -> None:
    """Derive the attributes of timm's attention that follow from tensor shapes after surgery."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attn_dim = module.proj.in_features
            module.num_heads = module.attn_dim // module.head_dim
            if not module.num_heads:
                module.__class__ = Headless


class Headless(Attention):
    """What timm's attention is without heads."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return bias_alone(self.proj, x)


# Official checkpoints (facebookresearch/DiT, willisma/SiT): the names are our own.


def _check_position_table(model: DiT, state: dict[str, Tensor]) -> None:
    """A transposed or another table would fit in shape; half precision differs by less."""
    difference = (state["pos_embed"].float() - model.pos_embed.float()).abs().max().item()
    if not difference < 1e-2:
        raise ValueError(
            f"'pos_embed' differs by {difference:.3g} from the fixed sine-cosine table"
        )


def _turn_time(model: DiT, state: dict[str, Tensor]) -> None:
    """From SiT's convention, data at time 1, to the suite's, data at time 0.

    With x_t = (1 - t) x0 + t noise the suite's velocity is u(x, t) = -v(x, 1 - t), v the release's.
    cos and sin of w (1 - t) are a rotation of those of w t, which the first matrix takes up; the
    sign goes to the last layer.
    """
    _check_position_table(model, state)
    name = "t_embedder.mlp.0.weight"
    rates = model.t_embedder.rates("cpu").double()
    cosine, sine = state[name].double().chunk(2, dim=1)
    turned = [
        cosine * rates.cos() + sine * rates.sin(),
        cosine * rates.sin() - sine * rates.cos(),
    ]
    state[name] = torch.cat(turned, dim=1).to(state[name])
    for leaf in ("weight", "bias"):
        state[f"final_layer.linear.{leaf}"] = -state[f"final_layer.linear.{leaf}"]


LAYOUTS = {"dit": Layout(convert=_check_position_table), "sit": Layout(convert=_turn_time)}
