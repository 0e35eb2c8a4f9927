"""Improved precision (Kynkäänniemi et al. 2019, arXiv 1904.06991), and recall, its counterpart.

Both depend on both sample sizes and are defined on equal ones: those of the generated and the
reference images and `SAMPLES`, whichever is smallest, evenly spaced over each set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunebench.evaluation.metrics import Evidence, Metric

if TYPE_CHECKING:
    from torch import Tensor

METRIC = Metric(
    order=30,
    label="Precision",
    help="Share of generated images inside the manifold of the reference images (fidelity)",
    better="higher",
    spread=True,
    least_images=4,  # a manifold is the balls that reach each image's third neighbour
)
SAMPLES = 2048


def compute(evidence: Evidence) -> float:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION

    return evidence.once(both)[KEY_METRIC_PRECISION]


def compared(evidence: Evidence) -> int:
    """How many images of each set are compared."""
    return min(len(evidence.generated["features"]), len(evidence.reference["features"]), SAMPLES)


def both(evidence: Evidence) -> dict[str, float]:
    """Precision and recall under torch-fidelity's keys."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    sets = (evidence.generated["features"], evidence.reference["features"])
    chosen = [_evenly_spaced(features, compared(evidence)) for features in sets]
    return prc_features_to_metric(*chosen, verbose=False)


def _evenly_spaced(features: Tensor, count: int) -> Tensor:
    import torch

    # Not the first ones: files sorted by class are common.
    return features[torch.arange(count) * len(features) // count]
