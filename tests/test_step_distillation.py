"""Step distillation: what the student is taught, in how many steps it is sampled, and where it is
said. The perfect teacher, w = 1 and the last step are SnapFusion's own consequences.
"""

import dataclasses
from collections import Counter

import pytest
import tiny
import torch
from torch import nn

from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import FlowMatching, NoisePrediction, objective
from prunebench.diffusion.samplers import checked
from prunebench.diffusion.sampling import Sampler
from prunebench.errors import UserError
from prunebench.models.conditions import CLASSES
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.recovery import Sampling, Teaching, cfg_step_kd, entry, folding, step_kd
from prunebench.recovery.guidance import GUIDANCE, guided, mixed, sometimes
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter, unwatched

GOALS = {
    "noise": NoisePrediction(),
    "velocity": NoisePrediction(prediction="velocity"),
    "flow": FlowMatching(time_scale=1000),
}
every_goal = pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS)
CLIPS = {"noise": {"clip_sample": False}, "flow": {}}


def _data(goal, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noise of a batch, [N, 1, 4, 4]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, count, 1, 4, 4, generator=generator).unbind()


def _batch(goal, x0, noise) -> loop.Batch:
    data = loop.Data(torch.zeros(0), torch.zeros(0), goal)
    t = goal.sample_times(len(x0), torch.Generator().manual_seed(4))
    return data.noised(x0, torch.arange(len(x0)) % 3, t, noise)


class Knowing(nn.Module):
    """Predicts what the pair of image and noise that it knows asks for, wherever it is asked."""

    null_class = 3

    def __init__(self, goal, x0, noise):
        super().__init__()
        self.goal, self.x0, self.noise = goal, x0, noise
        self.off = nn.Parameter(torch.zeros(4))  # error by class, the last one without a class
        self.times = []

    def forward(self, x, t, y):
        times = t / getattr(self.goal, "time_scale", 1)
        times = times if self.goal.train_steps is None else times.long()
        self.times.append(times)
        _, target = self.goal.noised(self.x0, self.noise, times)
        return target + self.off[y].view(-1, 1, 1, 1)


def _teaching(goal, teacher: nn.Module, steps: int = 8) -> Teaching:
    name = "euler" if goal.name == "flow" else "ddim"
    options = checked(name, steps, CLIPS[goal.name], goal.name, goal.train_steps)
    return Teaching(teacher, {}, CLASSES, goal, Sampling(name, steps, options))


def _redrawn(loss: loop.Drawing, batch: loop.Batch, seed: int = 0) -> loop.Batch:
    return loss.redraw(batch, torch.Generator().manual_seed(seed))


# The path, and steps along it.


@every_goal
def test_image_and_noise_make_up_the_input_whatever_is_predicted(goal):
    x0, noise = _data(goal)
    batch = _batch(goal, x0, noise)
    image, left = goal.parts(torch.randn_like(x0), batch.noised, batch.t)
    a, s = (level.view(-1, 1, 1, 1) for level in goal.levels(batch.t))
    torch.testing.assert_close(a * image + s * left, batch.noised, rtol=1e-4, atol=1e-4)
    image, left = goal.parts(batch.target, batch.noised, batch.t)
    torch.testing.assert_close((image, left), (x0, noise), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("sampler", "options"), [("ddim", {}), ("euler", {"shift": 3.0})])
def test_students_visit_every_second_time_of_their_teacher(sampler, options):
    """As that sampler visits them when it is asked for so many steps."""
    goal = GOALS["noise" if sampler == "ddim" else "flow"]
    found = checked(sampler, 8, options, goal.name, goal.train_steps)
    path = samplers.folded(sampler, found, 8, goal.train_steps, 2)
    visited = {8: [], 4: []}
    for steps, seen in visited.items():

        def predict(x, t, seen=seen):
            seen.append(float(t))
            return torch.zeros_like(x)

        x = torch.randn(1, 1, 2, 2)
        samplers.denoise(sampler, predict, x, objective=goal, steps=steps, options=found)
    assert visited[8] == pytest.approx(path[:-1], rel=1e-4)
    assert visited[4] == pytest.approx(path[:-1:2], rel=1e-4)


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "said"),
    [
        ("heun", 8, {}, "sampler: the steps of 'heun' can't be folded; use euler"),
        ("dpm-solver++", 8, {}, "use ddim"),
        ("ddim", 7, {}, "steps: 7 steps can't be folded 2 at a time; take a multiple"),
        ("ddim", 8, {"timestep_spacing": "linspace"}, "options: 4 steps do not visit every 2th"),
    ],
)
def test_paths_that_do_not_fold_are_refused(sampler, steps, options, said):
    goal = GOALS["flow" if sampler in ("heun", "euler") else "noise"]
    found = checked(sampler, steps, options, goal.name, goal.train_steps)
    with pytest.raises(UserError, match=said):
        samplers.folded(sampler, found, steps, goal.train_steps, 2)


