"""U-ViT (Bao et al. 2023, "All are Worth Words"): time, class and image patches are all tokens.

Every block of the second half joins the output of its mirror block in the first half (long skip).
Built on timm's Attention, Mlp and PatchEmbed; architecture, parameter names, token order and
initialisation are those of the release (github.com/baofff/U-ViT, libs/uvit.py and uvit_t2i.py).

Removing a block takes its two residual branches with their norms and nothing else:

- an in-block passes the stream on, and the same tensor goes down its long skip;
- an out-block still joins its long skip: `skip_linear` maps two streams to one and has no bypass,
  like the projection in a UNet's shortcut. It stays and does not count as part of the layer.
"""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from prunebench.models import dit
from prunebench.models.activations import run
from prunebench.models.official import Layout
from prunebench.models.precision import takes_single
from prunebench.models.repeats import COPIES, copies, is_copy, repeat
from prunebench.models.units import Layer, Width, filled, parameter_count, unemptied

NORMS = {"attn": "norm1", "mlp": "norm2"}  # of each residual branch, in the order they run

refresh = dit.refresh  # both are built on timm's attention


class Block(nn.Module):
    """Pre-norm transformer block, behind the join of a long skip where `joins`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, joins: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads=heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.skip_linear = nn.Linear(2 * width, width) if joins else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        for branch in self.branches():
            x = x + getattr(self, branch)(getattr(self, NORMS[branch])(x))
        return x

    def branches(self) -> list[str]:
        """The residual branches that are left."""
        return [branch for branch in NORMS if getattr(self, branch) is not None]

    def drop(self, branch: str) -> None:
        """Take out "attn" or "mlp" with its norm."""
        setattr(self, branch, None)
        setattr(self, NORMS[branch], None)


class UViT(nn.Module):
    """Predicts noise from (x [N, C, H, W], t [N] on 0 to 999, y [N]); output [N, C, H, W].

    Args:
        depth: in-blocks and out-blocks together, as the release counts; the mid block comes on top.
        classes: None for a network without classes, which has no class token.
        null_class: whether the class table has a row for "no class", the last.
        context: (tokens, dim) of a text: y is its embedding [N, tokens, dim]. Needs classes None;
            without either y is ignored.
        first_time: what the release calls time 0; its networks count the noisy steps from 1.
        mlp_time_embed: an MLP on the time token (no published size has it).
        conv: a 3x3 convolution on the output image (every published size but Huge).
    """

    gradient_checkpointing = False

    def __init__(
        self,
        resolution: int,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int | None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        conv: bool = True,
        null_class: bool = True,
        context: tuple[int, int] | None = None,
        first_time: float = 0.0,
    ):
        super().__init__()
        if depth % 2:
            raise ValueError(f"depth counts in- and out-blocks and must be even, not {depth}")
        if classes is not None and context is not None:
            raise ValueError("a network has classes or a context, not both")
        self.patch, self.width, self.first_time = patch, width, first_time
        self.null_class = classes if null_class else None
        self.patch_embed = PatchEmbed(resolution, patch, channels, width)
        self.time_embed = _time_mlp(width) if mlp_time_embed else nn.Identity()
        self.label_emb = None if classes is None else nn.Embedding(classes + null_class, width)
        self.context_embed = None if context is None else nn.Linear(context[1], width)
        self.extras = 1 + (classes is not None) + (context[0] if context else 0)
        tokens = self.extras + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))

        def blocks(count: int, joins: bool) -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, heads, mlp_ratio, qkv_bias, joins) for _ in range(count)
            )

        self.in_blocks = blocks(depth // 2, joins=False)
        self.mid_block = Block(width, heads, mlp_ratio, qkv_bias, joins=False)
        self.out_blocks = blocks(depth // 2, joins=True)
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch * patch * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()
        self.initialise()

    def initialise(self) -> None:
        """The release's: truncated normals; convolutions and class table keep PyTorch's own."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @takes_single
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, skips = self.embed(x, t, y), []
        for block in self.in_blocks:
            tokens = run(self, block, tokens)
            skips.append(tokens)
        tokens = run(self, self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = run(self, block, tokens, skips.pop())
        return self.final_layer(self.image(self.decoder_pred(self.norm(tokens)), x.shape))

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The sequence [N, extras + patches, width].

        Class (if any), time, context (if any), patches row by row.
        """
        t = t + self.first_time
        time = get_timestep_embedding(t, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        parts = [self.time_embed(time.to(self.pos_embed)).unsqueeze(1), self.patch_embed(x)]
        if self.label_emb is not None:
            parts.insert(0, self.label_emb(y).unsqueeze(1))
        if self.context_embed is not None:
            parts.insert(1, self.context_embed(y))
        return torch.cat(parts, dim=1) + self.pos_embed

    def image(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Patch tokens [N, extras + patches, p * p * C] to an image of `shape` [N, C, H, W]."""
        rows, columns = shape[2] // self.patch, shape[3] // self.patch
        patches = tokens[:, self.extras :].unflatten(-1, (self.patch, self.patch, -1))
        patches = patches.unflatten(1, (rows, columns))  # [N, h, w, p, q, C]
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(shape)


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def build(config: dict) -> UViT:
    return UViT(**config)


def _blocks(model: UViT) -> dict[str, Block]:
    """All blocks by name in the order they run, whatever is left of them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Block)}


def layers(model: UViT, granularity: str) -> list[Layer]:
    """Whole blocks ("block"), or their attention and MLP branches ("branch"), without the joins."""
    units = []
    for name, block in _blocks(model).items():
        if is_copy(name):
            continue
        sizes = {
            branch: parameter_count(getattr(block, branch))
            + parameter_count(getattr(block, NORMS[branch]))
            for branch in block.branches()
        }
        if granularity == "branch":
            units += [Layer(f"{name}.{branch}", size) for branch, size in sizes.items()]
        elif sizes:
            size = sum(sizes.values()) + sum(map(parameter_count, copies(block)))
            units.append(Layer(name, size, copyable=True))
    return units


def copy_layer(model: UViT, name: str) -> None:
    """The copy of an out-block has no join: its long skip has come in already."""
    repeat(model.get_submodule(name)).skip_linear = None


def remove_layer(model: UViT, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    if leaf in NORMS:
        model.get_submodule(path).drop(leaf)
        return
    block = model.get_submodule(name)
    for branch in block.branches():
        block.drop(branch)
    if copies(block):
        setattr(block, COPIES, nn.ModuleList())


def widths(model: UViT) -> list[Width]:
    """Attention heads and MLP hidden neurons of each block; the residual stream keeps its width."""
    kinds = {"attn": dit.heads, "mlp": dit.neurons}
    return filled(
        kinds[branch](f"{name}.{branch}", getattr(block, branch))
        for name, block in _blocks(model).items()
        for branch in block.branches()
    )


def weights(model: UViT) -> list[str]:
    """The matrices of every block's attention and MLP, which SparseDM masks.

    Joins of long skips, embedders, decoder and final convolution stay dense.
    """
    matrices = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
    names = [
        f"{name}.{branch}.{matrix}.weight"
        for name, block in _blocks(model).items()
        for branch in block.branches()
        for matrix in matrices[branch]
    ]
    return unemptied(model, names)


def features(model: UViT) -> dict[str, str | None]:
    """The tokens [N, L, width] after every block; a bypassed block passes them on and compares."""
    return dict.fromkeys(_blocks(model))


LAYOUTS = {"uvit": Layout()}  # the release's names are our own
