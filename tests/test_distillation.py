"""The losses of guided, masked and Jacobian-matching distillation."""

import dataclasses

import pytest
import tiny
import torch
from test_recovery import _batch, _drawn, _student, _teaching
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunebench.diffusion.objectives import NoisePrediction
from prunebench.recovery import cfg_kd, feature_kd, jacobian_kd, masked_kd, output_kd
from prunebench.recovery.guidance import GUIDANCE
from prunebench.recovery.masked_kd import masked_error, usual
from prunebench.training import loop

# Guided.


@pytest.mark.parametrize("instance", ["dit", "dit_sigma", "sit", "sdxl"])
def test_the_guided_term_is_the_error_of_guided_predictions(instance):
    teaching, student = _teaching(instance, "block"), _student(instance, "block")
    loss = cfg_kd.loss(teaching, p=1.0, low=3.0, high=3.0, weight=0.5)
    batch = _drawn(loss, _batch(instance))
    nothing = dataclasses.replace(batch, y=teaching.conditions.nothing(batch.y, student))
    errors = []
    for asked in (batch, nothing):
        with torch.no_grad():
            own, their = loop.predict(student, asked), loop.predict(teaching.teacher, asked)
        errors.append(own - their)
    expected = (3 * errors[0] - 2 * errors[1]).square().mean()
    plain = feature_kd.loss(teaching)(student, batch)
    assert (loss(student, batch) - plain).item() == pytest.approx(0.5 * expected.item(), rel=1e-3)


def test_without_features_and_at_w_1_the_guided_term_is_output_distillation_again():
    teaching, student, batch = _teaching("dit", "block"), _student("dit", "block"), _batch("dit")
    loss = cfg_kd.loss(teaching, p=1.0, low=1.0, high=1.0, features=False)
    output = output_kd.loss(teaching)(student, batch)
    own = loop.own_loss(student, batch)
    assert loss(student, _drawn(loss, batch)).item() == pytest.approx(
        (2 * output - own).item(), rel=1e-5
    )
    never = cfg_kd.loss(teaching, p=0.0, features=False)
    assert GUIDANCE not in _drawn(never, batch).drawn
    assert torch.equal(never(student, _drawn(never, batch)), output)


# Masked.


def test_a_massive_activation_counts_only_through_mean_and_deviation():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 6, 8, generator=generator).unbind()
    massive = teacher.clone()
    massive[0, 0, 0] = 1e4
    kept = usual(massive, 2.0)
    assert kept[0, 0, 0] == 0 and torch.equal(kept[0, 1:], massive[0, 1:])
    plain = (massive - student).square().mean()
    assert masked_error(massive, student, 2.0) < 1e-4 * plain
    assert masked_error(teacher, teacher, 2.0) == 0
    assert masked_error(teacher, student, 1e9).item() == pytest.approx(
        (teacher - student).square().mean().item()
    )
    hidden = torch.arange(16.0).view(1, 16)  # mean 7.5, deviation 4.61: 5 to 10 lie within 0.6
    assert usual(hidden, 0.6).nonzero()[:, 1].tolist() == [5, 6, 7, 8, 9, 10]


def test_hidden_states_count_less_and_less():
    teaching, student, batch = _teaching("dit", "block"), _student("dit", "block"), _batch("dit")
    loss = masked_kd.loss(teaching, beta=1.0)
    begun, half, over = (
        loss(student, dataclasses.replace(batch, done=done)).item() for done in (0.0, 0.5, 1.0)
    )
    own, output = (value(student, batch) for value in (loop.own_loss, output_kd.loss(teaching)))
    assert over == pytest.approx((0.9 * (output - own) + 0.1 * own).item(), rel=1e-4)
    assert half - over == pytest.approx((begun - over) / 2, rel=1e-4) and begun > over


def test_the_training_says_how_far_it_is():
    seen = []

    def loss(model, batch):
        seen.append((batch.done, batch.rows(range(2)).done))
        return loop.own_loss(model, batch)

    loop.train(tiny.dense("dit"), tiny.data("dit"), tiny.settings(), images=32, seed=0,
               muon_names=[], loss=loss)  # fmt: skip
    assert seen == [(step / 4, step / 4) for step in range(4)]


