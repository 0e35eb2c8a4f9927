"""Domain classifier: the feature extractor of tracks whose images are far from ImageNet.

A small CNN trained on the track's own data. Its pooled features take Inception's place in FID
(as LeNet features do for MNIST in Binkowski et al., arXiv 1801.01401), its logits check whether a
class-conditional sample shows the class that was asked for, its maps give a perceptual distance.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunebench.diffusion.sampling import flip_some
from prunebench.errors import UserError

WIDTHS = (16, 32, 64)
# sFID keeps the first channels of a mid-level map (Nash et al., arXiv 2103.03841, keep 7 of 768);
# 16 channels on a 4x4 grid give 256 dimensions, few enough for a covariance of 2,048 samples.
SPATIAL_CHANNELS, SPATIAL_GRID = 16, 4


class DomainClassifier(nn.Module):
    """Three levels of two convolutions each, then global average pooling and a linear head."""

    def __init__(self, channels: int = 1, classes: int = 10):
        super().__init__()
        levels = zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.levels = nn.ModuleList(_level(before, after) for before, after in levels)
        self.head = nn.Linear(WIDTHS[-1], classes)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "DomainClassifier":
        """Rebuild from a state dict alone; channels and classes are read off the tensor shapes.

        Raises:
            UserError: the tensors are another model's.
        """
        try:
            model = cls(state["levels.0.0.weight"].shape[1], state["head.weight"].shape[0])
            model.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"these are not a domain classifier's weights: {error}") from error
        return model.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Intermediate maps [N, 16|32|64, h, w] of uint8 images or of float images in [-1, 1]."""
        hidden = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
        maps = []
        for depth, level in enumerate(self.levels):
            hidden = level(F.max_pool2d(hidden, 2) if depth else hidden)
            maps.append(hidden)
        return maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images, or of float images in [-1, 1], of shape [N, C, H, W].

        Returns:
            "features" [N, 64], "spatial" [N, 256] and "logits" [N, classes].
        """
        _, middle, last = self.maps(images)
        features = last.mean(dim=(2, 3))
        spatial = F.adaptive_avg_pool2d(middle[:, :SPATIAL_CHANNELS], SPATIAL_GRID)
        return {
            "features": features,
            "spatial": spatial.flatten(1),
            "logits": self.head(features),
        }


def train_classifier(
    images: Tensor,  # uint8 [N, C, H, W]
    labels: Tensor,  # int64 [N], classes 0 .. max
    *,
    seed: int,
    epochs: int,
    batch: int,
    learning_rate: float,  # peak of the one-cycle schedule
    log: Callable[[str], None] | None = None,
) -> DomainClassifier:
    """Train from scratch with AdamW and a one-cycle schedule; the same seed, the same weights.

    The global random state is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DomainClassifier(images.shape[1], int(labels.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * math.ceil(len(images) / batch)
    )
    model.train()
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            flipped = flip_some(images[chosen], generator)
            loss = F.cross_entropy(model(flipped)["logits"], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if log:
            log(f"classifier epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: DomainClassifier, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Fraction of uint8 images [N, C, H, W] whose largest logit is the label [N]."""
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    hits = sum((model(part)["logits"].argmax(1) == wanted).sum() for part, wanted in pairs)
    return int(hits) / len(images)


def _level(before: int, after: int) -> nn.Sequential:
    # Bias-free convolutions: batch normalisation subtracts any bias again.
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
