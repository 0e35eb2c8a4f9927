"""Paired distances: exact values for equal, shifted and inverted images."""

import lpips
import pytest
import torch

from prunebench.errors import UserError
from prunebench.evaluation.classifier import DomainClassifier
from prunebench.evaluation.consistency import consistency, perceptual_distance
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
def distance(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    write_tensors(path, classifier.state_dict())
    return perceptual_distance("domain", path)


def test_equal_images(images, distance):
    result = consistency(images, images, distance)
    assert result["lpips"] == 0
    assert result["ssim"] == pytest.approx(1, abs=1e-7)
    assert result["psnr"] is None


def test_psnr_is_pooled_over_images(images, distance):
    """Half of the images off by 51 = 255/5 everywhere: MSE 1/50 of the range squared."""
    shifted = images.clone()
    shifted[:3] += 51
    result = consistency(shifted, images, distance, batch=4)
    assert result["psnr"] == pytest.approx(10 * torch.tensor(50.0).log10().item(), rel=1e-6)
    assert result["lpips"] > 0


def test_ssim_of_constant_images_in_closed_form(distance):
    """No variance: only the luminance term (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2, is left."""
    black, white = (torch.full((2, 1, 16, 16), value, dtype=torch.uint8) for value in (51, 204))
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert consistency(black, white, distance)["ssim"] == pytest.approx(expected, rel=1e-3)


def test_batches_do_not_matter(images, distance):
    other = images.flip(0)
    whole, parts = (consistency(images, other, distance, batch) for batch in (6, 4))
    assert whole == pytest.approx(parts, rel=1e-5)


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


def test_refusals(images, distance, tmp_path):
    with pytest.raises(UserError, match="'vgg19'; known: domain, alex, vgg"):
        perceptual_distance("vgg19", tmp_path)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="it lacks features"):
        perceptual_distance("alex", tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="unpaired"):
        consistency(images, images[:3], distance)
