"""Objectives by hand; samplers on models with known answers; image i depends on seed and i only."""

import functools

import pytest
import tiny
import torch
from torch import nn

from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import FlowMatching, NoisePrediction, objective
from prunebench.diffusion.sampling import (
    Sampler,
    image_seed,
    shard_range,
    to_float,
    to_uint8,
)
from prunebench.errors import UserError

ODE = ("euler", "heun")
LEADING = ("ddpm", "pndm")  # whose one step would begin at time 0
NOISE, FLOW = ("ddim", "ddpm", "dpm-solver++", "pndm"), (*ODE, "euler-maruyama")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Objectives.


def test_noise_prediction_by_hand():
    """Two steps with beta 0.1 and 0.2: abar is 0.9, then 0.9 * 0.8."""
    goal = NoisePrediction(train_steps=2, beta_start=0.1, beta_end=0.2)
    x0, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 2.0)
    noised, target = goal.noised(x0, noise, torch.tensor([0, 1]))
    expected = [3 * 0.9**0.5 + 2 * 0.1**0.5, 3 * 0.72**0.5 + 2 * 0.28**0.5]
    assert noised.flatten().tolist() == pytest.approx(expected)
    assert torch.equal(target, noise)


def test_the_linear_schedule_ends_in_noise():
    goal = NoisePrediction()
    ones = torch.ones(1, 1, 1, 1)
    last, _ = goal.noised(ones, 0 * ones, torch.tensor([999]))
    assert last.item() == pytest.approx(4.0358e-5**0.5, rel=1e-3)  # abar_T of Ho et al.


def test_flow_matching_by_hand():
    x0, noise = torch.full((3, 1, 1, 1), 3.0), torch.full((3, 1, 1, 1), -1.0)
    noised, target = FlowMatching().noised(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert noised.flatten().tolist() == [3.0, 2.0, -1.0]
    assert target.flatten().tolist() == [-4.0] * 3


@pytest.mark.parametrize("count", [2, 7, 100])
def test_grids_ascend_in_noise(count):
    x0, noise = torch.zeros(count, 1, 1, 1), torch.ones(count, 1, 1, 1)
    for goal in (NoisePrediction(), FlowMatching()):
        grid = goal.grid(count)
        assert grid.shape == (count,) and bool((grid.diff() > 0).all())
        noised, _ = goal.noised(x0, noise, grid)
        assert bool((noised.flatten().diff() > 0).all())
    assert NoisePrediction().grid(count)[[0, -1]].tolist() == [0, 999]
    assert FlowMatching().grid(2).tolist() == [0.25, 0.75]


def test_the_full_grid_is_every_timestep():
    assert NoisePrediction().grid(1000).tolist() == list(range(1000))


def test_training_times():
    times = NoisePrediction(10).sample_times(1000, _generator())
    assert set(times.tolist()) == set(range(10))
    uniform = FlowMatching("uniform").sample_times(20_000, _generator())
    normal = FlowMatching().sample_times(20_000, _generator())
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert normal.logit().mean().item() == pytest.approx(0, abs=0.02)
    assert normal.logit().std().item() == pytest.approx(1, abs=0.02)
    again = FlowMatching().sample_times(20_000, _generator())
    assert torch.equal(normal, again)


def test_what_the_network_sees_of_time():
    t = torch.tensor([0.25, 0.5])
    assert FlowMatching(time_scale=1000).model_time(t).tolist() == [250.0, 500.0]
    assert FlowMatching().model_time(t).tolist() == [0.25, 0.5]
    assert NoisePrediction().model_time(torch.tensor([7])).tolist() == [7]


def test_objectives_are_built_from_a_tracks_entry():
    goal = objective({"name": "flow", "times": "uniform", "time_scale": 7})
    assert (goal.times, goal.time_scale) == ("uniform", 7)
    assert objective({"name": "noise", "train_steps": 5}).train_steps == 5
    with pytest.raises(
        UserError, match=r"objective\.times is 'beta'; known: logit_normal, uniform"
    ):
        objective({"name": "flow", "times": "beta"})


# Pixels.


def test_all_pixel_values_survive():
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(images)), images)
    assert to_float(images)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# Samplers on models with known answers.


