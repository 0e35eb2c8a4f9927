"""Settings of U-ViT."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from prunebench.models import configs
from prunebench.models.configs import Count, Depth, Instance, Positive, Takes, divides, must


class Config(configs.Config):
    """Settings of prunebench.models.uvit.UViT."""

    resolution: Count
    channels: Count
    patch: Annotated[Count, divides("resolution")]
    width: Count
    depth: Annotated[Depth, must(lambda v: v % 2 == 0, "is odd: in- and out-blocks are counted")]
    heads: Annotated[Count, divides("width")]
    classes: Count | None
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    conv: bool = True
    null_class: bool = True
    context: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    first_time: Annotated[float, Field(ge=0, le=1e6)] = 0.0

    @field_validator("context")
    @classmethod
    def _classes_or_context(cls, context: list[int] | None, info: ValidationInfo) -> object:
        if context is not None and info.data.get("classes") is not None:
            raise ValueError("the network has classes; leave out one of them")
        return context

    def takes(self) -> Takes:
        named = self.classes is not None and self.null_class
        text = self.context[1] if self.context else None
        return Takes(self.channels, self.resolution, self.patch, self.classes, named, text=text)

    def small(self, channels: int, side: int, text: int) -> dict[str, object]:
        own = self.model_dump(include={"classes", "null_class", "mlp_time_embed", "first_time"})
        read = {"context": [self.context[0], text]} if self.context else {}
        return {**_UVIT, **own, **read, "channels": channels, "resolution": side}


_UVIT = {
    "resolution": 8,
    "channels": 1,
    "patch": 2,
    "width": 32,
    "depth": 4,
    "heads": 4,
    "classes": 10,
}
TINY = {"uvit": Instance("uvit", _UVIT)}