def test_a_students_variance_is_held_to_its_teachers():
    """0 for equal outputs, and for others the divergence of two Gaussians, written out."""
    goal, generator = NoisePrediction(), torch.Generator().manual_seed(0)
    own, their = torch.randn(2, 2, 2, 4, 4, generator=generator).unbind()
    noised, t = torch.randn(2, 1, 4, 4, generator=generator), torch.tensor([10, 600])
    assert goal.variance_apart(own, own, noised, t) == 0
    abar = goal.scheduler.alphas_cumprod.double()
    before = abar[t - 1].view(-1, 1, 1, 1)
    now = abar[t].view(-1, 1, 1, 1)
    beta = 1 - now / before
    means, logs = [], []
    for found in (own.double(), their.double()):
        noise, v = found.chunk(2, 1)
        image = (noised - (1 - now).sqrt() * noise) / now.sqrt()
        means.append(before.sqrt() * beta / (1 - now) * image)
        low, high = (beta * (1 - before) / (1 - now)).log(), beta.log()
        logs.append(low + (v + 1) / 2 * (high - low))
    apart = 0.5 * (
        logs[0] - logs[1] - 1 + (logs[1] - logs[0]).exp()
        + (means[0] - means[1]).square() / logs[0].exp()
    )  # fmt: skip
    expected = apart.mean() / torch.log(torch.tensor(2.0))
    assert goal.variance_apart(own, their, noised, t).item() == pytest.approx(expected.item(), 1e-3)


# Jacobians.


class Linear(nn.Module):
    """x -> A x over all entries: its Jacobian is A."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(16, 16, generator=generator))

    def forward(self, x, t, y):
        return (x.flatten(1) @ self.weight.T).view_as(x)


def test_of_linear_maps_the_jacobian_term_is_known():
    student, teacher = Linear(1), Linear(2).requires_grad_(False)
    batch = dataclasses.replace(
        _batch("dit"),
        noised=torch.randn(4, 1, 4, 4),
        target=torch.randn(4, 1, 4, 4),
        noise=torch.randn(4, 1, 4, 4),
    )
    teaching = dataclasses.replace(_teaching("dit"), teacher=teacher)
    losses = [jacobian_kd.loss(teaching, weight=weight) for weight in (0.0, 1.0)]
    batch = _drawn(losses[0], batch)
    v = batch.drawn[jacobian_kd.DIRECTION].flatten(1)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(4))
    assert not torch.allclose(v[0], v[1])
    own, their = ((v @ m.weight).square().sum(1) for m in (student, teacher))
    expected = (own - their).square().mean() / 16
    without, with_it = (loss(student, batch) for loss in losses)
    assert (with_it - without).item() == pytest.approx(expected.item(), rel=1e-3)
    found = torch.autograd.grad(with_it - without, student.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, student.weight)[0],
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_sensitivity_is_that_of_finite_differences():
    """J^T v of a network, one entry at a time."""
    model, batch = tiny.dense("dit").double(), _batch("dit", 1)
    batch = dataclasses.replace(batch, noised=batch.noised.double().requires_grad_(True))
    v = torch.randn(batch.noised.shape, dtype=torch.double)
    drawn = dataclasses.replace(batch, drawn={jacobian_kd.DIRECTION: v})
    with sdpa_kernel(SDPBackend.MATH):
        found = jacobian_kd.sensitivity(loop.predict(model, drawn), drawn, create_graph=False)
    steps, eps = [], 1e-5
    with torch.no_grad():
        for index in range(batch.noised.numel()):
            move = torch.zeros_like(v).view(-1)
            move[index] = eps
            sides = [
                (loop.predict(model, dataclasses.replace(batch, noised=batch.noised + side))
                 * v).sum() for side in (move.view_as(v), -move.view_as(v))
            ]  # fmt: skip
            steps.append((sides[0] - sides[1]) / (2 * eps))
    assert found.item() == pytest.approx(torch.stack(steps).square().sum().item(), rel=1e-4)
