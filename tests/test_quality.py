"""Metrics: closed forms, agreement with other implementations; one entry each."""

import math
import subprocess
import sys

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
from torch_fidelity.metric_kid import kid_featuresdict_to_metric

from prunebench.errors import UserError
from prunebench.evaluation import metrics
from prunebench.evaluation.frechet import frechet_distance, statistics
from prunebench.evaluation.metrics import (
    Evidence,
    Metric,
    Missing,
    evaluate,
    inception_score,
    kid,
    precision,
)


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


def of(generated: dict, reference: dict, labels: torch.Tensor | None = None) -> dict:
    return evaluate(Evidence(generated=generated, reference=reference, labels=labels))


def test_every_metric_is_a_number_or_says_why_not(features):
    found = of(features(60, 1), features(90, 2), torch.zeros(60, dtype=torch.int64))
    assert list(found) == list(metrics.metrics())
    missing = {name for name, value in found.items() if isinstance(value, Missing)}
    assert missing == {"clip_score", "lpips", "ssim", "psnr"}  # without images
    assert all(found[name].reason for name in missing)
    assert all(math.isfinite(found[name]) for name in set(found) - missing)
    assert found["fid"] == pytest.approx(found["fid_cleanfid"], rel=1e-8)


def test_metrics_are_repeatable(features):
    np.random.seed(0)
    first = of(features(60, 1), features(90, 2))
    np.random.seed(1)
    assert of(features(60, 1), features(90, 2)) == first


def test_the_reference_itself(features):
    reference = features(80, 1)
    found = of(reference, reference, reference["logits"].argmax(1))
    assert found["fid"] == pytest.approx(0, abs=1e-8)
    assert found["sfid"] == pytest.approx(0, abs=1e-8)
    assert (found["precision"], found["recall"], found["agreement"]) == (1, 1, 1)


def test_precision_counts_generated_images_and_recall_real_ones():
    """Generated: one of the two real clusters. All look real; half of the real ones are covered."""
    grid = torch.linspace(0, 1, 40)[:, None].expand(-1, 2)
    real = torch.cat([grid[::2], grid[::2] + 100])
    found = of({"features": grid}, {"features": real})
    assert (found["precision"], found["recall"]) == (1, 0.5)


def test_precision_and_recall_compare_equal_counts_evenly_spaced_and_once(features, monkeypatch):
    monkeypatch.setattr(precision, "SAMPLES", 30)
    generated, reference = features(60, 1), features(90, 2)
    both = Evidence(generated=generated, reference=reference)
    assert precision.compared(both) == 30
    spaced = [
        {"features": f["features"][:: len(f["features"]) // 30]} for f in (generated, reference)
    ]
    found, expected = evaluate(both), of(*spaced)
    for name in ("precision", "recall"):
        assert found[name] == expected[name]
    assert len(both._found) == 1


def test_kid_equals_torch_fidelity(features, monkeypatch):
    monkeypatch.setattr(kid, "SUBSET_SIZE", 50)
    generated, reference = features(60, 1), features(90, 2)
    theirs = kid_featuresdict_to_metric(
        {"x": generated["features"]},
        {"x": reference["features"]},
        "x",
        kid_subsets=20,
        kid_subset_size=50,
        rng_seed=2020,
        verbose=False,
    )
    found = of(generated, reference)["kid"]
    assert found == theirs["kernel_inception_distance_mean"]


def test_agreement_counts_the_classes_asked_for(features):
    generated = features(4, 1) | {"logits": torch.eye(4)}
    found = of(generated, features(9, 2), torch.tensor([0, 1, 2, 0]))
    assert found["agreement"] == 0.75


def _inception_score(logits: torch.Tensor | None) -> float | Missing:
    return inception_score.compute(Evidence(generated={"imagenet_logits": logits}, reference={}))


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
    assert _inception_score(logits) == theirs["inception_score_mean"]


def test_inception_score_of_sure_and_varied_images_is_the_number_of_classes():
    """Sure of 4 classes, each in every split: exp(entropy 0 against log 4); unsure of all: 1."""
    sure = 1000.0 * torch.eye(4).repeat(4000, 1)
    assert _inception_score(sure) == pytest.approx(4, rel=5e-3)
    assert _inception_score(torch.zeros(50, 4)) == 1


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (None, "the feature extractor is not Inception"),
        (torch.full((50, 8), math.nan), "no logits layer"),
        (torch.zeros(9, 8), "fewer than 10 images"),
    ],
)
def test_without_logits_there_is_no_inception_score_but_a_reason(logits, reason):
    assert reason in _inception_score(logits).reason


