"""FLUX.1 (Black Forest Labs 2024) as diffusers' FluxTransformer2DModel: double and single streams.

19 double-stream blocks hold image and text apart but for one joint attention; 38 single-stream
blocks run both as one sequence, with attention and MLP side by side in front of one projection.
Parameter names are those of diffusers' checkpoints. Sizes and time convention: diffusers 0.42.1;
what EcoDiff masks: YaNgZhAnG-V5/EcoDiff, hooks. No released weights were at hand.

What can go:

- layers: whole blocks, or as branches the joint attention ("attn", of both streams: each is the
  other's keys and values), the image's and the text's feed-forward ("ff", "ff_context") of a
  double-stream block, each with the rows of the modulation that only it reads. A single-stream
  block is one residual branch: its attention and MLP share norm, modulation, gate and output bias.
- widths: EcoDiff's heads (one head is pruned in both streams together) and feed-forward neurons.
  EcoDiff also masks outputs of the modulations; these rows become zeros and no tensor shrinks, so
  they are no width here.
"""

import functools
from collections.abc import Iterator, Mapping

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from prunebench.models.conditional_unet import neurons
from prunebench.models.configs.flux import PATCH, Config
from prunebench.models.dit import keep_rows
from prunebench.models.official import Layout
from prunebench.models.precision import takes_single
from prunebench.models.repeats import is_copy, repeat
from prunebench.models.units import (
    Layer,
    Width,
    bias_alone,
    filled,
    inner_width,
    parameter_count,
    unemptied,
)

# Branches of a double-stream block, each with the modulations that have rows for it.
BRANCHES = {
    "attn": ("norm1", "norm1_context"),
    "ff": ("norm1",),
    "ff_context": ("norm1_context",),
}
GUIDANCE = 3.5  # what FLUX.1-dev is sampled with: diffusers' FluxPipeline
QUERIES = ("to_q", "to_k", "to_v")
TEXT_QUERIES = ("add_q_proj", "add_k_proj", "add_v_proj")


class Flux(FluxTransformer2DModel):
    """FLUX with the suite's call: (latents x [N, C, H, W], t [N], y) -> velocity [N, C, H, W].

    H and W are even; 2x2 patches are packed into tokens here. t runs from 0 (clean) to 1 (noise),
    as in the objective `flow` with its `time_scale` of 1: the network itself multiplies by 1000.
    As in diffusers' pipeline, latents in half precision round their time to it.

    y is a mapping: "context" [N, tokens, dim], the text's tokens (T5), and "pooled" [N, dim], its
    pooled embedding (CLIP). With `classes`, which no released FLUX has, y [N] are class indices;
    a class is one context token and one pooled vector, and the last row is "no class".
    """

    null_class: int | None = None
    guidance_scale: float | None = None

    @takes_single
    def forward(self, x: Tensor, t: Tensor, y: Tensor | Mapping[str, Tensor]) -> Tensor:
        if self.null_class is not None:
            y = {"context": self.class_context(y).unsqueeze(1), "pooled": self.class_pooled(y)}
        patches = pixel_unshuffle(x, PATCH)
        scale = self.guidance_scale
        tokens = super().forward(
            hidden_states=patches.flatten(2).transpose(1, 2).contiguous(),
            encoder_hidden_states=y["context"],
            pooled_projections=y["pooled"],
            timestep=t,
            img_ids=_positions(*patches.shape[2:], x.device),
            txt_ids=torch.zeros(y["context"].shape[1], 3, device=x.device),
            guidance=None if scale is None else x.new_full((len(x),), scale),
            return_dict=False,
        )[0]
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]), PATCH)


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Rotary position ids (0, row, column) of image tokens row by row; text tokens have zeros."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()


class _Reopened(nn.Module):
    """A block of diffusers' with its own modules, whose forward pass is written out here."""

    def __init__(self, block: FluxTransformerBlock | FluxSingleTransformerBlock):
        super().__init__()
        for name, module in block.named_children():
            setattr(self, name, module)
        self.stream = nn.Identity()  # where the image's residual stream can be watched


