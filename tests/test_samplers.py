"""Samplers on Gaussian data, whose exact predictor is affine: every update is then affine too.

The oracles are each paper's recursion in float64 for x = a z + b of noise z, with the times that a
sampler says it visits. No code of theirs is ours or diffusers'.
"""

import math
import subprocess
import sys
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import FlowMatching, NoisePrediction
from prunebench.errors import UserError

T = 1000
MEAN, STD = 0.3, 0.5  # of the data
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
# Divisors of 1,000 and all else: few, many, odd, even, remainders of every size, one below all.
STEPS = [1, 2, 3, 6, 7, 15, 20, 48, 61, 67, 100, 167, 250, 334, 400, 600, 769, 999, 1000]
SPACED = {
    "ddim": ("leading", "linspace", "trailing", "quadratic"),
    "ddpm": ("leading", "linspace", "trailing"),
    "dpm-solver++": ("leading", "linspace", "trailing"),
    "pndm": ("leading", "linspace", "trailing"),
}
PAIRS = [(name, spacing) for name, spacings in SPACED.items() for spacing in spacings]
FLOW = ("euler", "heun", "euler-maruyama")


def noise(abar: float) -> np.ndarray:
    """The exact noise of N(MEAN, STD^2) data as (slope, intercept) in x."""
    slope = math.sqrt(1 - abar) / (abar * STD**2 + 1 - abar)
    return np.array([slope, -slope * math.sqrt(abar) * MEAN])


def velocity(t: float) -> np.ndarray:
    """The exact velocity E[z - x0 | x] as (slope, intercept) in x."""
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return np.array([slope, -MEAN - slope * (1 - t) * MEAN])


def at(function: np.ndarray, x: np.ndarray) -> np.ndarray:
    """An affine function of x = x[0] z + x[1], as such a pair again."""
    return np.array([function[0] * x[0], function[0] * x[1] + function[1]])


def ddim(times, last):
    x = np.array([1.0, 0.0])
    for now, then in _levels(times, last):
        e = at(noise(now), x)
        x = math.sqrt(then / now) * (x - math.sqrt(1 - now) * e) + math.sqrt(1 - then) * e
    return x


def pndm(times, last):
    x, seen = np.array([1.0, 0.0]), []

    def moved(x, e, now, then):
        return math.sqrt(then / now) * (x - math.sqrt(1 - now) * e) + math.sqrt(1 - then) * e

    weights = {2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}  # Adams-Bashforth
    for now, then in _levels(times, last):
        seen = [at(noise(now), x), *seen][:4]
        e = seen[0]
        if len(seen) > 1:
            parts = weights[len(seen)]
            e = sum(w * old for w, old in zip(parts, seen, strict=True)) / sum(parts)
        else:
            e = (e + at(noise(then), moved(x, e, now, then))) / 2
        x = moved(x, e, now, then)
    return x


def dpm_solver(times, last, order=2):
    x, before, gap = np.array([1.0, 0.0]), None, None
    for now, then in _levels(times, 1.0):
        x0 = (x - math.sqrt(1 - now) * at(noise(now), x)) / math.sqrt(now)
        if then == 1:
            return x0
        h = _log_snr(then) - _log_snr(now)
        guess = x0
        if before is not None and order == 2:
            guess = x0 + h / (2 * gap) * (x0 - before)
        x = math.sqrt((1 - then) / (1 - now)) * x - math.sqrt(then) * math.expm1(-h) * guess
        before, gap = x0, h


def ddpm(times, last):
    """Mean map, and the variance that comes on top."""
    x, variance = np.array([1.0, 0.0]), 0.0
    for now, then in _levels(times, 1.0):
        alpha = now / then
        slope, shift = noise(now)
        pull = (1 - alpha) / math.sqrt(1 - now)  # DDPM, algorithm 2, line 4
        x = (x - pull * at((slope, shift), x)) / math.sqrt(alpha)
        variance *= ((1 - pull * slope) / math.sqrt(alpha)) ** 2
        variance += (1 - alpha) * (1 - then) / (1 - now)
    return x, variance


def _levels(times, last):
    abar = [*ABAR[times], last]
    return list(pairwise(abar))


def _log_snr(abar: float) -> float:
    return math.log(abar / (1 - abar)) / 2


