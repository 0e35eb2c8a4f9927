"""Settings of FLUX: the keys of diffusers' FluxTransformer2DModel, with its defaults, and three.

`classes` (which no released FLUX has), and `guidance_scale`, what a guidance-distilled network
(`guidance_embeds`) is fed.
"""

from typing import Annotated, Literal

from pydantic import ValidationInfo, field_validator

from prunebench.models import configs
from prunebench.models.configs import Count, Depth, Instance, Positive, Takes, must

PATCH = 2  # pixels of a latent's side that one token holds
_packed = must(
    lambda count: count is None or count % PATCH**2 == 0,
    "is no multiple of 4: a token packs 2x2 patches of latents",
)


class Config(configs.Config):
    """Settings of prunebench.models.flux.Flux."""

    in_channels: Annotated[Count, _packed] = 64
    out_channels: Annotated[Count | None, _packed] = None
    patch_size: Literal[1] = 1  # of every FLUX: its 2x2 patches are packed into in_channels
    num_layers: Depth = 19
    num_single_layers: Depth = 38
    attention_head_dim: Count = 128
    num_attention_heads: Count = 24
    joint_attention_dim: Count = 4096
    pooled_projection_dim: Count = 768
    guidance_embeds: bool = False
    axes_dims_rope: list[Annotated[Count, must(lambda v: v % 2 == 0, "is odd")]] = [16, 56, 56]
    guidance_scale: Positive | None = None
    classes: Count | None = None

    @field_validator("axes_dims_rope")
    @classmethod
    def _fill_a_head(cls, axes: list[int], info: ValidationInfo) -> list[int]:
        size = info.data.get("attention_head_dim", sum(axes))
        if len(axes) != 3 or sum(axes) != size:
            raise ValueError(f"{axes} must be three that add up to attention_head_dim, {size}")
        return axes

    @field_validator("guidance_scale")
    @classmethod
    def _is_taken(cls, scale: float | None, info: ValidationInfo) -> float | None:
        if scale is not None and not info.data.get("guidance_embeds"):
            raise ValueError("needs guidance_embeds (FLUX.1-dev)")
        return scale

    def takes(self) -> Takes:
        channels, classes = self.in_channels // PATCH**2, self.classes
        text = self.joint_attention_dim if classes is None else None
        pooled = self.pooled_projection_dim if text else None
        return Takes(channels, None, PATCH, classes, classes is not None, text=text, pooled=pooled)

    def small(self, channels: int, side: int, text: int) -> dict[str, object]:
        own = self.model_dump(include={"classes", "guidance_embeds", "guidance_scale"})
        read = {} if self.classes else {"joint_attention_dim": text, "pooled_projection_dim": text}
        return {**_FLUX, **own, **read, "in_channels": PATCH**2 * channels}


_FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [2, 2, 4],
    "classes": 10,
}
TINY = {"flux": Instance("flux", _FLUX, {"name": "flow"}, image=(1, 8, 8))}