class Known(nn.Module):
    """A model given as a function of (x, t, y); notes the times and classes it is asked for."""

    null_class = 99

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y):
        self.calls.append((t.clone(), y.clone()))
        return self.function(x, t, y)


def _sampler(model: nn.Module, goal, name: str, steps: int = 5, **settings) -> Sampler:
    entries = {"sampler": name, "steps": steps, "lanes": 4, **settings}
    return Sampler(model, goal, (1, 2, 2), 10, entries)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("name_", ODE)
def test_a_constant_velocity_is_followed_exactly(name_, steps):
    """x_1 = noise and v = noise - x0 everywhere: any solver arrives at x0."""
    noise, x0 = torch.randn(3, 1, 2, 2, generator=_generator()), torch.linspace(-1, 1, 12)
    x0 = x0.view(3, 1, 2, 2)
    sampler = _sampler(Known(lambda x, t, y: noise - x0), FlowMatching(), name_, steps)
    arrived = sampler.denoise(noise, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(arrived, x0, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name_", "times", "growth"),
    [
        ("euler", [1000, 750, 500, 250], 1.25**4),
        # The corrector looks at the end of each step; at time 0 there is nothing left to correct.
        ("heun", [1000, 750, 750, 500, 500, 250, 250], (1 + 1 / 4 + 1 / 32) ** 3 * 1.25),
    ],
)
def test_flow_samplers_step_evenly_from_one_to_zero(name_, times, growth):
    """dx/dt = -x, followed backwards: a step of 1/4 multiplies x by the solver's exp(1/4)."""
    model = Known(lambda x, t, y: -x)
    sampler = _sampler(model, FlowMatching(time_scale=1000), name_, 4)
    arrived = sampler.denoise(torch.ones(2, 1, 2, 2), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(arrived, torch.full_like(arrived, growth))
    assert all(t.shape == (2,) for t, _ in model.calls)
    assert [t[0].item() for t, _ in model.calls] == pytest.approx(times)


def test_heun_is_of_second_order():
    """On dx/dt = x the error falls by four, not two, where the steps halve."""
    errors = []
    for steps in (10, 20, 40):
        sampler = _sampler(Known(lambda x, t, y: x), FlowMatching(), "heun", steps)
        arrived = sampler.denoise(torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))
        errors.append(abs(arrived[0, 0, 0, 0].item() - torch.tensor(-1.0).exp().item()))
    assert errors[0] / errors[2] > 3**2


@pytest.mark.parametrize(
    ("name_", "steps"),
    [(name, steps) for name in NOISE for steps in (1, 5, 20) if steps > 1 or name not in LEADING],
)
def test_a_point_mass_is_recovered(name_, steps):
    """All data at x0: the exact noise is (x - sqrt(abar) x0) / sqrt(1 - abar)."""
    goal = NoisePrediction()
    x0 = torch.tensor([-0.9, 0.1, 0.5, 1.0]).view(1, 1, 2, 2)

    def exact(x, t, y):
        abar = goal.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    options = {"set_alpha_to_one": True} if name_ == "pndm" else {}
    sampler = _sampler(Known(exact), goal, name_, steps, options=options)
    noise = torch.randn(3, 1, 2, 2, generator=_generator())
    arrived = sampler.denoise(
        noise, torch.zeros(3, dtype=torch.long), [_generator(i) for i in range(3)]
    )
    torch.testing.assert_close(arrived, x0.expand(3, 1, 2, 2), rtol=0, atol=1e-4)


def test_ddim_by_hand():
    """Two trailing steps (t = 999, 499) of a model that predicts no noise rescale x."""
    goal, model = NoisePrediction(), Known(lambda x, t, y: torch.zeros_like(x))
    sampler = _sampler(model, goal, "ddim", 2, options={"clip_sample": False})
    arrived = sampler.denoise(torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))
    assert [t.item() for t, _ in model.calls] == [999, 499]
    expected = (
        goal.scheduler.alphas_cumprod[999] ** -0.5
    )  # x / sqrt(abar) stays the same throughout
    torch.testing.assert_close(arrived, torch.full_like(arrived, expected.item()))


