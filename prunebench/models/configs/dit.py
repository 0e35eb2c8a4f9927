"""Settings of DiT and SiT."""

from typing import Annotated

from prunebench.models import configs
from prunebench.models.configs import Count, Depth, Instance, Positive, Takes, divides, must


class Config(configs.Config):
    """Settings of prunebench.models.dit.DiT."""

    resolution: Count
    channels: Count
    patch: Annotated[Count, divides("resolution")]
    width: Annotated[Count, must(lambda v: v % 4 == 0, "is no multiple of 4 (position table)")]
    depth: Annotated[Depth, must(lambda v: v > 0, "blocks leave nothing to prune")]
    heads: Annotated[Count, divides("width")]
    classes: Count
    mlp_ratio: Positive = 4.0
    learn_sigma: bool = False

    def takes(self) -> Takes:
        return Takes(
            self.channels,
            self.resolution,
            self.patch,
            self.classes,
            no_class=True,
            learns_variance=self.learn_sigma,
        )

    def small(self, channels: int, side: int, text: int) -> dict[str, object]:
        own = {"classes": self.classes, "learn_sigma": self.learn_sigma}
        return {**_DIT, **own, "channels": channels, "resolution": side}


_DIT = {
    "resolution": 8,
    "channels": 1,
    "patch": 2,
    "width": 32,
    "depth": 4,
    "heads": 4,
    "classes": 10,
}
TINY = {
    "dit": Instance("dit", _DIT),
    "dit_sigma": Instance("dit", {**_DIT, "channels": 3, "learn_sigma": True}),
    "sit": Instance("dit", _DIT, {"name": "flow", "time_scale": 1000}),
}
