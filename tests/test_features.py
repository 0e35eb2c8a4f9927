"""Feature extractors: shapes, independence of the sample count, refusals; the domain classifier."""

import math

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from prunebench.errors import UserError
from prunebench.evaluation.classifier import DomainClassifier, accuracy, train_classifier
from prunebench.evaluation.features import DomainExtractor, load_extractor
from prunebench.evaluation.metrics import Evidence, Missing, evaluate
from prunebench.records.artefacts import write_tensors


def random_images(count: int, channels: int = 1, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def bright_halves(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise whose upper (class 0) or lower (class 1) half is brighter."""
    labels = torch.arange(count) % 2
    images = random_images(count).float() * 0.5
    for half in range(2):
        images[labels == half, :, 8 * half : 8 * half + 8] += 60
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    write_tensors(path, DomainClassifier().eval().state_dict())
    return path


def test_domain_is_a_torch_fidelity_extractor(weights):
    assert FEATURE_EXTRACTORS_REGISTRY["domain"] is DomainExtractor
    extractor = create_feature_extractor(
        "domain", ["features"], cuda=False, verbose=False, feature_extractor_weights_path=weights
    )
    assert extractor(random_images(3))[0].shape == (3, 64)


def test_domain_features_have_the_promised_shapes(weights):
    features = load_extractor("domain", weights).extract(random_images(5), batch=2)
    assert {name: list(value.shape) for name, value in features.items()} == {
        "features": [5, 64],
        "spatial": [5, 256],
        "logits": [5, 10],
    }
    assert all(value.dtype == torch.float32 for value in features.values())


def test_features_of_an_image_do_not_depend_on_the_sample_count(weights):
    extractor = load_extractor("domain", weights)
    images = random_images(70)
    whole, first = extractor.extract(images), extractor.extract(images[:3])
    for name, value in first.items():
        assert torch.equal(value, whole[name][:3])


def test_uint8_and_float_images_are_taken_alike(weights):
    model = DomainClassifier().eval()
    images = random_images(4)
    assert torch.equal(model(images)["logits"], model(images.float() / 127.5 - 1)["logits"])


def test_unknown_extractor_names_the_known_ones(weights):
    with pytest.raises(UserError, match="'vgg'; known: domain, inception-v3-compat"):
        load_extractor("vgg", weights)


def test_missing_weights_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_extractor("domain", tmp_path / "nothing.safetensors")


def test_another_models_weights_are_a_user_error(tmp_path):
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(UserError, match="not a domain classifier"):
        load_extractor("domain", path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "inception.pth"
    torch.save({"weight": print}, path)
    with pytest.raises(UserError, match="not a plain file of tensors"):
        load_extractor("inception-v3-compat", path)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """Untrained weights in torch-fidelity's own format: names and shapes are what is tested."""
    path = tmp_path / "inception.pth"
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, path)
        torch.manual_seed(0)
        state = load_extractor("inception-v3-compat", path).module.state_dict()
    torch.save(state, path)
    return path


def test_inception_reads_local_weights_and_grey_images(inception):
    features = load_extractor("inception-v3-compat", inception).extract(random_images(1), batch=1)
    assert {name: list(value.shape) for name, value in features.items()} == {
        "features": [1, 2048],
        "spatial": [1, 7 * 17 * 17],
        "imagenet_logits": [1, 1008],
    }


def test_inception_without_logits_gives_every_metric_but_its_score(inception):
    """The layout of the pool-only weights: fc is NaN. With logits there is a score."""
    images = random_images(20, channels=3, size=32)
    whole = load_extractor("inception-v3-compat", inception).extract(images, batch=10)
    state = torch.load(inception, weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        state[name].fill_(math.nan)
    torch.save(state, inception)
    bare = load_extractor("inception-v3-compat", inception).extract(images, batch=10)
    assert torch.equal(bare["features"], whole["features"])
    with_logits = evaluate(Evidence(generated=whole, reference=bare))
    without = evaluate(Evidence(generated=bare, reference=bare))
    assert 1 <= with_logits["inception_score"] < 1008
    assert isinstance(without["inception_score"], Missing)
    assert "no logits layer" in without["inception_score"].reason
    for name in ("fid", "kid", "precision", "recall", "sfid"):
        assert math.isfinite(without[name]), name


def test_training_learns_repeats_and_leaves_the_random_state_alone():
    images, labels = bright_halves(256)
    options = {"epochs": 3, "batch": 32, "learning_rate": 1e-2}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    lines = []
    first = train_classifier(images, labels, seed=1, log=lines.append, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert len(lines) == 3
    assert accuracy(first, images, labels) > 0.95
    again = train_classifier(images, labels, seed=1, **options).state_dict()
    other = train_classifier(images, labels, seed=2, **options).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.head.weight, other["head.weight"])


def test_the_state_alone_rebuilds_the_classifier():
    model = DomainClassifier(channels=3, classes=7).eval()
    rebuilt = DomainClassifier.from_state(model.state_dict())
    images = random_images(2, channels=3)
    assert torch.equal(model(images)["logits"], rebuilt(images)["logits"])
