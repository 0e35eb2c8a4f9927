"""How far a pruned model drifted from dense: paired images, made from equal noise."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import lpips
import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from prunebench.diffusion.sampling import to_float
from prunebench.errors import UserError
from prunebench.evaluation.classifier import DomainClassifier
from prunebench.records.artefacts import read_tensors

Distance = Callable[[Tensor, Tensor], Tensor]
BACKBONES = ("alex", "vgg")


@torch.no_grad()
def consistency(
    images: Tensor, dense_images: Tensor, distance: Distance | None, batch: int = 64
) -> dict[str, float | None]:
    """Compare uint8 images [N, C, H, W] pairwise with those dense makes of the same noise.

    Args:
        distance: as `perceptual_distance` returns it; None leaves lpips out.
        batch: images held as floats at a time.

    Returns:
        lpips: mean perceptual distance, 0 for equal images; None without a distance.
        ssim: mean structural similarity (Wang et al. 2004: 11x11 Gaussian window of sigma 1.5,
            borders reflected, which needs no more than 6 pixels a side), 1 for equal images.
        psnr: in dB, of the squared error pooled over all images, so that one unchanged image does
            not make it infinite; None (infinite) where all images are equal.
    """
    if images.shape != dense_images.shape:
        raise ValueError(f"unpaired images: {list(images.shape)} and {list(dense_images.shape)}")
    similarity = StructuralSimilarityIndexMeasure(data_range=1.0)
    ratio = PeakSignalNoiseRatio(data_range=1.0)
    total = 0.0
    for ours, dense in zip(images.split(batch), dense_images.split(batch), strict=True):
        similarity.update(ours.float() / 255, dense.float() / 255)
        ratio.update(ours.float() / 255, dense.float() / 255)
        if distance:
            total += distance(to_float(ours), to_float(dense)).double().sum().item()
    decibels = ratio.compute().item()
    return {
        "lpips": total / len(images) if distance else None,
        "ssim": similarity.compute().item(),
        "psnr": decibels if math.isfinite(decibels) else None,
    }


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