QUADRATIC = {"timestep_spacing": "quadratic", "clip_sample": False}


def test_times_that_fall_together_change_nothing():
    """DDIM's own loop over all 100 times, equal ones included."""
    goal, model = NoisePrediction(), Known(lambda x, t, y: (3 * x + t.view(-1, 1, 1, 1)).sin())
    x = torch.randn(2, 1, 2, 2, generator=_generator())
    sampler = _sampler(model, goal, "ddim", 100, options=QUADRATIC)
    arrived = sampler.denoise(x, torch.zeros(2, dtype=torch.long))
    times = [int((i * 800**0.5 / 99) ** 2) for i in range(99)] + [800]
    abar = torch.cat([torch.ones(1), goal.scheduler.alphas_cumprod])  # from time -1 on
    for t, after in zip(times[::-1], [*times[-2::-1], -1], strict=True):
        noise = (3 * x + t).sin()
        x0 = (x - (1 - abar[t + 1]).sqrt() * noise) / abar[t + 1].sqrt()
        x = abar[after + 1].sqrt() * x0 + (1 - abar[after + 1]).sqrt() * noise
    assert len(model.calls) == 96
    torch.testing.assert_close(arrived, x, rtol=1e-3, atol=1e-3)


def test_a_learned_variance_is_that_of_the_respaced_chain():
    """DiT's sampler (Nichol & Dhariwal 2021, eq. 15) on 4 of 1,000 steps, written out."""
    goal, steps, generator = NoisePrediction(), 4, _generator(5)
    weight = torch.rand(1, 1, 2, 2, generator=generator) * 2 - 1
    model = Known(lambda x, t, y: torch.cat([0.3 * x, weight.expand_as(x)], 1))
    options = {
        "variance_type": "learned_range",
        "timestep_spacing": "linspace",
        "clip_sample": False,
    }
    sampler = _sampler(model, goal, "ddpm", steps, options=options)
    x = torch.randn(2, 1, 2, 2, generator=generator)
    arrived = sampler.denoise(x, torch.zeros(2, dtype=torch.long), [_generator(i) for i in (0, 1)])
    chain = [0, 333, 666, 999]
    abar = goal.scheduler.alphas_cumprod.double()[chain]
    before = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    randomness, x = [_generator(i) for i in (0, 1)], x.double()
    for i in reversed(range(steps)):
        x0 = (x - (1 - abar[i]).sqrt() * 0.3 * x) / abar[i].sqrt()
        mean = before[i].sqrt() * beta[i] * x0 + (1 - beta[i]).sqrt() * (1 - before[i]) * x
        x = mean / (1 - abar[i])
        if i:
            share = (weight.double() + 1) / 2
            spread = (share * beta[i].log() + (1 - share) * posterior[i].log()) / 2
            noise = torch.stack([torch.randn(1, 2, 2, generator=g) for g in randomness])
            x = x + spread.exp() * noise
    assert [t[0].item() for t, _ in model.calls] == chain[::-1]
    torch.testing.assert_close(arrived, x.float(), rtol=1e-4, atol=1e-4)


def test_the_stochastic_flow_sampler_by_hand():
    """SiT's: drift v - w s back in time with w = t, noise of variance 2 w dt, a mean at the end."""
    model = Known(lambda x, t, y: 0.3 * x + t.view(-1, 1, 1, 1))
    sampler = _sampler(model, FlowMatching(), "euler-maruyama", 4, options={"last_step": 0.1})
    x = torch.randn(3, 1, 2, 2, generator=_generator())
    arrived = sampler.denoise(x, torch.zeros(3).long(), [_generator(i) for i in range(3)])
    randomness, times = [_generator(i) for i in range(3)], [1.0, 0.7, 0.4, 0.1]
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        velocity, dt = 0.3 * x + t, t - after
        score = -(x + (1 - t) * velocity) / t
        x = x - (velocity - t * score) * dt
        if after:
            noise = torch.stack([torch.randn(1, 2, 2, generator=g) for g in randomness])
            x = x + (2 * t * dt) ** 0.5 * noise
    assert [t[0].item() for t, _ in model.calls] == pytest.approx(times)
    torch.testing.assert_close(arrived, x)


