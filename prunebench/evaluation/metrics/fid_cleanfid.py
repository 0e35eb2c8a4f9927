"""The Fréchet distance as the clean-fid package computes it (Parmar et al. 2022)."""

from prunebench.evaluation.metrics import Evidence, Metric, Missing

METRIC = Metric(
    order=90,
    label="FID (clean-fid)",
    help="The same distance from the clean-fid package, an independent check",
    better="lower",
    format=".2f",
    least_images=2,
)


def compute(evidence: Evidence) -> float | Missing:
    import numpy as np
    from cleanfid.fid import frechet_distance

    try:
        distance = float(frechet_distance(*evidence.gaussians))
    except ValueError:  # its root of a rank-deficient product may come out complex
        distance = np.nan
    return distance if np.isfinite(distance) else Missing("clean-fid's matrix root failed")
