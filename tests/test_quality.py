"""Distances between feature sets: closed forms, agreement with two other implementations."""

import math

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet_distance
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import isc_featuresdict_to_metric

from prunebench.evaluation.quality import frechet_distance, inception_score, quality, statistics


def correlated(count: int, dimensions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    samples = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return samples @ mixing + seed


def test_statistics_are_float64_mean_and_unbiased_covariance():
    mean, covariance = statistics(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert mean.dtype == covariance.dtype == np.float64
    assert mean.tolist() == [1, 2]
    assert covariance.tolist() == [[2, 4], [4, 8]]


def test_frechet_of_diagonal_gaussians_in_closed_form():
    """sum (m1 - m2)^2 + (s1 - s2)^2 = (9 + 16) + (1 + 4)."""
    distance = frechet_distance(
        np.array([0.0, 0.0]), np.diag([4.0, 9.0]), np.array([3.0, 4.0]), np.diag([1.0, 25.0])
    )
    assert distance == pytest.approx(30, rel=1e-14)


def test_frechet_of_gaussians_that_do_not_commute():
    """In 2D tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)): here sqrt(8 + 2 sqrt 9)."""
    A, B = np.array([[2.0, 1.0], [1.0, 2.0]]), np.diag([1.0, 3.0])
    expected = 4 + 4 - 2 * np.sqrt(14)
    assert frechet_distance(np.zeros(2), A, np.zeros(2), B) == pytest.approx(expected, rel=1e-13)


def test_frechet_equals_torch_fidelity_and_cleanfid():
    one, two = correlated(500, 24, 1), correlated(400, 24, 2)
    ours = frechet_distance(*statistics(one), *statistics(two))
    stats = [fid_features_to_statistics(features) for features in (one, two)]
    assert ours == pytest.approx(fid_statistics_to_metric(*stats, False)[KEY_METRIC_FID], rel=1e-8)
    cleanfid = cleanfid_frechet_distance(*statistics(one), *statistics(two))
    assert ours == pytest.approx(cleanfid, rel=1e-8)


@pytest.mark.parametrize("count", [500, 10])
def test_frechet_of_a_set_with_itself_is_zero(count):
    """Also with fewer samples than dimensions, where the covariance has no full rank."""
    gaussian = statistics(correlated(count, 24, 3))
    assert frechet_distance(*gaussian, *gaussian) == pytest.approx(0, abs=1e-8)


def test_frechet_of_rank_deficient_covariances():
    """Two lines at 60 degrees: tr (AB)^(1/2) = |cos 60|, so 1 + 1 - 2 / 2 = 1."""
    one, two = np.array([1.0, 0, 0]), np.array([0.5, np.sqrt(0.75), 0])
    distance = frechet_distance(np.zeros(3), np.outer(one, one), np.zeros(3), np.outer(two, two))
    assert distance == pytest.approx(1, rel=1e-12)
    point = np.zeros((3, 3))
    assert frechet_distance(one, point, np.zeros(3), point) == 1


@pytest.fixture
def features():
    def build(count: int, seed: int) -> dict[str, torch.Tensor]:
        values = correlated(count, 8, seed).float()
        return {
            "features": values,
            "spatial": values[:, :4],
            "logits": values[:, :3],
            "imagenet_logits": values[:, 3:],
        }

    return build


def test_quality_has_every_key_of_the_schema(features):
    generated, reference = features(60, 1), features(90, 2)
    result = quality(generated, reference, torch.zeros(60, dtype=torch.int64))
    assert list(result) == [
        "fid", "fid_cleanfid", "kid", "precision", "recall", "sfid", "agreement",
        "inception_score", "unavailable", "samples", "reference_samples", "prc_reference_samples",
    ]  # fmt: skip
    assert result.pop("unavailable") == {}
    assert all(isinstance(value, float | int) for value in result.values())
    assert (result["samples"], result["reference_samples"]) == (60, 90)
    assert result["prc_reference_samples"] == 60
    assert result["fid"] == pytest.approx(result["fid_cleanfid"], rel=1e-8)


def test_quality_is_repeatable(features):
    np.random.seed(0)
    first = quality(features(60, 1), features(90, 2), None)
    np.random.seed(1)
    assert quality(features(60, 1), features(90, 2), None) == first


def test_quality_of_the_reference_itself(features):
    reference = features(80, 1)
    result = quality(reference, reference, reference["logits"].argmax(1))
    assert result["fid"] == pytest.approx(0, abs=1e-8)
    assert result["sfid"] == pytest.approx(0, abs=1e-8)
    assert (result["precision"], result["recall"], result["agreement"]) == (1, 1, 1)


def test_precision_counts_generated_images_and_recall_real_ones():
    """Generated: one of the two real clusters. All look real; half of the real ones are covered."""
    grid = torch.linspace(0, 1, 40)[:, None].expand(-1, 2)
    real = torch.cat([grid[::2], grid[::2] + 100])
    result = quality({"features": grid}, {"features": real}, None)
    assert (result["precision"], result["recall"]) == (1, 0.5)


def test_agreement_counts_the_classes_asked_for(features):
    generated = features(4, 1) | {"logits": torch.eye(4)}
    result = quality(generated, features(9, 2), torch.tensor([0, 1, 2, 0]))
    assert result["agreement"] == 0.75


def test_inception_score_equals_torch_fidelity():
    logits = correlated(100, 20, 4).float()
    theirs = isc_featuresdict_to_metric(
        {"logits_unbiased": logits},
        "logits_unbiased",
        isc_splits=10,
        samples_shuffle=True,
        rng_seed=2020,
        verbose=False,
    )
    assert inception_score(logits) == (theirs["inception_score_mean"], "")


def test_inception_score_of_sure_and_varied_images_is_the_number_of_classes():
    """Sure of 4 classes, each in every split: exp(entropy 0 against log 4); unsure of all: 1."""
    sure = 1000.0 * torch.eye(4).repeat(4000, 1)
    assert inception_score(sure)[0] == pytest.approx(4, rel=5e-3)
    assert inception_score(torch.zeros(50, 4)) == (1, "")


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (None, "the judge is not Inception"),
        (torch.full((50, 8), math.nan), "no logits layer"),
        (torch.zeros(9, 8), "fewer than 10 images"),
    ],
)
def test_without_logits_there_is_no_inception_score_but_a_reason(features, logits, reason):
    generated = features(60, 1) | {"imagenet_logits": logits}
    result = quality(generated, features(90, 2), None)
    assert result["inception_score"] is None
    assert reason in result["unavailable"]["inception_score"]
    assert np.isfinite(result["fid"])


def test_what_the_judge_lacks_is_none(features):
    bare = {"features": features(30, 1)["features"]}
    result = quality(bare, bare, torch.zeros(30, dtype=torch.int64))
    assert result["sfid"] is None
    assert result["agreement"] is None


def test_fewer_samples_than_dimensions_still_give_a_fid(features):
    result = quality(features(6, 1), features(90, 2), None)
    assert np.isfinite(result["fid"])
    assert result["fid"] > 0


def test_statistics_of_the_reference_come_before_those_of_its_images():
    features = correlated(64, 8, 0)
    mu, sigma = statistics(correlated(64, 8, 1))
    known = {"features": features, "mu": torch.tensor(mu), "sigma": torch.tensor(sigma)}
    options = {"kid_subsets": 1, "kid_subset_size": 10}
    with_, without = (
        quality({"features": features}, reference, None, **options)
        for reference in (known, {"features": features})
    )
    assert with_["fid"] == frechet_distance(*statistics(features), mu, sigma) > 0.1
    assert without["fid"] == pytest.approx(0, abs=1e-6)
    assert with_["kid"] == without["kid"]
