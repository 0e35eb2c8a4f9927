"""Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500), of the track's features."""

from prunebench.evaluation.metrics import Evidence, Metric

METRIC = Metric(
    order=10,
    label="FID",
    help="Fréchet distance between the features of generated and reference images: mean ± standard "
    "deviation over seeds",
    better="lower",
    format=".2f",
    spread=True,
    least_images=2,
)


def compute(evidence: Evidence) -> float:
    from prunebench.evaluation.frechet import frechet_distance

    return frechet_distance(*evidence.gaussians)
