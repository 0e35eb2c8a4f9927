"""Cross-attention UNets of LDM, Stable Diffusion and SDXL as diffusers' UNet2DConditionModel.

LDM: Rombach et al. 2022; SDXL: Podell et al. 2023. diffusers' `attention_head_dim` is the number of
heads in these networks. What can be removed follows LAPTOP-Diff (Zhang et al. 2024): the
input and output convolutions, samplers, embeddings and the projections around transformer blocks
stay.
"""

from collections.abc import Iterable, Mapping

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from prunebench.models import unet
from prunebench.models.official import Layout
from prunebench.models.precision import takes_single
from prunebench.models.units import Layer, Width, filled, inner_width, parameter_count

BRANCHES = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}  # sub-layers, each with its norm

weights = unet.weights  # every convolution and matrix
refresh = unet.refresh
copy_layer = unet.copy_layer


class ConditionalUNet(UNet2DConditionModel):
    """UNet2DConditionModel with the suite's call: (x [N, C, H, W], t [N], y) -> [N, C, H, W].

    With `classes`, y [N] are class indices; the class's vector is the only context token, and the
    last row is "no class" (LDM's ClassEmbedder). Otherwise y is the text context [N, tokens, dim],
    or a mapping with it as "context". SDXL's has "pooled" [N, dim], the pooled text embedding, and
    "sizes" [N, 6], the original size, crop corner and target size in pixels, besides.
    """

    null_class: int | None = None

    @takes_single
    def forward(self, x: Tensor, t: Tensor, y: Tensor | Mapping[str, Tensor]) -> Tensor:
        added = None
        if self.null_class is not None:
            y = self.class_context(y).unsqueeze(1)
        elif isinstance(y, Mapping):
            if "pooled" in y:
                added = {"text_embeds": y["pooled"], "time_ids": y["sizes"]}
            y = y["context"]
        return super().forward(x, t, y, added_cond_kwargs=added).sample


class TransformerBlock(nn.Module):
    """A BasicTransformerBlock whose sub-layers can be taken out; parameter names stay.

    diffusers' own always calls self-attention and feed-forward, so that a removed one would still
    cost an addition.
    """

    def __init__(self, block: BasicTransformerBlock):
        super().__init__()
        for branch, norm in BRANCHES.items():
            setattr(self, norm, getattr(block, norm))
            setattr(self, branch, getattr(block, branch))

    def forward(  # diffusers passes all by place where activations are checkpointed
        self,
        x: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        *_: None,
        **__: None,
    ) -> Tensor:
        if self.attn1 is not None:
            x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states)
        if self.ff is not None:
            x = x + self.ff(self.norm3(x))
        return x

    def sizes(self) -> dict[str, int]:
        """Parameters of every sub-layer that is left, its LayerNorm included."""
        return {
            branch: parameter_count(getattr(self, branch)) + parameter_count(getattr(self, norm))
            for branch, norm in BRANCHES.items()
            if getattr(self, branch) is not None
        }


class Passed(nn.Module):
    """Stands where a whole transformer stood, its projections included."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        return (hidden_states,)


class HiddenOnly(nn.Module):
    """Stands where a decoder's ResNet block stood that went with its skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels  # of the hidden state, in front of those of the skip

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return x[:, : self.channels]


class DownPassed(nn.Module):
    """Stands where the encoder's last level stood."""

    downsamplers = None
    resnets = ()

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, tuple[Tensor]]:
        return hidden_states, (hidden_states,)


class UpPassed(nn.Module):
    """Stands where the decoder's first level stood, and takes the one skip of `DownPassed`."""

    upsamplers = None
    resnets = (None,)

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states


def build(config: dict) -> ConditionalUNet:
    """`config` holds UNet2DConditionModel's own keys, and `classes` for class-conditional LDMs."""
    config = dict(config)
    classes = config.pop("classes", None)
    model = ConditionalUNet(**config)
    if classes is not None:
        model.null_class = classes
        model.class_context = nn.Embedding(classes + 1, model.config.cross_attention_dim)
    for name, module in list(model.named_modules()):
        if isinstance(module, BasicTransformerBlock):
            model.set_submodule(name, TransformerBlock(module))
        elif isinstance(module, Attention):
            module.head_dim = module.to_q.out_features // module.heads
    return model


