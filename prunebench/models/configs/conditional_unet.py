"""Settings of LDM, Stable Diffusion and SDXL: the keys of diffusers' UNet2DConditionModel.

Defaults are diffusers'; `classes` is the suite's. `attention_head_dim` is the number of heads.
"""

import dataclasses
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
from prunebench.models.configs.unet import (
    Activation,
    Levels,
    check_side,
    small_levels,
    unet_takes,
)

Layers = Annotated[int, Field(ge=1, le=100)]
Down = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
Up = Literal["UpBlock2D", "CrossAttnUpBlock2D"]
_LEVELS = as_long_as("block_out_channels")


class Config(configs.Config):
    """Settings of prunebench.models.conditional_unet.ConditionalUNet."""

    block_out_channels: Levels = [320, 640, 1280, 1280]
    sample_size: Annotated[Count | None, AfterValidator(check_side)] = None
    in_channels: Count = 4
    out_channels: Annotated[Count, same_or_twice("in_channels")] = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Literal[0, 1] = 0
    down_block_types: Annotated[list[Down], _LEVELS] = [
        *["CrossAttnDownBlock2D"] * 3,
        "DownBlock2D",
    ]
    up_block_types: Annotated[list[Up], _LEVELS] = ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]
    layers_per_block: Annotated[Layers | list[Layers], _LEVELS] = 2
    downsample_padding: Literal[0, 1] = 1
    mid_block_scale_factor: Positive = 1.0
    dropout: Share = 0.0
    act_fn: Activation = "silu"
    norm_num_groups: Annotated[Count, divides("block_out_channels")] = 32
    norm_eps: Positive = 1e-5
    cross_attention_dim: Count = 1280
    transformer_layers_per_block: Annotated[Layers | list[Layers], _LEVELS] = 1
    attention_head_dim: Annotated[Count | list[Count], _LEVELS] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Count | None = None
    projection_class_embeddings_input_dim: Count | None = None
    classes: Count | None = None

    @field_validator("attention_head_dim")
    @classmethod
    def _whole_heads(cls, heads: int | list[int], info: ValidationInfo) -> int | list[int]:
        widths = info.data.get("block_out_channels", [])
        each = heads if isinstance(heads, list) else [heads] * len(widths)
        for count, width in zip(each, widths, strict=False):
            if width % count:
                raise ValueError(f"{count} heads do not divide {width} channels")
        return heads

    @field_validator("projection_class_embeddings_input_dim")
    @classmethod
    def _all_or_none(cls, value: int | None, info: ValidationInfo) -> int | None:
        given = [info.data.get("addition_embed_type"), info.data.get("addition_time_embed_dim")]
        if len({entry is None for entry in (*given, value)}) > 1:
            raise ValueError("goes with addition_embed_type and addition_time_embed_dim")
        return value

    def takes(self) -> Takes:
        text = self.cross_attention_dim if self.classes is None else None
        pooled = None
        if self.addition_embed_type:
            sizes = 6 * self.addition_time_embed_dim
            pooled = self.projection_class_embeddings_input_dim - sizes
        return dataclasses.replace(unet_takes(self), text=text, pooled=pooled)

    def small(self, channels: int, side: int, text: int) -> dict[str, object]:
        own = self.model_dump(include={"classes", "use_linear_projection", "addition_embed_type"})
        read = {"cross_attention_dim": 8 if self.classes else text, "attention_head_dim": 2}
        if self.addition_embed_type:  # SDXL has two encoders, and sees six sizes beside
            read |= {"cross_attention_dim": 2 * text, "addition_time_embed_dim": 4}
            read |= {"projection_class_embeddings_input_dim": 6 * 4 + text}
        return {**small_levels(self, channels, side), **own, **read}


_LDM = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
_SDXL = {
    **_LDM,
    "in_channels": 2,
    "out_channels": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
TINY = {
    "ldm": Instance("conditional_unet", {**_LDM, "classes": 10}),
    "sdxl": Instance(
        "conditional_unet",
        _SDXL,
        {"name": "noise", "beta_schedule": "scaled_linear"},
        texts={"context": (3, 8), "pooled": (8,), "sizes": (6,)},
    ),
}
