"""Gradients through a sampler in the memory of one step: exact, metered, and counted in bytes."""

import weakref
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunebench.diffusion.objectives import FlowMatching, NoisePrediction, objective
from prunebench.diffusion.sampling import Sampler
from prunebench.diffusion.trajectory import Trajectory
from prunebench.errors import CellError
from prunebench.models.activations import checkpoint_activations
from prunebench.training.budget import BudgetMeter

SEEDS = [3, 4]
NOISE, FLOW = ("ddim", "ddpm", "dpm-solver++", "pndm"), ("euler", "heun", "euler-maruyama")
CASES = [
    (name, steps)
    for name in NOISE + FLOW
    for steps in (1, 3, 10)
    # What cannot sample in one step.
    if steps > 1 or name not in ("ddpm", "pndm", "euler-maruyama")
]


class Toy(nn.Module):
    """A network on [4, 2, 2] whose hidden units are multiplied by a mask."""

    null_class = 10

    def __init__(self, hidden: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(11, hidden)
            self.first, self.last = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.mask = torch.ones(hidden)

    def forward(self, x, t, y):
        inner = (self.first(x.flatten(1)) + self.table(y) + 1e-3 * t.unsqueeze(1)).tanh()
        return self.last(inner.tanh().square() * self.mask).view_as(x)


class Masked:
    """A toy with scores; every prediction draws masks of them from one generator."""

    def __init__(
        self,
        name: str,
        steps: int,
        recompute: bool = True,
        named: bool = True,
        hidden: int = 8,
        **more: object,
    ):
        self.model, self.generator = Toy(hidden), torch.Generator().manual_seed(7)
        self.scores = torch.linspace(-1, 1, hidden, requires_grad=True)
        goal = NoisePrediction() if name in NOISE else FlowMatching()
        # Spacings that visit noisy times in one step; no clipping, whose gradient is often zero.
        options = {"ddim": {"clip_sample": False}, "ddpm": {"clip_sample": False}}.get(name, {})
        settings = {"sampler": name, "steps": steps, "options": options, **more}
        own = {"around": self.masks, "generators": [self.generator] if named else []}
        kind, given = (Trajectory, own) if recompute else (Plain, {"around": self.masks})
        self.sampler = kind(self.model, goal, (4, 2, 2), 10, settings, **given)

    @contextmanager
    def masks(self):
        noise = torch.rand(len(self.scores), generator=self.generator)
        self.model.mask = (self.scores + noise.logit()).sigmoid()
        yield
        self.model.mask = None

    def gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.sampler.latents(torch.tensor([1, 2]), SEEDS)
        latents.square().mean().backward()
        return latents.detach(), self.scores.grad


class Plain(Trajectory):
    """Back-propagation through everything: what the gradients have to equal."""

    def predict(self, x, t, y):
        return self._surrounded(x, t, y)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("name_", "steps"), CASES)
def test_the_gradient_is_plain_back_propagations(name_, steps, guidance):
    plain = Masked(name_, steps, recompute=False, guidance=guidance)
    stepwise = Masked(name_, steps, guidance=guidance)
    (latents, expected), (same, found) = plain.gradient(), stepwise.gradient()
    assert torch.equal(latents, same)
    assert expected.abs().min() > 0
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The backward pass drew nothing that later draws would miss.
    assert torch.equal(plain.generator.get_state(), stepwise.generator.get_state())


def test_fresh_draws_in_the_backward_pass_give_another_gradient():
    """The authors' code draws the masks anew; that is what a generator that is not named does."""
    (latents, stored), (same, fresh) = (
        Masked("euler", 3, named=named).gradient() for named in (True, False)
    )
    assert torch.equal(latents, same)
    assert (stored - fresh).abs().max() > 1e-3 * stored.abs().max()