def test_the_stochastic_flow_sampler_keeps_the_marginals():
    """Data N(0, 0.4^2): the exact velocity leads from N(0, 1) to their variance."""
    variance = 0.4**2

    def exact(x, t, y):
        t = t.view(-1, 1, 1, 1)
        return x * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)

    sampler = _sampler(
        Known(exact), FlowMatching(), "euler-maruyama", 200, options={"last_step": 0.01}
    )
    x = torch.randn(4, 1, 64, 64, generator=_generator())
    arrived = sampler.denoise(x, torch.zeros(4).long(), [_generator(i) for i in range(4)])
    assert arrived.std().item() == pytest.approx(0.4, rel=0.03)
    assert (arrived * x).mean().item() < 0.2  # 0.4 where no noise comes in


def test_only_the_first_channels_are_guided():
    model = Known(lambda x, t, y: torch.ones(len(x), 4, 2, 2) * y.view(-1, 1, 1, 1))
    settings = {"sampler": "euler", "steps": 1, "lanes": 2, "guidance": 1.5, "guidance_channels": 3}
    sampler = Sampler(model, FlowMatching(), (4, 2, 2), 10, settings)
    predicted = sampler.predict(torch.zeros(1, 4, 2, 2), torch.ones(1), torch.tensor([9]))
    assert predicted[0, :, 0, 0].tolist() == [99 + 1.5 * (9 - 99)] * 3 + [9]


def test_fewer_steps_take_the_stated_fraction():
    model = Known(lambda x, t, y: torch.zeros_like(x))
    settings = {"sampler": "euler", "steps": 8, "lanes": 2}
    for fraction, steps in ((1.0, 8), (0.75, 6), (0.5, 4)):
        sampler = Sampler(model, FlowMatching(), (1, 2, 2), 10, settings, fraction)
        model.calls.clear()
        sampler.denoise(torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))
        assert sampler.steps == steps == len(model.calls)


# Guidance.


def test_no_guidance_is_one_pass_with_the_class():
    model = Known(lambda x, t, y: x + y.view(-1, 1, 1, 1))
    for settings in ({}, {"guidance": 1.0}, {"guidance": 1}):
        model.calls.clear()
        sampler = _sampler(model, FlowMatching(), "euler", **settings)
        x, y = torch.ones(2, 1, 2, 2), torch.tensor([3, 4])
        predicted = sampler.predict(x, torch.zeros(2), y)
        assert predicted[:, 0, 0, 0].tolist() == [4.0, 5.0] and len(model.calls) == 1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.5, 4.0])
def test_guidance_goes_from_no_class_to_class(guidance):
    """w * conditional + (1 - w) * unconditional, in two passes."""
    model = Known(lambda x, t, y: y.float().view(-1, 1, 1, 1).expand_as(x))
    sampler = _sampler(model, FlowMatching(), "euler", guidance=guidance)
    predicted = sampler.predict(torch.ones(2, 1, 2, 2), torch.zeros(2), torch.tensor([3, 4]))
    expected = [99 + guidance * (3 - 99), 99 + guidance * (4 - 99)]
    assert predicted[:, 0, 0, 0].tolist() == pytest.approx(expected)
    assert sorted(y.tolist() for _, y in model.calls) == [[3, 4], [99, 99]]


# Image i depends on seed and i only.


def _instance_sampler(name: str, sampler: str, **settings) -> Sampler:
    settings = {"steps": 3 if sampler == "pndm" else 2, "lanes": 8, **settings}
    return tiny.sampler(name, tiny.dense(name), sampler=sampler, **settings)


def _samplers(name: str) -> tuple[str, ...]:
    return FLOW if tiny.INSTANCES[name].objective["name"] == "flow" else NOISE


