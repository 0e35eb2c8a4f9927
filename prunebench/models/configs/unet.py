"""Settings of DDPM UNets: the keys of diffusers' UNet2DModel, with its defaults, and `classes`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from prunebench.models import configs
from prunebench.models.configs import (
    Count,
    Instance,
    Positive,
    Share,
    Takes,
    as_long_as,
    divides,
    same_or_twice,
)

Levels = Annotated[list[Count], Field(min_length=1, max_length=10)]  # channels, finest level first
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]


def check_side(side: int | None, info: ValidationInfo) -> int | None:
    """Every level but the last halves the image."""
    multiple = 2 ** (len(info.data.get("block_out_channels", [0])) - 1)
    if side is not None and side % multiple:
        raise ValueError(f"{side} is no multiple of {multiple}, by which the levels divide it")
    return side


class Config(configs.Config):
    """Settings of prunebench.models.unet.UNet."""

    block_out_channels: Levels = [224, 448, 672, 896]
    sample_size: Annotated[Count | None, AfterValidator(check_side)] = None
    in_channels: Count = 3
    out_channels: Annotated[Count, same_or_twice("in_channels")] = 3
    center_input_sample: bool = False
    freq_shift: Literal[0, 1] = 0
    flip_sin_to_cos: bool = True
    down_block_types: Annotated[
        list[Literal["DownBlock2D", "AttnDownBlock2D"]], as_long_as("block_out_channels")
    ] = ["DownBlock2D", *["AttnDownBlock2D"] * 3]
    up_block_types: Annotated[
        list[Literal["UpBlock2D", "AttnUpBlock2D"]], as_long_as("block_out_channels")
    ] = [*["AttnUpBlock2D"] * 3, "UpBlock2D"]
    layers_per_block: Annotated[Count, Field(le=100)] = 2
    mid_block_scale_factor: Positive = 1.0
    downsample_padding: Literal[0, 1] = 1
    dropout: Share = 0.0
    act_fn: Activation = "silu"
    attention_head_dim: Count | None = 8
    norm_num_groups: Annotated[Count, divides("block_out_channels")] = 32
    norm_eps: Positive = 1e-5
    add_attention: bool = True
    classes: Count | None = None

    @field_validator("attention_head_dim")
    @classmethod
    def _whole_heads(cls, size: int | None, info: ValidationInfo) -> int | None:
        """Levels without attention may have any width; the middle has attention."""
        widths = info.data.get("block_out_channels", [])
        down = info.data.get("down_block_types", [])
        up = info.data.get("up_block_types", [])[::-1]
        kinds = zip(widths, down, up, strict=False)
        attending = [width for width, *two in kinds if any("Attn" in kind for kind in two)]
        for width in (*attending, *widths[-1:]):
            if size and width % size:
                raise ValueError(f"{size} does not divide {width}, the channels of an attention")
        return size

    def takes(self) -> Takes:
        return unet_takes(self)

    def small(self, channels: int, side: int, text: int) -> dict[str, object]:
        own = {"classes": self.classes, "add_attention": self.add_attention}
        return {**small_levels(self, channels, side), **own, "attention_head_dim": 8}


def unet_takes(config: configs.Config) -> Takes:
    """What UNets take whose settings have diffusers' names."""
    multiple = 2 ** (len(config.block_out_channels) - 1)
    classes = config.classes
    return Takes(config.in_channels, config.sample_size, multiple, classes, classes is not None)


def small_levels(config: configs.Config, channels: int, side: int) -> dict[str, object]:
    """The levels of a small UNet: as many as fit the side, up to three, of the same kinds."""
    levels = next(n for n in (3, 2, 1) if side % 2 ** (n - 1) == 0)
    levels = min(levels, len(config.block_out_channels))
    twice = config.out_channels // config.in_channels
    return {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": twice * channels,
        "layers_per_block": 1,
        "block_out_channels": [8 * (level + 1) for level in range(levels)],
        "down_block_types": config.down_block_types[:levels],
        "up_block_types": config.up_block_types[-levels:],
        "norm_num_groups": 4,
    }


_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "classes": 10,
}
TINY = {
    "unet": Instance("unet", _UNET),
    "unet_attention": Instance(
        "unet",
        {
            **_UNET,
            "block_out_channels": [8, 32],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
    ),
}
