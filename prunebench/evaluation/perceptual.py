"""Perceptual distances between pairs of images."""

import warnings
from collections.abc import Callable
from pathlib import Path

import lpips
import torch
from torch import Tensor, nn

from prunebench.errors import UserError
from prunebench.evaluation.classifier import DomainClassifier
from prunebench.records.artefacts import read_tensors

Distance = Callable[[Tensor, Tensor], Tensor]
BACKBONES = ("alex", "vgg")


def perceptual_distance(name: str, weights: Path) -> Distance:
    """A perceptual distance between float images in [-1, 1]: two of [N, C, H, W] -> [N].

    Args:
        name: "alex" or "vgg" is LPIPS (Zhang et al., arXiv 1801.03924) with the linear heads the
            lpips package ships, for images of at least 32 pixels a side. "domain" is the same
            paper's baseline without learned heads: the unit-normalised maps of the domain
            classifier, compared and averaged by lpips itself.
        weights: torchvision's state dict of the backbone (.pth), or the classifier's safetensors.

    Raises:
        UserError: unknown name; missing or unfit weights.
    """
    if name not in ("domain", *BACKBONES):
        known = ", ".join(("domain", *BACKBONES))
        raise UserError(f"unknown perceptual distance {name!r}; known: {known}")
    weights = Path(weights)
    metric = _domain_lpips(weights) if name == "domain" else _published_lpips(name, weights)
    metric.eval().requires_grad_(False)
    return lambda ours, dense: metric(ours, dense).flatten()


class _Maps(nn.Module):
    """The domain classifier as the backbone lpips expects: images in, list of maps out."""

    def __init__(self, classifier: DomainClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.classifier.maps(images)


def _domain_lpips(weights: Path) -> nn.Module:
    backbone = _Maps(DomainClassifier.from_state(read_tensors(weights)))
    # Version 0.0 leaves out ImageNet's colour scaling; squeeze is the cheapest to build and drop.
    metric = _build_lpips(net="squeeze", version="0.0", lpips=False)
    metric.net, metric.L = backbone, len(backbone.classifier.levels)
    return metric


def _published_lpips(name: str, weights: Path) -> nn.Module:
    metric = _build_lpips(net=name, version="0.1", lpips=True)
    state = _backbone_state(weights)
    # lpips cuts torchvision's `features` into slices that keep the layers' numbers.
    wanted = {key: f"features.{key.split('.', 1)[1]}" for key in metric.net.state_dict()}
    missing = sorted(set(wanted.values()) - set(state))
    if missing:
        raise UserError(f"{weights} is not torchvision's {name} backbone: it lacks {missing[0]}")
    metric.net.load_state_dict({key: state[source] for key, source in wanted.items()})
    return metric


def _build_lpips(**options) -> nn.Module:
    """LPIPS with an untrained backbone: nothing is downloaded, the random state stays as it is."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # lpips uses its old arguments
        return lpips.LPIPS(pnet_rand=True, verbose=False, **options)


def _backbone_state(weights: Path) -> dict[str, Tensor]:
    if weights.suffix == ".safetensors":
        return read_tensors(weights)
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read {weights} as tensors ({error}); fetch it anew") from error