@pytest.mark.parametrize("name_", ["dit", "sit", tiny.PROMPTED[0]])
def test_latents_are_those_that_the_sampler_draws(name_):
    """Equal seeds, equal noise: the start and what a stochastic sampler adds."""
    instance, model = tiny.INSTANCES[name_], tiny.dense(name_)
    kind = "euler-maruyama" if tiny.sampling(name_)["sampler"] == "euler" else "ddpm"
    settings = {"sampler": kind, "steps": 3, "lanes": 2}
    context = tiny.context(name_, sampling=settings)
    y, randomness = context.asked(2), [torch.Generator().manual_seed(seed) for seed in SEEDS]
    noise = torch.stack([torch.randn(instance.shape, generator=g) for g in randomness])
    with torch.no_grad():
        drawn = context.sampler().latents(y, SEEDS)
        goal = objective(instance.objective)
        own = Sampler(model, goal, instance.shape, 10, settings, conditions=instance.conditions)
        expected = own.denoise(noise, y, randomness)
    assert drawn.std() > 0 and torch.equal(drawn, expected)


class Bytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, kinds, given=(), named=None):
        result = function(*given, **(named or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key and key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def _peak(name: str, steps: int, **how: object) -> int:
    masked = Masked(name, steps, hidden=4096, **how)
    with Bytes() as count:
        masked.gradient()
    return count.peak


@pytest.mark.parametrize("name_", NOISE + FLOW)
def test_memory_grows_by_latents_only(name_):
    """From 3 steps to 23; plain back-propagation adds a network's activations with every step."""
    latent = 4 * torch.Size([2, 4, 2, 2]).numel()
    stepwise, plain = (
        (_peak(name_, 23, recompute=how) - _peak(name_, 3, recompute=how)) / 20
        for how in (True, False)
    )
    predictions = 2 if name_ == "heun" else 1
    assert stepwise <= 1.5 * predictions * latent
    assert plain >= 3 * 4 * 2 * 4096  # both activations and what the mask multiplies


def test_every_pass_is_metered():
    """Each step twice forward, twice as guided, and as often backward as forward at first."""
    masked, meter, watched = Masked("euler", 3, guidance=2.0), BudgetMeter(), []
    meter.watch(masked.model)
    masked.model.register_forward_hook(lambda *_: watched.append(1))
    masked.gradient()
    assert meter.counts == {"student_forward": 2 * 2 * 3 * 2, "student_backward": 2 * 3 * 2}
    assert len(watched) == 2 * 3 * 2
    with torch.no_grad():
        masked.sampler.latents(torch.tensor([1, 2]), SEEDS)
    assert meter.counts["student_forward"] == 24 + 12


def test_activation_checkpointing_may_be_on_as_well():
    def gradient(name: str, also: bool) -> torch.Tensor:
        context = tiny.context(name)
        checkpoint_activations(context.model, also)
        context.sampler().latents(context.asked(2), SEEDS).square().mean().backward()
        assert (
            context._meter.counts["student_forward"]
            == 2 * context._meter.counts["student_backward"]
        )
        return torch.cat(
            [p.grad.flatten() for p in context.model.parameters() if p.grad is not None]
        )

    for name in ("dit", "sit"):
        assert torch.equal(gradient(name, also=False), gradient(name, also=True))


@pytest.mark.parametrize("name_", ["dit", tiny.PROMPTED[0]])
def test_a_context_lends_training_conditions_and_seeds(name_):
    context, instance = tiny.context(name_), tiny.INSTANCES[name_]
    asked, again = context.asked(5), tiny.context(name_).asked(5)
    shown = asked if isinstance(asked, dict) else {"class": asked}
    for key, value in shown.items():
        assert len(value) == 5
        assert torch.equal(value, (again if isinstance(again, dict) else {"class": again})[key])
    if name_ not in tiny.PROMPTED and getattr(context.model, "null_class", None) is not None:
        assert set(context.nothing(asked).tolist()) == {context.model.null_class}
    assert len(set(context.seeds(100))) == 100
    assert context.sampler().shape == instance.shape


def test_a_context_without_a_sampler_says_so():
    with pytest.raises(CellError, match="method test asks for a sampler; the context has none"):
        tiny.context("dit", sampling=None).sampler()