@every_goal
def test_a_teachers_steps_are_the_samplers(goal):
    """The whole path by `step` ends where the sampler does."""
    x0, noise = _data(goal)
    model = Knowing(goal, x0, noise)
    model.off.data += 0.3
    teaching = _teaching(goal, model)
    path, z = folding.path_of(teaching, 2), noise
    for place in range(8):
        t = path.times[place].expand(len(z))
        output = model(z, goal.model_time(t), torch.zeros(len(z), dtype=torch.long))
        z = folding.step(*goal.parts(output, z, t), path.levels(torch.full((len(z),), place + 1)))
    settings = {"sampler": teaching.sampling.sampler, "steps": 8, "lanes": len(z),
                "options": CLIPS[goal.name]}  # fmt: skip
    sampler = Sampler(model, goal, (1, 4, 4), 3, settings)
    sampled = sampler.denoise(noise, torch.zeros(len(z), dtype=torch.long))
    torch.testing.assert_close(z, sampled, rtol=1e-3, atol=1e-3)


# The target.


@every_goal
@pytest.mark.parametrize("fold", [2, 4])
def test_of_a_perfect_teacher_the_target_is_the_image_itself(goal, fold):
    x0, noise = _data(goal)
    model = Knowing(goal, x0, noise)
    loss = step_kd.loss(_teaching(goal, model), fold=fold)
    batch = _redrawn(loss, _batch(goal, x0, noise))
    path = folding.path_of(_teaching(goal, model), fold)
    target = folding.taught(_teaching(goal, model), batch, path, None)
    tolerance = 1e-4 if goal is not GOALS["noise"] else 1e-2  # 1 / a is 158 at the first time
    torch.testing.assert_close(target, x0, rtol=tolerance, atol=tolerance)
    assert loss(Knowing(goal, x0, noise), batch) < tolerance**2 * 100
    assert len(model.times) == 2 * fold and len(Counter(batch.t.tolist())) > 1


@every_goal
def test_a_student_that_sees_the_target_arrives_where_its_teacher_does(goal):
    """One step to a'' x* + s'' e ends at z''; the fault of a wrong time would move it."""
    x0, noise = _data(goal)
    model = Knowing(goal, x0, noise)
    model.off.data += 0.3
    teaching = _teaching(goal, model)
    path, loss = folding.path_of(teaching, 2), step_kd.loss(teaching)
    batch = _redrawn(loss, _batch(goal, x0, noise))
    target = folding.taught(teaching, batch, path, None)
    place, z, y = batch.drawn["place"], batch.noised, torch.zeros(len(x0), dtype=torch.long)
    for number in range(2):
        t = path.times[place + number]
        parts = goal.parts(model(z, goal.model_time(t), y), z, t)
        z = folding.step(*parts, path.levels(place + number + 1))
    at, to = path.levels(place), path.levels(place + 2)
    left = (batch.noised - at[0] * target) / at[1]
    torch.testing.assert_close(folding.step(target, left, to), z, rtol=1e-3, atol=1e-3)
    last = place == 6
    assert last.any()
    torch.testing.assert_close(target[last], z[last])  # t'' = 0: x* is z_0


@every_goal
def test_the_weight_is_at_least_one_and_one_where_noise_prevails(goal):
    path = folding.path_of(_teaching(goal, nn.Identity()), 2)
    a, s = path.levels(torch.arange(8))
    weight = folding.weight((a, s))
    assert (weight >= 1).all() and (weight[s >= a] == 1).all()
    torch.testing.assert_close(weight[a > s], (a / s)[a > s] ** 2)
    assert (weight > 1).any() and (weight == 1).any()


# Guidance.


@every_goal
def test_without_guidance_the_aware_loss_is_the_plain_one(goal):
    """p = 0, and p = 1 with w = 1, which is no guidance, to the last bit."""
    x0, noise = _data(goal)
    teacher, student = Knowing(goal, x0, noise), Knowing(goal, x0, noise)
    teacher.off.data, student.off.data = torch.randn(2, 4).unbind()
    teaching = _teaching(goal, teacher)
    plain = step_kd.loss(teaching)
    batch = _batch(goal, x0, noise)
    expected = plain(student, _redrawn(plain, batch))
    for given in ({"p": 0.0}, {"p": 1.0, "low": 1.0, "high": 1.0}):
        aware = cfg_step_kd.loss(teaching, gamma=0.0, **given)
        drawn = _redrawn(aware, batch)
        assert (GUIDANCE in drawn.drawn) == (given["p"] == 1)
        assert torch.equal(aware(student, drawn), expected)
    other = cfg_step_kd.loss(teaching, gamma=0.0, p=1.0)
    assert other(student, _redrawn(other, batch)) != expected