PAIRS = [(name, sampler) for name in tiny.NAMES for sampler in _samplers(name)]


@functools.cache
def _whole(name_: str, sampler: str) -> torch.Tensor:
    return torch.cat(list(_instance_sampler(name_, sampler).images(5, 0, 40, 40)))


@pytest.mark.parametrize(("name_", "sampler"), PAIRS)
def test_images_do_not_depend_on_batch_or_shard(name_, sampler):
    images = _whole(name_, sampler)
    assert images.dtype == torch.uint8 and images.shape == (40, *tiny.INSTANCES[name_].shape)
    assert len({image.numpy().tobytes() for image in images}) == 40
    draw = _instance_sampler(name_, sampler).images
    for batch in (7, 20, 33):
        parts = list(draw(5, 0, 40, batch))
        assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
        assert torch.equal(torch.cat(parts), images), batch
    assert torch.equal(torch.cat(list(draw(5, 13, 17, 1))), images[13:17])
    for start, stop in ((0, 3), (3, 8), (8, 33), (33, 40)):  # shards, aligned and not
        assert torch.equal(torch.cat(list(draw(5, start, stop, 7))), images[start:stop])


@pytest.mark.parametrize(
    ("name_", "sampler"), [("dit", "ddpm"), ("sit", "euler"), ("unet", "ddim")]
)
def test_other_seeds_are_other_images_and_calls_do_not_leave_traces(name_, sampler):
    images = _whole(name_, sampler)
    ours = _instance_sampler(name_, sampler)
    other = torch.cat(list(ours.images(6, 0, 8, 8)))
    assert not any(torch.equal(a, b) for a in other for b in images)
    torch.manual_seed(123)
    torch.randn(17)  # global randomness takes no part
    assert torch.equal(torch.cat(list(ours.images(5, 0, 8, 8))), images[:8])


def test_guided_images_do_not_depend_on_batch():
    draw = _instance_sampler("dit", "ddim", guidance=2.0).images
    whole = torch.cat(list(draw(0, 0, 20, 20)))
    assert torch.equal(torch.cat(list(draw(0, 0, 20, 7))), whole)
    assert not torch.equal(
        whole, torch.cat(list(_instance_sampler("dit", "ddim").images(0, 0, 20, 20)))
    )


def test_shards_are_whole_blocks_of_nearly_one_size():
    for count, lanes, shards in ((40, 8, 2), (34, 8, 3), (34, 8, 5), (7, 1, 3), (3, 8, 1)):
        ranges = [shard_range(index, shards, count, lanes) for index in range(shards)]
        assert [image for part in ranges for image in part] == list(range(count))
        assert all(part.start % lanes == 0 for part in ranges)
        blocks = [-(-len(part) // lanes) for part in ranges]
        assert min(blocks) >= 1 and max(blocks) - min(blocks) <= 1


def test_too_little_memory_is_the_users_to_mend():
    def starved(x, t, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    sampler = _sampler(Known(starved), FlowMatching(), "euler")
    with pytest.raises(UserError, match=r"to draw 4 images at once; .*sampling\.lanes"):
        next(sampler.images(0, 0, 4, 4))


def test_labels_follow_the_index():
    sampler = _instance_sampler("dit", "ddim")
    assert sampler.labels(range(8, 13)).tolist() == [8, 9, 0, 1, 2]


def test_image_seeds_are_distinct_and_fixed():
    seeds = {image_seed(seed, index) for seed in range(20) for index in range(500)}
    assert len(seeds) == 20 * 500
    assert image_seed(1, 11) != image_seed(11, 1)
    assert image_seed(0, 0) == 23_947_242_637_076_183  # published numbers rest on it


def test_every_sampler_is_tested():
    assert set(NOISE + FLOW) == set(samplers.sampler_names())
    for name in NOISE:
        model = Known(lambda x, t, y: x)
        _sampler(model, NoisePrediction(), name, 6).denoise(
            torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), [_generator()]
        )
        assert len(model.calls) == 7 if name == "pndm" else 6  # its first step is taken twice