def layers(model: ConditionalUNet, granularity: str) -> list[Layer]:
    """ResNet blocks without their shortcut, and transformer blocks ("block") or their sub-layers.

    The sub-layers ("branch") are self-attention, cross-attention and feed-forward, each with its
    LayerNorm. The transformers of SnapFusion and BK-SDM ("whole") are one or more transformer
    blocks in a row with the norm and the projections around them. For what BK-SDM's patterns take
    out beyond that ("stage"), see `_stages`.
    """
    if granularity == "stage":
        return _stages(model)
    wanted = {"whole": Transformer2DModel, "block": TransformerBlock}
    units = []
    for name, module in unet.originals(model):
        if isinstance(module, ResnetBlock2D):
            units.append(unet.resnet(name, module))
        elif isinstance(module, wanted.get(granularity, ())):
            units.append(Layer(name, parameter_count(module), copyable=True))
        elif isinstance(module, TransformerBlock) and granularity == "branch":
            units += [Layer(f"{name}.{branch}", size) for branch, size in module.sizes().items()]
    return units


def _stages(model: ConditionalUNet) -> list[Layer]:
    """Pairs of a ResNet block and its transformer, the mid block, and the innermost level.

    A pair of the decoder takes its skip connection along, projection included. `stages.<level>` is
    an encoder's last level, the downsampler in front and the decoder's first level. It is a unit
    where the level above has as many channels, so that the next one can take over.
    """
    units = []
    for side in ("down_blocks", "up_blocks"):
        for level, block in enumerate(getattr(model, side)):
            units += [
                Layer(f"{side}.{level}.pairs.{index}", sum(map(parameter_count, parts)))
                for index, parts in _pairs(block).items()
            ]
    if model.mid_block is not None:
        units.append(Layer("mid_block", parameter_count(model.mid_block)))
    last, channels = len(model.down_blocks) - 1, model.config.block_out_channels
    if last and channels[-1] == channels[-2] and not isinstance(model.down_blocks[-1], DownPassed):
        units.append(Layer(f"stages.{last}", sum(map(parameter_count, _innermost(model)))))
    return units


def _pairs(block: nn.Module) -> dict[int, list[nn.Module]]:
    """The ResNet block and, if any, transformer of every pair but a level's first, by its place."""
    resnets, attentions = block.resnets, getattr(block, "attentions", None)
    return {
        index: [resnet, *([attentions[index]] if attentions else [])]
        for index, resnet in enumerate(resnets)
        if index and isinstance(resnet, ResnetBlock2D)
    }


def _innermost(model: ConditionalUNet) -> list[nn.Module]:
    """The encoder's last level, the downsampler in front of it, and the decoder's first level."""
    return [model.down_blocks[-1], *model.down_blocks[-2].downsamplers, model.up_blocks[0]]


def _remove_pair(block: nn.Module, index: int, decoder: bool) -> None:
    resnet, *attention = _pairs(block)[index]
    block.resnets[index] = HiddenOnly(resnet.out_channels) if decoder else unet.Shortcut(None)
    if attention:
        block.attentions[index] = Passed()


def remove_layer(model: ConditionalUNet, name: str) -> None:
    """Bypass a unit; a transformer block without sub-layers is bypassed as a whole."""
    path, _, leaf = name.rpartition(".")
    if name == "mid_block":
        model.mid_block = None
        return
    if path == "stages":
        model.down_blocks[-1], model.down_blocks[-2].downsamplers = DownPassed(), None
        model.up_blocks[0] = UpPassed()
        return
    if path.endswith(".pairs"):
        block = model.get_submodule(path.removesuffix(".pairs"))
        _remove_pair(block, int(leaf), name.startswith("up_blocks"))
        return
    block = model.get_submodule(path)
    if isinstance(model.get_submodule(name), Transformer2DModel):
        model.set_submodule(name, Passed())
    elif not isinstance(block, TransformerBlock):
        unet.remove_layer(model, name)
    elif set(block.sizes()) == {leaf}:
        unet.remove_layer(model, path)
    else:
        setattr(block, leaf, None)
        setattr(block, BRANCHES[leaf], None)