class DoubleBlock(_Reopened):
    """A FluxTransformerBlock whose branches can be taken out; parameter names stay."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        *_: None,
        **__: None,
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states
        parts, text_parts = _parts(self.norm1, temb), _parts(self.norm1_context, temb)
        if self.attn is not None:
            inner, gate = _modulated(self.norm1.norm, image, parts)
            text_inner, text_gate = _modulated(self.norm1_context.norm, text, text_parts)
            inner, text_inner = self.attn(inner, text_inner, image_rotary_emb=image_rotary_emb)
            image, text = image + gate * inner, text + text_gate * text_inner
        if self.ff is not None:
            inner, gate = _modulated(self.norm2, image, parts)
            image = image + gate * self.ff(inner)
        if self.ff_context is not None:
            inner, gate = _modulated(self.norm2_context, text, text_parts)
            text = text + gate * self.ff_context(inner)
        return _finite(text), self.stream(image)

    def sizes(self) -> dict[str, int]:
        """Parameters of every branch that is left, its rows of the modulations included."""
        rows = 3 * self.norm2.normalized_shape[0]
        return {
            branch: parameter_count(getattr(self, branch))
            + sum(rows * (getattr(self, norm).linear.in_features + 1) for norm in norms)
            for branch, norms in BRANCHES.items()
            if getattr(self, branch) is not None
        }

    def drop(self, branch: str) -> None:
        """Take out a branch with its shift, scale and gate; a modulation without rows goes too."""
        setattr(self, branch, None)
        for name in BRANCHES[branch]:
            linear = getattr(self, name).linear
            middle = 3 * linear.in_features
            if linear.out_features == middle:
                setattr(self, name, None)
            else:
                keep_rows(linear, slice(middle, None) if branch == "attn" else slice(middle))


class SingleBlock(_Reopened):
    """A FluxSingleTransformerBlock whose image tokens can be watched; parameter names stay."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        *_: None,
        **__: None,
    ) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        inner, gate = self.norm(tokens, emb=temb)
        attended = self.attn(inner, image_rotary_emb=image_rotary_emb)
        inner = torch.cat([attended, self.act_mlp(self.proj_mlp(inner))], dim=2)
        tokens = _finite(tokens + gate.unsqueeze(1) * self.proj_out(inner))
        count = encoder_hidden_states.shape[1]
        return tokens[:, :count], self.stream(tokens[:, count:])


class Bypass(nn.Module):
    """Stands where a removed block stood: both streams pass unchanged."""

    def __init__(self):
        super().__init__()
        self.stream = nn.Identity()

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, self.stream(hidden_states)


def _parts(norm: AdaLayerNormZero | None, temb: Tensor) -> Iterator[Tensor]:
    """What is left of a modulation, [N, 1, width] each: shift, scale, gate of every branch."""
    if norm is None:
        return iter(())
    return iter(norm.linear(norm.silu(temb)).unsqueeze(1).split(temb.shape[-1], dim=-1))


def _modulated(norm: nn.LayerNorm, x: Tensor, parts: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """A branch's input and its gate."""
    shift, scale, gate = next(parts), next(parts), next(parts)
    return norm(x) * (1 + scale) + shift, gate


def _finite(x: Tensor) -> Tensor:
    """Kept within fp16's range, as diffusers does where FLUX's large activations overflow it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def build(config: dict) -> Flux:
    """`config` holds FluxTransformer2DModel's own keys; `classes`, see Flux; `guidance_scale`.

    `guidance_scale` (3.5) is the constant that a guidance-distilled network (`guidance_embeds`,
    FLUX.1-dev) is fed. It takes the place of classifier-free guidance and costs no second pass.

    Raises:
        ValidationError (of pydantic): a key is unknown, or values do not fit each other; diffusers
            would accept them, and fail in the forward pass or mislead.
    """
    config = dict(config)
    Config.model_validate(config)
    classes = config.pop("classes", None)
    scale = config.pop("guidance_scale", None)
    model = Flux(**config)
    if model.config.guidance_embeds:
        model.guidance_scale = GUIDANCE if scale is None else float(scale)
    if classes is not None:
        model.null_class = classes
        model.class_context = nn.Embedding(classes + 1, model.config.joint_attention_dim)
        model.class_pooled = nn.Embedding(classes + 1, model.config.pooled_projection_dim)
    for blocks, kind in (
        (model.transformer_blocks, DoubleBlock),
        (model.single_transformer_blocks, SingleBlock),
    ):
        for index, block in enumerate(blocks):
            blocks[index] = kind(block)
    return model


def _blocks(model: Flux) -> dict[str, DoubleBlock | SingleBlock]:
    """The blocks that are left, by name, in the order they run."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DoubleBlock | SingleBlock)
    }


