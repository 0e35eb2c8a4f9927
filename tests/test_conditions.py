"""What images are asked for, where it is more than a class."""

import pytest
import tiny
import torch
from torch import nn

from prunebench.diffusion.objectives import NoisePrediction
from prunebench.diffusion.sampling import Sampler, shrunk
from prunebench.evaluation.semi_structured import Half
from prunebench.models.conditions import CLASSES, dropped
from prunebench.training import loop


class Words:
    """A condition of two tensors that both tell the label; nothing is -1."""

    def of(self, labels):
        labels = labels.float()
        return {"context": labels.view(-1, 1, 1).expand(-1, 2, 3), "pooled": labels.view(-1, 1)}

    def nothing(self, asked, model):
        return {name: torch.full_like(value, -1) for name, value in asked.items()}


class Echo(nn.Module):
    """Predicts the labels that it finds in both tensors."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, t, y):
        assert torch.equal(y["context"][:, 0, 0], y["pooled"][:, 0])
        return self.scale * y["pooled"].view(-1, 1, 1, 1).expand_as(x).to(x.dtype)


def _data() -> loop.Data:
    images = torch.zeros(16, 1, 2, 2, dtype=torch.uint8)
    return loop.Data(images, torch.arange(16), NoisePrediction(), conditions=Words())


def test_every_tensor_of_a_condition_is_drawn_sliced_and_dropped():
    batch = _data().draw(8, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert batch.y["context"].shape == (8, 2, 3)
    part = batch.rows(range(2, 5))
    assert part.y["pooled"].tolist() == batch.y["pooled"][2:5].tolist() and len(part.x0) == 3
    chosen = torch.tensor([True, False] * 4)
    y = dropped(Words(), batch.y, Echo(), chosen)
    assert (y["context"][::2] == -1).all() and (y["pooled"][::2] == -1).all()
    assert torch.equal(y["context"][1::2], batch.y["context"][1::2])
    classes = torch.arange(4)
    assert dropped(CLASSES, classes, tiny.dense("dit"), classes > 1).tolist() == [0, 1, 10, 10]


def test_training_drops_conditions_and_halves_batches_of_them():
    seen = []

    def loss(model, batch):
        seen.append(batch.y["pooled"].flatten().tolist())
        if len(batch.x0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loop.own_loss(model, batch)

    settings = tiny.settings(batch=8, class_dropout=0.5)
    loop.train(Echo(), _data(), settings, images=8, seed=0, muon_names=[], loss=loss)
    assert [len(part) for part in seen] == [8, 4, 2, 2, 2, 2]
    assert [label for part in seen[2:] for label in part] == seen[0] and 0 < seen[0].count(-1) < 8


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_leads_away_from_nothing(guidance):
    settings = {"sampler": "ddim", "steps": 2, "lanes": 4, "guidance": guidance}
    sampler = Sampler(Echo(), NoisePrediction(), (1, 2, 2), 5, settings, conditions=Words())
    with torch.no_grad():
        predicted = sampler.predict(
            torch.zeros(3, 1, 2, 2), torch.ones(3), sampler.asked(range(4, 7))
        )
    expected = [-1 + guidance * (label + 1) for label in (4, 0, 1)]
    assert predicted[:, 0, 0, 0].tolist() == pytest.approx(expected)
    whole = torch.cat(list(sampler.images(0, 0, 10, 10)))
    assert torch.equal(torch.cat(list(sampler.images(0, 0, 10, 3))), whole)


def test_half_precision_takes_conditions_of_single_precision():
    model = Half(tiny.dense("flux"), torch.bfloat16)
    x, t, y = tiny.inputs("flux", 2)
    assert model(x, t, y).dtype == torch.float32  # classes are no numbers to round
    model = Half(Echo(), torch.bfloat16)
    assert model(x, t, Words().of(torch.tensor([1, 2]))).dtype == torch.float32


def test_images_are_kept_at_a_smaller_size():
    images = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(shrunk(images, 4), images[:, :, :4, :4])
    assert shrunk(images, None) is images and shrunk(images, 8) is images