def widths(model: ConditionalUNet) -> list[Width]:
    """Inner channels of ResNet blocks, attention heads and feed-forward neurons, explicitly.

    The residual stream and the blocks' outputs keep their width. A lone head (LDM-4 on ImageNet has
    one everywhere) can't leave and is no unit.
    """
    units = []
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            units.append(_channels(name, module))
        elif isinstance(module, Attention) and module.heads > 1:
            units.append(unet.heads(name, module))
        elif isinstance(module, FeedForward):
            units.append(neurons(name, module))
    return filled(units)


def _channels(name: str, block: ResnetBlock2D) -> Width:
    """Channels between the two convolutions; the time embedding's scales and shifts go along."""
    size, writers = block.conv1.out_channels, ("conv1", "time_emb_proj", "norm2")
    groups = block.norm2.num_groups
    return inner_width(name, block, "channels", size, writers, ("conv2",), groups=groups)


def neurons(name: str, feed_forward: FeedForward) -> Width:
    """Hidden neurons; in a GEGLU each has a row of values and, in the other half, one of gates."""
    size = feed_forward.net[2].in_features
    return inner_width(
        name, feed_forward, "neurons", size, ("net.0.proj",), ("net.2",), may_be_empty=True
    )


def features(model: ConditionalUNet) -> dict[str, str | None]:
    """Modules whose outputs feature distillation compares: every down and up block (BK-SDM).

    A down block returns (output, skip tensors); a forward hook sees this tuple, of which the first
    element is compared. No width governs these outputs: pruning leaves their shapes as they are,
    but for a level without a level behind it, which puts out what it did not shrink.
    """
    blocks = [f"down_blocks.{index}" for index in range(len(model.down_blocks))]
    if isinstance(model.down_blocks[-1], DownPassed):
        blocks = blocks[:-2]
    for index, block in enumerate(model.up_blocks):
        blocks += [f"up_blocks.{index}"] * (not isinstance(block, UpPassed))
    return dict.fromkeys(blocks)


# Official checkpoints.

# Parts of a ResNet block, and modules that stand alone, in the releases of CompVis and Stability.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
SINGLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
# Autoencoder, text encoders, moving average and schedule, which share the file with the UNet.
PIPELINE = (
    r"(first_stage_model|cond_stage_model|conditioner|model_ema|denoiser)\."
    r"|(betas|logvar|scale_factor)$|sqrt_|log_one_minus_|alphas_cumprod|posterior_"
)


def _compvis_names(model: ConditionalUNet, _: Iterable[str]) -> dict[str, str]:
    """Their blocks are flat lists: a ResNet block with its attention, or a sampler, per entry."""
    modules, places = dict(model.named_modules()), _compvis_places(model)

    def official(name: str) -> str:
        if name == "class_context.weight":
            return "cond_stage_model.embedding.weight"
        own = max((path for path in places if name.startswith(f"{path}.")), key=len)
        rest, _, leaf = name[len(own) + 1 :].rpartition(".")
        if isinstance(modules[own], ResnetBlock2D):
            rest = RESNET[rest]
        return ".".join(filter(None, ("model.diffusion_model", places[own], rest, leaf)))

    return {name: official(name) for name in model.state_dict()}


def _compvis_places(model: ConditionalUNet) -> dict[str, str]:
    """The releases' names of ResNet blocks, transformers, samplers and single modules."""
    places, index = dict(SINGLE), 1
    for level, block in enumerate(model.down_blocks):
        for part in range(len(block.resnets)):
            places[f"down_blocks.{level}.resnets.{part}"] = f"input_blocks.{index}.0"
            places[f"down_blocks.{level}.attentions.{part}"] = f"input_blocks.{index}.1"
            index += 1
        if block.downsamplers:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    index = 0
    for level, block in enumerate(model.up_blocks):
        for part in range(len(block.resnets)):
            places[f"up_blocks.{level}.resnets.{part}"] = f"output_blocks.{index}.0"
            places[f"up_blocks.{level}.attentions.{part}"] = f"output_blocks.{index}.1"
            index += 1
        # The sampler ends the level's last entry, behind its attention where it has one.
        behind = 2 if hasattr(block, "attentions") else 1
        sampler = f"output_blocks.{index - 1}.{behind}.conv"
        places[f"up_blocks.{level}.upsamplers.0.conv"] = sampler
    return places


LAYOUTS = {
    "diffusers": Layout(),
    "compvis": Layout(names=_compvis_names, others=PIPELINE),
}
