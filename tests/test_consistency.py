"""Paired distances: exact values for equal, shifted and inverted images."""

import lpips
import pytest
import torch

from prunebench.errors import UserError
from prunebench.evaluation import metrics
from prunebench.evaluation.classifier import DomainClassifier
from prunebench.evaluation.metrics import Evidence, Missing, evaluate
from prunebench.evaluation.perceptual import perceptual_distance
from prunebench.records.artefacts import write_tensors


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (6, 1, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return DomainClassifier().eval()


@pytest.fixture(scope="module")
def weights(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    write_tensors(path, classifier.state_dict())
    return path


@pytest.fixture(scope="module")
def distance(weights):
    return perceptual_distance("domain", weights)


@pytest.fixture(scope="module")
def compare(weights):
    """LPIPS, SSIM and PSNR of images and dense's."""

    def compared(images: torch.Tensor, dense: torch.Tensor, lpips: str = "domain") -> dict:
        features = {"features": torch.eye(8)}
        evidence = Evidence(
            generated=features,
            reference=features,
            images=images,
            dense_images=dense,
            settings={"lpips": lpips},
            extractor=weights,
        )
        return {name: evaluate(evidence)[name] for name in ("lpips", "ssim", "psnr")}

    return compared


def test_equal_images(images, compare):
    found = compare(images, images)
    assert found["lpips"] == 0
    assert found["ssim"] == pytest.approx(1, abs=1e-7)
    assert found["psnr"] == Missing("infinite: the images are dense's own")
    assert "evaluation.lpips" in compare(images, images, "none")["lpips"].reason


def test_psnr_is_pooled_over_images(images, compare, monkeypatch):
    """Half of the images off by 51 = 255/5 everywhere: MSE 1/50 of the range squared."""
    monkeypatch.setattr(metrics, "PAIRS", 4)
    shifted = images.clone()
    shifted[:3] += 51
    found = compare(shifted, images)
    assert found["psnr"] == pytest.approx(10 * torch.tensor(50.0).log10().item(), rel=1e-6)
    assert found["lpips"] > 0


def test_ssim_of_constant_images_in_closed_form(compare):
    """No variance: only the luminance term (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2, is left."""
    black, white = (torch.full((2, 1, 16, 16), value, dtype=torch.uint8) for value in (51, 204))
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert compare(black, white)["ssim"] == pytest.approx(expected, rel=1e-3)


def test_batches_do_not_matter(images, compare, monkeypatch):
    other = images.flip(0)
    whole = compare(images, other)
    monkeypatch.setattr(metrics, "PAIRS", 4)
    assert compare(images, other) == pytest.approx(whole, rel=1e-5)


def test_domain_distance_is_the_baseline_of_the_paper(images, classifier, distance):
    """Sum over maps of the mean over pixels of |x/|x| - y/|y||^2, by hand."""
    ours, dense = images.float() / 127.5 - 1, images.flip(0).float() / 127.5 - 1
    unit = torch.nn.functional.normalize
    expected = sum(
        (unit(one) - unit(two)).square().sum(1).mean((1, 2))
        for one, two in zip(classifier.maps(ours), classifier.maps(dense), strict=True)
    )
    assert torch.allclose(distance(ours, dense), expected, rtol=1e-4)


def test_alex_takes_its_backbone_from_a_file(tmp_path):
    torch.manual_seed(0)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = {
        f"features.{key.split('.', 1)[1]}": value
        for key, value in reference.net.state_dict().items()
    }
    torch.save(state, tmp_path / "alex.pth")
    distance = perceptual_distance("alex", tmp_path / "alex.pth")
    ours, dense = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    assert torch.equal(distance(ours, dense), reference(ours, dense).flatten())
    assert distance(ours[:, :1], dense[:, :1]).shape == (2,)


def test_refusals(images, compare, tmp_path):
    with pytest.raises(UserError, match="'vgg19'; known: domain, alex, vgg"):
        perceptual_distance("vgg19", tmp_path)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="it lacks features"):
        perceptual_distance("alex", tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="unpaired"):
        compare(images, images[:3])
