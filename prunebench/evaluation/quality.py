"""How good generated images are: distances between two sets of features.

Everything here works on features, so it is the same for every judge (see `features`).
"""

import numpy as np
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet_distance
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

KID_SEED = 2020  # torch-fidelity's default: the subsets drawn are the same in every cell
IS_SPLITS, IS_SEED = 10, 2020  # the published convention, in torch-fidelity's shuffled order


def statistics(features: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def reference_statistics(reference: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
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


def quality(
    generated: dict[str, Tensor],
    reference: dict[str, Tensor],
    labels: Tensor | None,
    *,
    kid_subsets: int = 20,
    kid_subset_size: int = 1000,
    prc_samples: int = 2048,
) -> dict[str, float | int | dict[str, str] | None]:
    """Compare the features of generated images with those of reference images.

    Args:
        generated: "features" [N, D] and, where the judge has them, "spatial" [N, S], "logits"
            [N, classes] of the data set and "imagenet_logits" [N, 1008], as `Extractor.extract`
            returns them.
        reference: the same of M real images; "mu" and "sigma" where more is known of the features.
        labels: int64 [N], the class each image was asked for; None for unconditional models.
        kid_subsets: random subsets KID is averaged over; the draw is fixed.
        kid_subset_size: images per subset, at most N and M.
        prc_samples: precision and recall (Kynkäänniemi et al., arXiv 1904.06991) depend on both
            sample sizes and are defined on equal ones: N, M and this, whichever is smallest,
            evenly spaced over each set. The number used is `prc_reference_samples`.

    Returns:
        fid, fid_cleanfid, kid, precision, recall, sfid, agreement, inception_score, unavailable,
        samples, reference_samples, prc_reference_samples. What the judge cannot give is None, and
        so is fid_cleanfid where clean-fid's matrix root fails. `unavailable` says why
        inception_score is None; it is empty where there is one.
    """
    ours, theirs = generated["features"], reference["features"]
    mine, yours = statistics(ours), reference_statistics(reference)
    count = min(len(ours), len(theirs), prc_samples)
    precision_recall = prc_features_to_metric(
        _evenly_spaced(ours, count), _evenly_spaced(theirs, count), verbose=False
    )
    score, reason = inception_score(generated.get("imagenet_logits"))
    return {
        "fid": frechet_distance(*mine, *yours),
        "fid_cleanfid": _cleanfid(*mine, *yours),
        "kid": _kid(ours, theirs, kid_subsets, kid_subset_size),
        "precision": precision_recall[KEY_METRIC_PRECISION],
        "recall": precision_recall[KEY_METRIC_RECALL],
        "sfid": _sfid(generated.get("spatial"), reference.get("spatial")),
        "agreement": _agreement(generated.get("logits"), labels),
        "inception_score": score,
        "unavailable": {"inception_score": reason} if reason else {},
        "samples": len(ours),
        "reference_samples": len(theirs),
        "prc_reference_samples": count,
    }


def inception_score(logits: Tensor | None) -> tuple[float | None, str]:
    """Inception score (Salimans et al., arXiv 1606.03498): mean over 10 splits.

    Args:
        logits: of Inception, without their bias as in the original code [N, 1008], or None.

    Returns:
        The score and "", or None and the reason why there is none. Weights without a logits layer
        have NaN there, which must not look like a result.
    """
    if logits is None:
        return None, "the judge is not Inception"
    if not logits.isfinite().all():
        return None, "the judge's weights have no logits layer: its logits are not finite"
    if len(logits) < IS_SPLITS:
        return None, f"fewer than {IS_SPLITS} images"
    return isc_features_to_metric(logits, IS_SPLITS, True, IS_SEED)[KEY_METRIC_ISC_MEAN], ""


def _square_root(sigma: np.ndarray) -> np.ndarray:
    """A factor F [D, rank] with F F^T = sigma; eigenvalues that are rounding noise are left out."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _cleanfid(*gaussians: np.ndarray) -> float | None:
    try:
        distance = float(cleanfid_frechet_distance(*gaussians))
    except ValueError:  # its root of a rank-deficient product may come out complex
        return None
    return distance if np.isfinite(distance) else None


def _kid(generated: Tensor, reference: Tensor, subsets: int, subset_size: int) -> float:
    """Kernel inception distance (Binkowski et al., arXiv 1801.01401), mean over fixed subsets."""
    result = kid_features_to_metric(
        generated,
        reference,
        kid_subsets=subsets,
        kid_subset_size=min(subset_size, len(generated), len(reference)),
        rng_seed=KID_SEED,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN]


def _sfid(generated: Tensor | None, reference: Tensor | None) -> float | None:
    """FID of spatial features (Nash et al., arXiv 2103.03841)."""
    if generated is None or reference is None:
        return None
    return frechet_distance(*statistics(generated), *statistics(reference))


def _agreement(logits: Tensor | None, labels: Tensor | None) -> float | None:
    """Fraction of images whose largest logit is the class that was asked for."""
    if logits is None or labels is None:
        return None
    return (logits.argmax(1) == labels).double().mean().item()


def _evenly_spaced(features: Tensor, count: int) -> Tensor:
    # Not the first ones: files sorted by class are common.
    return features[torch.arange(count) * len(features) // count]
