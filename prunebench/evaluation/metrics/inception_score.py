"""Inception score (Salimans et al. 2016, arXiv 1606.03498): mean over ten splits."""

from prunebench.evaluation.metrics import Evidence, Metric, Missing

METRIC = Metric(
    order=70,
    label="IS",
    help="Inception score of the generated images: sure and varied classes in Inception's eyes, "
    "without regard to the reference",
    better="higher",
    format=".2f",
    spread=True,
    optional=True,
)
SPLITS, SEED = 10, 2020  # the published convention, in torch-fidelity's shuffled order


def compute(evidence: Evidence) -> float | Missing:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = evidence.generated.get("imagenet_logits")  # without their bias, as in the first code
    if logits is None:
        return Missing("the feature extractor is not Inception")
    if not logits.isfinite().all():  # weights without a logits layer have NaN there
        return Missing("the extractor's weights have no logits layer: its logits are not finite")
    if len(logits) < SPLITS:
        return Missing(f"fewer than {SPLITS} images")
    return isc_features_to_metric(logits, SPLITS, True, SEED)[KEY_METRIC_ISC_MEAN]