def drawn(name: str, steps: int, options: dict, goal=None, randomness=None, shape=(1, 1, 1)):
    """What the sampler makes of 0 and of 1: its intercept, and slope after it."""
    goal = goal or NoisePrediction()
    abar = torch.tensor(ABAR)

    def predict(x, t):
        t = float(t)
        slope, shift = velocity(t) if goal.name == "flow" else noise(abar[int(t)].item())
        return slope * x + shift

    checked = samplers.checked(name, steps, options, goal.name, goal.train_steps)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, *shape)
    settings = {"objective": goal, "steps": steps, "options": checked}
    return samplers.denoise(name, predict, x, randomness=randomness, **settings)


def affine(arrived: torch.Tensor) -> np.ndarray:
    zero, one = arrived.flatten().tolist()
    return np.array([one - zero, zero])


def allowed(name: str, spacing: str, steps: int) -> bool:
    try:
        samplers.checked(name, steps, {"timestep_spacing": spacing}, "noise", T)
    except UserError as error:
        assert str(error).startswith(("options.timestep_spacing: '", "steps: "))
        assert str(steps) in str(error)
        return False
    return True


# The times.


def ideal(name: str, spacing: str, steps: int) -> np.ndarray:
    """What a spacing promises before rounding, from noisy to clean."""
    more = steps + (name == "dpm-solver++" and spacing != "trailing")  # it stops before time 0
    if spacing == "leading":
        found = np.arange(more) * (T // more)
    elif spacing == "linspace":
        found = np.linspace(0, T - 1, more)
    else:
        found = np.arange(1, more + 1) * (T / more) - 1
    return found[::-1][:steps]


@pytest.mark.parametrize(("name_", "spacing"), [p for p in PAIRS if p[1] != "quadratic"])
def test_times_are_those_that_a_spacing_promises(name_, spacing):
    """Of every number of steps: as many, each within half a time, descending, none below 0."""
    options = samplers.sampler(name_).options(timestep_spacing=spacing)
    for steps in range(1, T + 1):
        if not allowed(name_, spacing, steps):
            assert spacing != "trailing" or (name_ == "pndm" and steps < 3)
            continue
        times, wanted = options.times(steps, T), ideal(name_, spacing, steps)
        assert len(times) == len(wanted) == steps
        assert np.abs(times - wanted).max() <= 0.5 + 1e-9, steps
        assert times[0] < T and times[-1] >= 0 and (np.diff(times) < 0).all()


def test_times_are_diffusers_wherever_those_are_right():
    """Their trailing goes on to time -1, the noisiest, at some numbers of steps."""
    for name, kind in (
        ("ddim", diffusers.DDIMScheduler),
        ("ddpm", diffusers.DDPMScheduler),
        ("dpm-solver++", diffusers.DPMSolverMultistepScheduler),
    ):
        for spacing in ("leading", "linspace", "trailing"):
            theirs = kind(timestep_spacing=spacing)
            options = samplers.sampler(name).options(timestep_spacing=spacing)
            for steps in (1, 2, 4, 5, 6, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500):
                theirs.set_timesteps(steps)
                assert theirs.timesteps.tolist() == options.times(steps, T)
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1 and len(theirs.timesteps) == 62
    assert options.times(61, T)[-1] == 15 and len(options.times(61, T)) == 61


def test_quadratic_times_are_those_of_ddims_code():
    options = samplers.sampler("ddim").options(timestep_spacing="quadratic")
    for steps in range(2, T + 1):
        grid = np.linspace(0, np.sqrt(T * 0.8), steps) ** 2  # DDIM, runners/diffusion.py
        assert options.times(steps, T) == sorted({int(s) for s in list(grid)}, reverse=True)
    assert len(options.times(100, T)) == 96
    assert not allowed("ddim", "quadratic", 1)


def test_offset_leading_times():
    options = samplers.sampler("ddim").options(timestep_spacing="leading", steps_offset=1)
    assert options.times(250, T) == list(range(997, 0, -4))
    with pytest.raises(UserError, match=r"options\.steps_offset: 1000 steps would begin after"):
        samplers.checked("ddim", 1000, options.model_dump(exclude_defaults=True), "noise", T)


# The steps.


ORACLES = {"ddim": ddim, "pndm": pndm, "dpm-solver++": dpm_solver, "ddpm": ddpm}
# Relative error of the standard deviation times steps: what first order leaves. Found with the
# oracles, which show it to be bounded over all steps; one step to a wrong time is far above it.
ERROR = {"ddim": 3.5, "pndm": 3, "dpm-solver++": 2.5, "ddpm": 9}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name_", "spacing"), PAIRS)
def test_every_step_leads_to_the_next_time_of_the_list(name_, spacing, steps, monkeypatch):
    if not allowed(name_, spacing, steps):
        return
    options = {"timestep_spacing": spacing}
    if name_ in ("ddim", "ddpm"):
        options["clip_sample"] = False
    times = samplers.sampler(name_).options(**options).times(steps, T)
    expected, variance = ORACLES[name_](times, ABAR[0] if name_ == "pndm" else 1.0), 0.0
    if name_ == "ddpm":
        expected, variance = expected
        module = diffusers.schedulers.scheduling_ddpm
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    found = affine(drawn(name_, steps, options))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    spread = math.sqrt(found[0] ** 2 + variance)
    assert abs(spread / STD - 1) <= ERROR[name_] / steps
    assert abs(found[1] - MEAN) < 0.01


@pytest.mark.parametrize("steps", [2, 7, 67, 250, 999])
def test_ancestral_samples_have_the_variance_of_the_chain(steps):
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    times = samplers.sampler("ddpm").options(**options).times(steps, T)
    randomness = [torch.Generator().manual_seed(i) for i in range(2)]
    arrived = drawn("ddpm", steps, options, randomness=randomness, shape=(1, 100, 100))
    _, variance = ddpm(times, 1.0)
    assert arrived.std((1, 2, 3)).tolist() == pytest.approx([math.sqrt(variance)] * 2, rel=0.03)


def test_order_one_of_dpm_solver_is_ddim():
    options = {"timestep_spacing": "linspace"}
    first = samplers.sampler("dpm-solver++").options(**options)
    found = affine(drawn("dpm-solver++", 67, options | {"solver_order": 1}))
    np.testing.assert_allclose(found, ddim(first.times(67, T), 1.0), rtol=2e-4)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name_", ["ddim", "pndm"])
def test_the_last_step_leads_to_time_0_where_asked(name_, offset):
    options = {"timestep_spacing": "leading", "steps_offset": offset, "set_alpha_to_one": False}
    if name_ == "ddim":
        options["clip_sample"] = False
    times = samplers.sampler(name_).options(**options).times(50, T)
    found = affine(drawn(name_, 50, options))
    np.testing.assert_allclose(found, ORACLES[name_](times, ABAR[0]), rtol=2e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 20, 125, 1000])