def test_a_share_p_of_the_batches_is_guided_by_one_w_each():
    x0, noise = _data(None)
    batch, redraw = _batch(GOALS["flow"], x0, noise), sometimes(0.1, 2.0, 14.0)
    generator = torch.Generator().manual_seed(0)
    drawn = [redraw(batch, generator).drawn.get(GUIDANCE) for _ in range(10_000)]
    scales = torch.stack([scale for scale in drawn if scale is not None])
    assert 0.09 < len(scales) / len(drawn) < 0.11
    assert (scales == scales[:, :1]).all() and scales.min() >= 2 and scales.max() <= 14
    assert scales.mean().item() == pytest.approx(8, abs=0.5)


def test_guided_predictions_are_the_samplers():
    name, settings = "dit", {"guidance": 3.0}
    model = tiny.dense(name)
    x, t, y = tiny.inputs(name)
    expected = tiny.sampler(name, model, **settings).predict(x, t, y)
    batch = dataclasses.replace(_batch(GOALS["noise"], x, x), y=y, network_time=t)
    batch = dataclasses.replace(batch, noised=x)
    found, output = guided(model, batch, CLASSES, torch.full((len(x),), 3.0))
    torch.testing.assert_close(found, expected)
    assert torch.equal(output, model(x, t, y))


def test_an_error_that_asking_does_not_change_is_what_it_was_at_every_w():
    error = torch.randn(4, 1, 2, 2)
    for w in (1.0, 2.0, 14.0):
        found = mixed(error, error, torch.full((4,), w))
        torch.testing.assert_close(found, error)


@every_goal
def test_the_original_loss_counts_gamma_times_the_distilled_one(goal):
    """Rescaled to it, it adds that share of the value; its gradient goes on being its own."""
    x0, noise = _data(goal)
    student = Knowing(goal, x0, noise)
    student.off.data += 0.2
    teaching = _teaching(goal, Knowing(goal, x0, noise))
    losses = {gamma: step_kd.loss(teaching, gamma=gamma) for gamma in (0.0, 0.2)}
    batch = _redrawn(losses[0.0], _batch(goal, x0, noise))
    values = {gamma: loss(student, batch) for gamma, loss in losses.items()}
    assert values[0.2].item() == pytest.approx(1.2 * values[0.0].item(), rel=1e-5)


def test_what_planning_knows_of_both_is_what_they_say():
    assert entry("step_kd").parameters == {"fold": 2, "gamma": 0.0}
    aware = entry("cfg_step_kd")
    assert aware.parameters == {"fold": 2, "gamma": 0.2, "p": 0.1, "low": 2.0, "high": 14.0}
    assert aware.guides and aware.folds and aware.teacher and aware.bounded
    assert entry("velocity").predicts == "velocity" and not entry("finetune").teacher


# Every family.


def test_a_student_of_every_family_draws_in_its_own_steps_what_it_drew_before_it_was_saved(
    name, tmp_path
):
    """Its teacher's passes are the teacher's, its budget is the images that it was trained on."""
    instance, meter = tiny.INSTANCES[name], BudgetMeter()
    goal = objective({**instance.objective, **_velocity(instance)})
    teacher = meter.watch(tiny.dense(name).requires_grad_(False), "teacher")
    how = _teaching(goal, teacher, 4).sampling
    teaching = Teaching(teacher, {}, instance.conditions, objective(instance.objective), how)
    student = meter.watch(tiny.dense(name))
    data = dataclasses.replace(tiny.data(name), objective=goal)
    loop.train(student, data, tiny.settings(), images=16, seed=0, muon_names=[],
               loss=step_kd.loss(teaching), meter=meter)  # fmt: skip
    assert meter.counts["student_forward"] == meter.counts["student_backward"] == 16
    assert meter.counts["teacher_forward"] == 32 and not meter.counts["teacher_backward"]
    surgery.save(tmp_path, student, Plan(), instance.family, instance.config)
    drawn = []
    for network in (unwatched(student), surgery.load(tmp_path)[0]):
        settings = {"sampler": how.sampler, "steps": 2, "lanes": 4, "options": CLIPS[goal.name]}
        sampler = Sampler(network, goal, instance.shape, 10, settings,
                          conditions=instance.conditions)  # fmt: skip
        counts = BudgetMeter()
        counts.watch(network)
        drawn.append(torch.cat(list(sampler.images(0, 0, 4, 4))))
        assert counts.counts["student_forward"] == 2 * 4
    assert torch.equal(*drawn)


def _velocity(instance) -> dict:
    return {} if instance.objective["name"] == "flow" else {"prediction": "velocity"}
