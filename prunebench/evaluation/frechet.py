"""The Fréchet distance between two sets of features, each taken as a Gaussian."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor


def statistics(features: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def reference_statistics(reference: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """As `statistics`: the published ones where the reference has them, else of its features."""
    if "mu" in reference:
        return reference["mu"].numpy(), reference["sigma"].numpy()
    return statistics(reference["features"])


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians (Heusel et al., arXiv 1706.08500).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). The trace of that root is the sum
    of the singular values of sigma1^(1/2) sigma2^(1/2), whose two factors come from symmetric
    eigendecompositions. No root of a computed product is taken, so rounding is not amplified and
    rank-deficient covariances (fewer samples than dimensions) are exact too.
    """
    difference = mu1 - mu2
    overlap = _square_root(sigma1).T @ _square_root(sigma2)
    trace_of_root = np.linalg.svd(overlap, compute_uv=False).sum()
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def _square_root(sigma: np.ndarray) -> np.ndarray:
    """A factor F [D, rank] with F F^T = sigma; eigenvalues that are rounding noise are left out."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