def test_ddim_is_diffusers_bit_for_bit_where_times_are_even(steps, clip):
    goal, x = NoisePrediction(), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=clip, **goal.schedule)
    theirs.set_timesteps(steps)

    def predict(x, t):
        return (3 * x + torch.as_tensor(t) / 300).sin()

    expected = samplers.follow(theirs, predict, x)
    options = samplers.checked("ddim", steps, {"clip_sample": clip}, "noise", T)
    found = samplers.denoise("ddim", predict, x, objective=goal, steps=steps, options=options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("steps", [3, 4, 25, 125, 1000])
def test_pndm_is_diffusers_bit_for_bit_where_times_are_even(steps):
    goal = NoisePrediction(1000, "scaled_linear", 0.00085, 0.012)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.PNDMScheduler(skip_prk_steps=True, **goal.schedule)
    theirs.set_timesteps(steps)

    def predict(x, t):
        return (3 * x + torch.as_tensor(t) / 300).sin()

    expected = samplers.follow(theirs, predict, x)
    options = samplers.checked("pndm", steps, {}, "noise", T)
    found = samplers.denoise("pndm", predict, x, objective=goal, steps=steps, options=options)
    assert torch.equal(found, expected)


# Flows.


def euler(steps, _):
    x, h = np.array([1.0, 0.0]), 1 / steps
    for i in range(steps):
        x = x - h * at(velocity(1 - i * h), x)
    return x


def heun(steps, _):
    x, h = np.array([1.0, 0.0]), 1 / steps
    for i in range(steps):
        first = at(velocity(1 - i * h), x)
        ahead = x - h * first
        # At time 0 there is nothing left to correct.
        second = at(velocity(1 - (i + 1) * h), ahead) if i < steps - 1 else first
        x = x - h * (first + second) / 2
    return x


def euler_maruyama(steps, last):
    """Mean map, and the variance that comes on top."""
    times = [*np.linspace(1, last, steps), 0.0]
    x, variance = np.array([1.0, 0.0]), 0.0
    for t, after in pairwise(times):
        slope, shift = velocity(t)
        drift = np.array([2 - t, 1.0])  # of v and of x: v - t s with s = -(x + (1 - t) v) / t
        pull = np.array([drift[0] * slope + drift[1], drift[0] * shift])
        x = x - (t - after) * at(pull, x)
        variance *= (1 - (t - after) * pull[0]) ** 2
        variance += 2 * t * (t - after) if after else 0
    return x, variance


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name_", FLOW)
def test_flows_are_followed_from_one_to_zero(name_, steps, monkeypatch):
    if name_ == "euler-maruyama":
        if steps == 1:
            with pytest.raises(UserError, match="steps: the last one takes no noise"):
                drawn(name_, 1, {}, FlowMatching())
            return
        monkeypatch.setattr(
            diffusers.utils.torch_utils, "randn_tensor", lambda shape, *_: torch.zeros(shape)
        )
    found, variance = affine(drawn(name_, steps, {}, FlowMatching())), 0.0
    expected = {"euler": euler, "heun": heun, "euler-maruyama": euler_maruyama}[name_](steps, 0.04)
    if name_ == "euler-maruyama":
        expected, variance = expected
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    error = abs(math.sqrt(found[0] ** 2 + variance) / STD - 1)
    # Of first order, of second, and of first beside what the fixed last step leaves.
    least = {"euler": 1.5 / steps, "heun": 2.3 / steps**2, "euler-maruyama": 10 / steps + 0.01}
    assert error < least[name_] + 1e-5


# Entries.


def test_entries_are_light():
    script = (
        "import sys; from prunebench.diffusion import samplers; samplers.sampler_names();"
        "print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_samplers_are_found_by_name_and_objective():
    assert samplers.sampler_names("flow") == sorted(FLOW)
    assert samplers.sampler_names("noise") == sorted(SPACED)
    assert samplers.sampler_names() == sorted([*FLOW, *SPACED])
    stochastic = {n for n in samplers.sampler_names() if samplers.sampler(n).stochastic}
    assert stochastic == {"ddpm", "euler-maruyama"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("ddimm", 4, {}, "noise"), "sampler: unknown name 'ddimm'; did you mean 'ddim'"),
        (("rk45", 4, {}, "noise"), "sampler: unknown name 'rk45'; known: ddim, ddpm, "),
        (("euler", 4, {}, "noise"), "does not sample objective 'noise'; use ddim, ddpm"),
        (("ddim", 4, {}, "flow"), "does not sample objective 'flow'; use euler, "),
        (("ddim", 0, {}, "noise"), "steps: 0; take at least 1"),
        (("ddim", 1001, {}, "noise"), "steps: 1001 of 1000 times; take at most 1000"),
        (("pndm", 2, {}, "noise"), "steps: 2 are too few"),
        (("ddim", 4, {"clip": True}, "noise"), "options.clip: unknown name 'clip'; did you mean"),
        (("heun", 4, {"eta": 1}, "flow"), "options.eta: unknown name 'eta'; known: shift"),
        (("ddim", 4, {"clip_sample": 1}, "noise"), "options.clip_sample: 1: .*boolean"),
        (("euler", 4, {"shift": 0}, "flow"), "options.shift: 0: .*greater than 0"),
        (("euler", 4, {"shift": math.nan}, "flow"), "options.shift: nan: .*finite"),
        (("pndm", 9, {"timestep_spacing": "quadratic"}, "noise"), "spacing: 'quadratic': .*'lead"),
        (("ddim", 600, {"timestep_spacing": "leading"}, "noise"), "never visits the noisiest 400"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(asked, message):
    name, steps, options, goal = asked
    with pytest.raises(UserError, match=message):
        samplers.checked(name, steps, options, goal, T if goal == "noise" else None)


def test_the_sampler_of_the_docs_takes_one_file(added):
    added("docs/add_a_sampler.md", samplers, "midpoint.py")
    for steps in (1, 7, 67):
        x, h = np.array([1.0, 0.0]), 1 / steps
        for i in range(steps):
            half = x - h / 2 * at(velocity(1 - i * h), x)
            x = x - h * at(velocity(1 - (i + 0.5) * h), half)
        found = affine(drawn("midpoint", steps, {}, FlowMatching()))
        np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-9)
    with pytest.raises(UserError, match=r"options\.look_ahead: 2: .*less than or equal to 1"):
        samplers.checked("midpoint", 4, {"look_ahead": 2}, "flow", None)
    with pytest.raises(UserError, match="'midpoint' does not sample objective 'noise'"):
        samplers.checked("midpoint", 4, {}, "noise", T)
