"""Feature extractors behind torch-fidelity's registry, one of which a track names.

"domain" is the track's own classifier, "inception-v3-compat" is torch-fidelity's Inception, the one
that published FIDs use. Another one registered there needs one entry in `LAYERS`.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from prunebench.errors import UserError
from prunebench.evaluation.classifier import DomainClassifier
from prunebench.records.artefacts import read_tensors

# Our word for a feature -> the extractor's own. Inception's logits are ImageNet's classes: they can
# give its score, but not tell whether an image shows the class asked for, so "logits" it has none.
LAYERS = {
    "domain": {"features": "features", "spatial": "spatial", "logits": "logits"},
    "inception-v3-compat": {"features": "2048", "imagenet_logits": "logits_unbiased"},
}
# sFID (Nash et al., arXiv 2103.03841): the first 7 channels of TensorFlow's mixed_6/conv, 7x17x17.
SPATIAL_BRANCH = {"inception-v3-compat": ("Mixed_6d.branch1x1", 7)}


class DomainExtractor(FeatureExtractorBase):
    """`DomainClassifier` as a torch-fidelity extractor; weights come from a safetensors file."""

    def __init__(self, name, features_list, feature_extractor_weights_path, **kwargs):
        super().__init__(name, features_list)
        state = read_tensors(Path(feature_extractor_weights_path))
        self.classifier = DomainClassifier.from_state(state)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "spatial", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 1, 16, 16, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.classifier(images)
        return tuple(outputs[layer] for layer in self.features_list)


if "domain" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("domain", DomainExtractor)


class Extractor:
    """A torch-fidelity extractor that answers in our words, batch by batch of one fixed size."""

    def __init__(self, module: FeatureExtractorBase):
        self.name = module.get_name()
        self.module = module
        self.channels = _input_channels(module)
        self.spatial: Tensor | None = None
        if self.name in SPATIAL_BRANCH:
            path, channels = SPATIAL_BRANCH[self.name]
            module.get_submodule(path).register_forward_hook(partial(self._keep, channels))

    @torch.no_grad()
    def extract(self, images: Tensor, batch: int = 64) -> dict[str, Tensor]:
        """Features of uint8 images [N, C, H, W]: float32 [N, D] for each of "features", "spatial",
        "logits" and "imagenet_logits" that the extractor has.

        Grey images are repeated to the channels the extractor wants. The last batch is padded,
        because a kernel chosen for another batch size rounds differently: the features of an image
        do not depend on how many images come with it.
        """
        parts = [self._extract_batch(part, batch) for part in images.split(batch)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _extract_batch(self, images: Tensor, batch: int) -> dict[str, Tensor]:
        count = len(images)
        padding = images[-1:].expand(batch - count, -1, -1, -1)
        padded = torch.cat([images, padding])
        if padded.shape[1] == 1 != self.channels:
            padded = padded.expand(-1, self.channels, -1, -1)
        device = next(self.module.parameters()).device
        # cuDNN's default rounds to 10 bits; published FIDs rest on single precision.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self._forward(padded.to(device))
        return {name: value[:count].float().cpu() for name, value in outputs.items()}

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = dict(zip(LAYERS[self.name], self.module(images), strict=True))
        return outputs if self.spatial is None else {**outputs, "spatial": self.spatial}

    def _keep(self, channels: int, branch: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.spatial = output[:, :channels].flatten(1)


def load_extractor(name: str, weights: Path, **options) -> Extractor:
    """Load a registered feature extractor.

    Args:
        name: "domain" or "inception-v3-compat".
        weights: safetensors for "domain", torch-fidelity's own .pth file for Inception.
        options: passed to the extractor, e.g. `feature_extractor_internal_dtype="float64"`, or
            `cuda=False` where there is a GPU, which is used otherwise.

    Raises:
        UserError: unknown name; missing, corrupt or unsafe weights.
    """
    if name not in LAYERS:
        raise UserError(f"unknown feature extractor {name!r}; known: {', '.join(sorted(LAYERS))}")
    _check_weights(Path(weights))
    cuda = torch.cuda.is_available()
    options = {"cuda": cuda, "verbose": False, "feature_extractor_compile": False, **options}
    module = create_feature_extractor(
        name, list(LAYERS[name].values()), feature_extractor_weights_path=str(weights), **options
    )
    return Extractor(module)


def _check_weights(path: Path) -> None:
    """Refuse what the restricted unpickler refuses: torch-fidelity itself would run the pickle."""
    if not path.exists():
        raise UserError(f"{path} does not exist; fetch or train the extractor's weights first")
    if path.suffix == ".safetensors":
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is not a plain file of tensors ({error}); fetch it anew"
        ) from error


def _input_channels(module: nn.Module) -> int:
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
