"""FID of spatial features (Nash et al. 2021, arXiv 2103.03841)."""

from prunebench.evaluation.metrics import Evidence, Metric, Missing

METRIC = Metric(
    order=50,
    label="sFID",
    help="FID on spatial features, sensitive to layout",
    better="lower",
    format=".2f",
    spread=True,
    least_images=2,
)


def compute(evidence: Evidence) -> float | Missing:
    from prunebench.evaluation.frechet import frechet_distance, statistics

    ours, theirs = evidence.generated.get("spatial"), evidence.reference.get("spatial")
    if ours is None or theirs is None:
        return Missing("the feature extractor has no spatial features")
    return frechet_distance(*statistics(ours), *statistics(theirs))