def test_what_the_extractor_lacks_is_missing(features):
    bare = {"features": features(30, 1)["features"]}
    found = of(bare, bare, torch.zeros(30, dtype=torch.int64))
    assert found["sfid"] == Missing("the feature extractor has no spatial features")
    assert "does not know the data set's classes" in found["agreement"].reason


def test_fewer_samples_than_dimensions_still_give_a_fid(features):
    assert 0 < of(features(6, 1), features(90, 2))["fid"] < math.inf


def test_a_value_that_is_no_number_is_missing(features):
    generated = features(30, 1)
    generated["spatial"] = torch.full((30, 1), 1e200, dtype=torch.float64)
    assert (
        "not a finite number"
        in of(generated, features(90, 2) | {"spatial": torch.zeros(9, 1)})["sfid"].reason
    )


def test_statistics_of_the_reference_come_before_those_of_its_images():
    features = correlated(64, 8, 0)
    mu, sigma = statistics(correlated(64, 8, 1))
    known = {"features": features, "mu": torch.tensor(mu), "sigma": torch.tensor(sigma)}
    with_, without = (
        of({"features": features}, reference) for reference in (known, {"features": features})
    )
    assert with_["fid"] == frechet_distance(*statistics(features), mu, sigma) > 0.1
    assert without["fid"] == pytest.approx(0, abs=1e-6)
    assert with_["kid"] == without["kid"]


# Entries.


@pytest.mark.parametrize("metric", metrics.metric_names())
def test_an_entry_can_be_printed(metric):
    entry = metrics.metric(metric)
    assert isinstance(entry, Metric) and entry.label and entry.help
    assert entry.better in ("lower", "higher", "")
    assert entry.format == "sig" or format(1.0, entry.format)


def test_entries_are_light():
    """Tracks and leaderboards read them without torch."""
    script = (
        "import sys; from prunebench.evaluation import metrics; metrics.metrics();"
        "print([m for m in ('torch', 'numpy', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert done.strip() == "[]"


def test_an_unknown_metric_has_a_nearest():
    with pytest.raises(UserError, match="unknown metric 'ssmi'; did you mean 'ssim'"):
        metrics.metric("ssmi")
    with pytest.raises(UserError, match="unknown metric 'quality'; known: agreement, clip_score"):
        metrics.metric("quality")


def test_what_a_metric_cannot_work_with_is_known_without_computing():
    lpips = metrics.metric("lpips")
    assert lpips.refusal({"lpips": "alex"}, 32) is lpips.refusal({"lpips": "none"}, 4) is None
    assert "'alex' needs 32 pixels a side, images have 16" in lpips.refusal({"lpips": "alex"}, 16)
    assert "unknown network 'vgg19'" in lpips.refusal({"lpips": "vgg19"}, 64)
    assert "SSIM needs 6" in metrics.metric("ssim").refusal({}, 5)
    assert lpips.weights({"lpips": "vgg"}) == "lpips-vgg"
    assert lpips.weights({"lpips": "domain"}) is None
    assert metrics.metric("clip_score").weights({"clip": "clip_vit_b16"}) == "clip_vit_b16"


@pytest.mark.parametrize("metric", metrics.metric_names())
def test_the_least_images_are_enough(features, metric):
    """Also for each other: no metric fails on as many images as one of them needs."""
    least = metrics.metric(metric).least_images
    found = metrics._module(metric).compute(
        Evidence(generated=features(least, 1), reference=features(least, 2))
    )
    assert isinstance(found, Missing | float)


def test_the_metric_of_the_docs_takes_one_file(added):
    """Both reference clusters have 6 images; the generated ones are at one of them."""
    added("docs/add_a_metric.md", metrics, "coverage.py")
    near = torch.arange(6.0)[:, None]
    found = of({"features": near + 0.1}, {"features": torch.cat([near, near + 100])})
    assert found["coverage"] == 0.5
    assert list(found)[-1] == "coverage" and metrics.metric("coverage").label == "Coverage"