def layers(model: Flux, granularity: str) -> list[Layer]:
    """Whole blocks ("block"); or the branches of double-stream blocks, and single-stream blocks."""
    units = []
    for name, block in _blocks(model).items():
        if is_copy(name):
            continue
        if granularity == "branch" and isinstance(block, DoubleBlock):
            units += [Layer(f"{name}.{branch}", size) for branch, size in block.sizes().items()]
        else:
            units.append(Layer(name, parameter_count(block), copyable=True))
    return units


def copy_layer(model: Flux, name: str) -> None:
    repeat(model.get_submodule(name), places=(1, 0))  # blocks return the text's stream first


def remove_layer(model: Flux, name: str) -> None:
    """Bypass a block or a branch; a block without branches is bypassed as a whole."""
    path, _, leaf = name.rpartition(".")
    if leaf not in BRANCHES:
        model.set_submodule(name, Bypass())
    elif set(model.get_submodule(path).sizes()) == {leaf}:
        model.set_submodule(path, Bypass())
    else:
        model.get_submodule(path).drop(leaf)


def widths(model: Flux) -> list[Width]:
    """Attention heads and feed-forward neurons of every block; both streams keep their width."""
    kinds = {DoubleBlock: _double_widths, SingleBlock: _single_widths}
    return filled(
        unit for name, block in _blocks(model).items() for unit in kinds[type(block)](name, block)
    )


def _double_widths(name: str, block: DoubleBlock) -> list[Width]:
    units = []
    if (attn := block.attn) is not None:
        writers, readers = QUERIES + TEXT_QUERIES, ("to_out.0", "to_add_out")
        heads = attn.to_q.out_features // attn.head_dim
        units.append(
            inner_width(
                f"{name}.attn",
                attn,
                "heads",
                heads,
                writers,
                readers,
                block=attn.head_dim,
                may_be_empty=True,
            )
        )
    for branch in ("ff", "ff_context"):
        if (feed_forward := getattr(block, branch)) is not None:
            units.append(neurons(f"{name}.{branch}", feed_forward))
    return units


def _single_widths(name: str, block: SingleBlock) -> list[Width]:
    """`proj_out` reads the heads in its first columns and the neurons in the others."""
    inner, size = block.attn.to_q.out_features, block.attn.head_dim
    writers, readers = [f"attn.{query}" for query in QUERIES], ("proj_out",)
    hidden = block.proj_mlp.out_features
    width = functools.partial(inner_width, name, block, may_be_empty=True)
    return [
        width("heads", inner // size, writers, readers, block=size),
        width("neurons", hidden, ("proj_mlp",), readers, start=inner),
    ]


def weights(model: Flux) -> list[str]:
    """The matrices of every block's attention and feed-forward.

    Modulations, embedders and the head stay dense, as in the other transformers.
    """
    names = [
        f"{name}.{path}.weight"
        for name, block in _blocks(model).items()
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith("norm")
    ]
    return unemptied(model, names)


def features(model: Flux) -> dict[str, str | None]:
    """The image's residual stream [N, tokens, width] after every block.

    A bypassed block passes it on and still compares. The text's stream is not compared: of it, only
    what image tokens take over by attention reaches the output.
    """
    return {
        f"{part}.{index}.stream": None
        for part in ("transformer_blocks", "single_transformer_blocks")
        for index in range(len(getattr(model, part)))
    }


def refresh(model: Flux) -> None:
    """Derive the attributes that follow from tensor shapes after surgery."""
    for module in model.modules():
        if isinstance(module, FluxAttention):
            module.inner_dim = module.to_q.out_features
            module.heads = module.inner_dim // module.head_dim
            if not module.heads:
                module.set_processor(Headless())


class Headless:
    """What diffusers' FLUX attention does without heads, in place of its processor."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if encoder_hidden_states is None:  # single stream: its block's projection is the reader
            return hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        image = attn.to_out[1](bias_alone(attn.to_out[0], hidden_states))
        return image, bias_alone(attn.to_add_out, encoder_hidden_states)


# The names in diffusers' folders of FLUX; the single files of Black Forest Labs, with fused
# queries, keys and values, are not read.
LAYOUTS = {"diffusers": Layout()}
