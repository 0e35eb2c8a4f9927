"""Improved recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from prunebench.evaluation.metrics import Evidence, Metric
from prunebench.evaluation.metrics.precision import both

METRIC = Metric(
    order=40,
    label="Recall",
    help="Share of reference images inside the manifold of the generated images (diversity)",
    better="higher",
    spread=True,
    least_images=4,
)


def compute(evidence: Evidence) -> float:
    from torch_fidelity.metric_prc import KEY_METRIC_RECALL

    return evidence.once(both)[KEY_METRIC_RECALL]
