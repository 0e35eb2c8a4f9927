"""The authors' networks, written anew after their published code, to test models/official.py.

Layouts are names and shapes of state dicts; networks are functions of a state dict, in plain tensor
operations and the releases' own conventions (sizes, orders, normalisation constants).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int) -> Shapes:
    """A weight of `shape` and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def random(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Matrices that keep variance; tables, norms and biases so large that their place matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        matrix = name.endswith(".weight") and len(shape) > 1 and "emb.weight" not in name
        scale = 1 / math.sqrt(math.prod(shape[1:])) if matrix else 0.5
        state[name] = torch.randn(shape, generator=generator) * scale
    return state


def _linear(state: dict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention over [N, L, D] with heads as contiguous slices of D."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("nlhd,nmhd->nhlm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("nhlm,nmhd->nlhd", scores.softmax(-1), v).flatten(2)


def _cos_sin(t: Tensor, size: int) -> Tensor:
    angles = t[:, None] * 10_000 ** (-torch.arange(size // 2) / (size // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


def _patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tokens [N, L, D], row by row."""
    return F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def _pixels(tokens: Tensor, patch: int, side: int) -> Tensor:
    """[N, L, (p q C)] to [N, C, H, W], one patch at a time."""
    channels = tokens.shape[-1] // patch**2
    image = torch.zeros(len(tokens), channels, side * patch, side * patch)
    for index in range(side**2):
        row, column = patch * (index // side), patch * (index % side)
        part = tokens[:, index].view(-1, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, row : row + patch, column : column + patch] = part
    return image


# DiT and SiT.


def dit_layout(c: dict) -> Shapes:
    d, p, channels = c["width"], c["patch"], c["channels"]
    shapes = {"pos_embed": (1, (c["resolution"] // p) ** 2, d)}
    shapes |= affine("x_embedder.proj", d, channels, p, p)
    shapes |= affine("t_embedder.mlp.0", d, 256) | affine("t_embedder.mlp.2", d, d)
    shapes |= {"y_embedder.embedding_table.weight": (c["classes"] + 1, d)}
    for index in range(c["depth"]):
        block = f"blocks.{index}"
        shapes |= affine(f"{block}.attn.qkv", 3 * d, d) | affine(f"{block}.attn.proj", d, d)
        shapes |= affine(f"{block}.mlp.fc1", 4 * d, d) | affine(f"{block}.mlp.fc2", d, 4 * d)
        shapes |= affine(f"{block}.adaLN_modulation.1", 6 * d, d)
    shapes |= affine("final_layer.linear", p * p * 2 * channels, d)
    return shapes | affine("final_layer.adaLN_modulation.1", 2 * d, d)


def position_table(width: int, side: int) -> Tensor:
    """[1, side^2, width]: sines, cosines of the column, then of the row."""
    table = torch.zeros(side, side, width, dtype=torch.double)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                rate = 10_000 ** (-k / quarter)
                parts = (math.sin(column * rate), math.cos(column * rate))
                parts += (math.sin(row * rate), math.cos(row * rate))
                table[row, column, k::quarter] = torch.tensor(parts, dtype=torch.double)
    return table.float().view(1, side**2, width)


def dit(state: dict, c: dict, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT's prediction [N, 2 C, H, W]; SiT's is the first half."""
    d = c["width"]

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    x = _patches(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"])
    x = x + state["pos_embed"]
    hidden = F.silu(_linear(state, "t_embedder.mlp.0", _cos_sin(t, 256)))
    condition = _linear(state, "t_embedder.mlp.2", hidden)
    condition = F.silu(condition + state["y_embedder.embedding_table.weight"][y])
    for index in range(c["depth"]):
        block = f"blocks.{index}"
        m = _linear(state, f"{block}.adaLN_modulation.1", condition).split(d, 1)
        q, k, v = _linear(state, f"{block}.attn.qkv", modulated(x, m[0], m[1])).split(d, -1)
        x = x + m[2][:, None] * _linear(state, f"{block}.attn.proj", _heads(q, k, v, c["heads"]))
        hidden = _linear(state, f"{block}.mlp.fc1", modulated(x, m[3], m[4]))
        hidden = F.gelu(hidden, approximate="tanh")
        x = x + m[5][:, None] * _linear(state, f"{block}.mlp.fc2", hidden)
    shift, scale = _linear(state, "final_layer.adaLN_modulation.1", condition).split(d, 1)
    x = _linear(state, "final_layer.linear", modulated(x, shift, scale))
    return _pixels(x, c["patch"], c["resolution"] // c["patch"])


# U-ViT.


def uvit_layout(c: dict) -> Shapes:
    d, p, channels = c["width"], c["patch"], c["channels"]
    context = c.get("context")
    extras = 1 + (c["classes"] is not None) + (context[0] if context else 0)
    shapes = {"pos_embed": (1, extras + (c["resolution"] // p) ** 2, d)}
    shapes |= affine("patch_embed.proj", d, channels, p, p)
    if c["classes"] is not None:
        shapes["label_emb.weight"] = (c["classes"] + c.get("null_class", True), d)
    if context:
        shapes |= affine("context_embed", d, context[1])
    for name in _uvit_blocks(c):
        shapes |= affine(f"{name}.norm1", d) | affine(f"{name}.norm2", d)
        shapes |= {f"{name}.attn.qkv.weight": (3 * d, d)} | affine(f"{name}.attn.proj", d, d)
        shapes |= affine(f"{name}.mlp.fc1", 4 * d, d) | affine(f"{name}.mlp.fc2", d, 4 * d)
        if name.startswith("out"):
            shapes |= affine(f"{name}.skip_linear", d, 2 * d)
    shapes |= affine("norm", d) | affine("decoder_pred", p * p * channels, d)
    return shapes | (affine("final_layer", channels, channels, 3, 3) if c.get("conv", True) else {})


def _uvit_blocks(c: dict) -> list[str]:
    half = range(c["depth"] // 2)
    return [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]


def uvit(state: dict, c: dict, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """U-ViT's noise [N, C, H, W]; t as its own training counts it."""
    d, skips = c["width"], []

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), state[f"{name}.weight"], state[f"{name}.bias"])

    tokens = [_cos_sin(t, d)[:, None]]
    if c["classes"] is not None:
        tokens.insert(0, state["label_emb.weight"][y][:, None])
    if c.get("context"):
        tokens.append(_linear(state, "context_embed", y))
    extras = sum(part.shape[1] for part in tokens)
    tokens.append(_patches(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]))
    x = torch.cat(tokens, 1) + state["pos_embed"]
    for name in _uvit_blocks(c):
        if name.startswith("out"):
            x = _linear(state, f"{name}.skip_linear", torch.cat([x, skips.pop()], -1))
        q, k, v = _linear(state, f"{name}.attn.qkv", norm(f"{name}.norm1", x)).split(d, -1)
        x = x + _linear(state, f"{name}.attn.proj", _heads(q, k, v, c["heads"]))
        hidden = F.gelu(_linear(state, f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
        x = x + _linear(state, f"{name}.mlp.fc2", hidden)
        if name.startswith("in"):
            skips.append(x)
    x = _linear(state, "decoder_pred", norm("norm", x))[:, extras:]
    x = _pixels(x, c["patch"], c["resolution"] // c["patch"])
    if not c.get("conv", True):
        return x
    return F.conv2d(x, state["final_layer.weight"], state["final_layer.bias"], padding=1)


# DDPM and DDIM in PyTorch.


def _ddpm_resnet(name: str, inside: int, outside: int, time: int) -> Shapes:
    shapes = affine(f"{name}.norm1", inside) | affine(f"{name}.conv1", outside, inside, 3, 3)
    shapes |= affine(f"{name}.temb_proj", outside, time) | affine(f"{name}.norm2", outside)
    shapes |= affine(f"{name}.conv2", outside, outside, 3, 3)
    if inside != outside:
        shapes |= affine(f"{name}.nin_shortcut", outside, inside, 1, 1)
    return shapes


def _ddpm_attention(name: str, width: int) -> Shapes:
    shapes = affine(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= affine(f"{name}.{part}", width, width, 1, 1)
    return shapes


def ddpm_layout(c: dict) -> Shapes:
    widths, blocks = c["block_out_channels"], c["layers_per_block"]
    attending = [kind.startswith("Attn") for kind in c["down_block_types"]]
    first, time, top = widths[0], 4 * widths[0], len(widths) - 1
    shapes = affine("temb.dense.0", time, first) | affine("temb.dense.1", time, time)
    shapes |= affine("conv_in", first, c["in_channels"], 3, 3)
    skips, width = [first], first
    for level, out in enumerate(widths):
        for index in range(blocks):
            shapes |= _ddpm_resnet(f"down.{level}.block.{index}", width, out, time)
            shapes |= _ddpm_attention(f"down.{level}.attn.{index}", out) if attending[level] else {}
            width = out
            skips.append(width)
        if level < top:
            shapes |= affine(f"down.{level}.downsample.conv", width, width, 3, 3)
            skips.append(width)
    shapes |= _ddpm_resnet("mid.block_1", width, width, time)
    shapes |= _ddpm_attention("mid.attn_1", width)
    shapes |= _ddpm_resnet("mid.block_2", width, width, time)
    for level in range(top, -1, -1):
        out = widths[level]
        for index in range(blocks + 1):
            shapes |= _ddpm_resnet(f"up.{level}.block.{index}", width + skips.pop(), out, time)
            shapes |= _ddpm_attention(f"up.{level}.attn.{index}", out) if attending[level] else {}
            width = out
        if level:
            shapes |= affine(f"up.{level}.upsample.conv", width, width, 3, 3)
    return shapes | affine("norm_out", width) | affine("conv_out", c["out_channels"], width, 3, 3)


def ddpm(state: dict, c: dict, x: Tensor, t: Tensor) -> Tensor:
    """DDPM's noise [N, C, H, W], time in steps."""
    top, blocks = len(c["block_out_channels"]) - 1, c["layers_per_block"]
    groups = c["norm_num_groups"]

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.group_norm(x, groups, weight, bias, eps=1e-6)

    def conv(name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def resnet(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = h + _linear(state, f"{name}.temb_proj", F.silu(time))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return (conv(shortcut, x) if f"{shortcut}.weight" in state else x) + h

    def attention(name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in state:
            return x
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2).transpose(1, 2) for part in "qkv")
        h = _heads(q, k, v, 1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + conv(f"{name}.proj_out", h)

    half = c["block_out_channels"][0] // 2
    angles = t[:, None] * 10_000 ** (-torch.arange(half) / (half - 1))
    time = _linear(state, "temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1))
    time = _linear(state, "temb.dense.1", F.silu(time))
    stack = [conv("conv_in", x, padding=1)]
    for level in range(top + 1):
        for index in range(blocks):
            x = resnet(f"down.{level}.block.{index}", stack[-1])
            stack.append(attention(f"down.{level}.attn.{index}", x))
        if level < top:
            padded = F.pad(stack[-1], (0, 1, 0, 1))
            stack.append(conv(f"down.{level}.downsample.conv", padded, stride=2))
    x = attention("mid.attn_1", resnet("mid.block_1", stack[-1]))
    x = resnet("mid.block_2", x)
    for level in range(top, -1, -1):
        for index in range(blocks + 1):
            x = resnet(f"up.{level}.block.{index}", torch.cat([x, stack.pop()], 1))
            x = attention(f"up.{level}.attn.{index}", x)
        if level:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv(f"up.{level}.upsample.conv", x, padding=1)
    return conv("conv_out", F.silu(norm("norm_out", x)), padding=1)


# Latent diffusion and Stable Diffusion.


def _ldm_resnet(name: str, inside: int, outside: int, time: int) -> Shapes:
    shapes = affine(f"{name}.in_layers.0", inside)
    shapes |= affine(f"{name}.in_layers.2", outside, inside, 3, 3)
    shapes |= affine(f"{name}.emb_layers.1", outside, time)
    shapes |= affine(f"{name}.out_layers.0", outside)
    shapes |= affine(f"{name}.out_layers.3", outside, outside, 3, 3)
    if inside != outside:
        shapes |= affine(f"{name}.skip_connection", outside, inside, 1, 1)
    return shapes


def _ldm_transformer(name: str, d: int, depth: int, context: int, linear: bool) -> Shapes:
    kernel = () if linear else (1, 1)
    shapes = affine(f"{name}.norm", d) | affine(f"{name}.proj_in", d, d, *kernel)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for part, keys in (("attn1", d), ("attn2", context)):
            shapes |= {f"{block}.{part}.to_q.weight": (d, d)}
            shapes |= {f"{block}.{part}.to_{x}.weight": (d, keys) for x in "kv"}
            shapes |= affine(f"{block}.{part}.to_out.0", d, d)
        shapes |= affine(f"{block}.ff.net.0.proj", 8 * d, d)
        shapes |= affine(f"{block}.ff.net.2", d, 4 * d)
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= affine(f"{block}.{norm}", d)
    return shapes | affine(f"{name}.proj_out", d, d, *kernel)


def ldm_layout(
    width: int, mult: tuple, depths: tuple, context: int, channels: int, linear: bool = False
) -> Shapes:
    """Two ResNet blocks per level, each followed by as many transformer blocks as `depths` says."""
    return {
        f"model.diffusion_model.{name}": shape
        for part in _ldm_parts(width, mult, depths, context, channels, linear)
        for name, shape in part.items()
    }


def _ldm_parts(
    width: int, mult: tuple, depths: tuple, context: int, channels: int, linear: bool
) -> Iterator[Shapes]:
    time, top, now = 4 * width, len(mult) - 1, width
    yield affine("time_embed.0", time, width) | affine("time_embed.2", time, time)
    yield affine("input_blocks.0.0", width, channels, 3, 3)
    skips, place = [width], 1

    def entry(name: str, inside: int, level: int) -> Shapes:
        out, depth = width * mult[level], depths[level]
        shapes = _ldm_resnet(f"{name}.0", inside, out, time)
        if depth:
            shapes |= _ldm_transformer(f"{name}.1", out, depth, context, linear)
        return shapes

    for level in range(top + 1):
        for _ in range(2):
            yield entry(f"input_blocks.{place}", now, level)
            now, place = width * mult[level], place + 1
            skips.append(now)
        if level < top:
            yield affine(f"input_blocks.{place}.0.op", now, now, 3, 3)
            place += 1
            skips.append(now)
    yield _ldm_resnet("middle_block.0", now, now, time)
    yield _ldm_transformer("middle_block.1", now, depths[-1] or depths[-2], context, linear)
    yield _ldm_resnet("middle_block.2", now, now, time)
    place = 0
    for level in range(top, -1, -1):
        for index in range(3):
            yield entry(f"output_blocks.{place}", now + skips.pop(), level)
            now = width * mult[level]
            if level and index == 2:
                sampler = f"output_blocks.{place}.{2 if depths[level] else 1}.conv"
                yield affine(sampler, now, now, 3, 3)
            place += 1
    yield affine("out.0", now) | affine("out.2", channels, now, 3, 3)
