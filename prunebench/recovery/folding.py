"""Step distillation: one step of the student where its teacher takes several.

The teacher follows the track's deterministic sampler from a time t through `fold` steps to t'', and
the student is to arrive there in one. What it has to see as the clean image for that is

    x* = (z'' - (s''/s) z) / (a'' - (s''/s) a)

with z = a x + s noise at t, z'' the teacher's arrival (Salimans & Ho 2022, arXiv 2202.00512,
appendix G; SnapFusion, Li et al., NeurIPS 2023, arXiv 2306.00980, eq. 7 to 9). DDIM and Euler's
method on a flow are one and the same step here: from the image x and the noise e that a prediction
implies to a'' x + s'' e.
"""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from prunebench.diffusion import samplers
from prunebench.recovery import Teaching
from prunebench.recovery.guidance import GUIDANCE, Redraw, guided, unchanged
from prunebench.training.loop import Batch, Drawing, loss_of

Levels = tuple[Tensor, Tensor]  # a and s


@dataclass(frozen=True)
class Path:
    """The times that the teacher visits, and how much image and noise there is at each.

    Attributes:
        times: descending, [steps].
        image, noise: a and s at these times and where the path ends, [steps + 1].
        fold: steps of the teacher that are one of the student's.
        clip: whether the sampler clips images to [-1, 1].
    """

    times: Tensor
    image: Tensor
    noise: Tensor
    fold: int
    clip: bool

    def levels(self, index: Tensor) -> Levels:
        """a and s at the places [N] of the path, [N, 1, 1, 1]."""
        a, s = (table.to(index.device)[index] for table in (self.image, self.noise))
        return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)


def path_of(teaching: Teaching, fold: int) -> Path:
    """The path of the teacher's sampler.

    Raises:
        UserError: its steps can't be folded.
    """
    how, goal = teaching.sampling, teaching.objective
    found = samplers.folded(how.sampler, how.options, how.steps, goal.train_steps, fold)
    ends = found[-1]
    visited = torch.tensor(found[:-1] + ([] if ends is None else [ends]))
    image, noise = goal.levels(visited)
    if ends is None:
        image, noise = torch.cat([image, image.new_ones(1)]), torch.cat([noise, noise.new_zeros(1)])
    clip = getattr(how.options, "clip_sample", False)
    return Path(visited[: how.steps], image, noise, fold, clip)


def step(image: Tensor, noise: Tensor, levels: Levels, clip: bool = False) -> Tensor:
    """A deterministic step to other levels, by what is predicted, all [N, C, H, W]."""
    a, s = levels
    return a * (image.clamp(-1, 1) if clip else image) + s * noise


def implied(arrival: Tensor, start: Tensor, to: Levels, at: Levels) -> Tensor:
    """x*: the image with which one step from `start` ends at `arrival`, [N, C, H, W]."""
    ratio = to[1] / at[1]
    return (arrival - ratio * start) / (to[0] - ratio * at[0])


def weight(at: Levels) -> Tensor:
    """max(SNR, 1): errors count as errors of the noise where there is little of it."""
    return (at[0] / at[1]).square().clamp_min(1)


def begun(batch: Batch, path: Path, generator: Generator) -> Batch:
    """The batch at random times among those that the student visits.

    `drawn["place"]` is where on the path each image is, int64 [N].
    """
    students = len(path.times) // path.fold
    place = path.fold * torch.randint(students, (len(batch.x0),), generator=generator)
    place = place.to(batch.x0.device)
    t = path.times.to(place.device)[place]
    goal = batch.objective
    noised, target = goal.noised(batch.x0, batch.noise, t)
    drawn = {**batch.drawn, "place": place}
    return replace(
        batch, t=t, noised=noised, target=target, network_time=goal.model_time(t), drawn=drawn
    )


@torch.no_grad()
def taught(teaching: Teaching, batch: Batch, path: Path, scale: Tensor | None) -> Tensor:
    """x* of a batch that `begun` made, with the teacher guided by `scale`, [N, C, H, W]."""
    goal, place = teaching.objective, batch.drawn["place"]
    z, now = batch.noised, batch
    for number in range(path.fold):
        t = path.times.to(z.device)[place + number]
        now = replace(now, noised=z, t=t, network_time=goal.model_time(t))
        prediction, _ = guided(teaching.teacher, now, teaching.conditions, scale)
        image, noise = goal.parts(prediction, z, t)
        z = step(image, noise, path.levels(place + number + 1), path.clip)
    return implied(z, batch.noised, path.levels(place + path.fold), path.levels(place))


def student_error(prediction: Tensor, batch: Batch, path: Path, target: Tensor) -> Tensor:
    """max(SNR, 1) ||x - x*||^2, a mean over all entries, []."""
    image, _ = batch.objective.parts(prediction, batch.noised, batch.t)
    return (weight(path.levels(batch.drawn["place"])) * (image - target).square()).mean()


def folded(teaching: Teaching, fold: int, gamma: float, redraw: Redraw = unchanged) -> Drawing:
    """L = L_dstl + gamma * sg(L_dstl / L_ori) * L_ori, SnapFusion's eq. 11.

    Where `redraw` draws guidance for a batch (`guidance.drawn`), every prediction in L_dstl, the
    teacher's and the student's, is guided by it. L_ori is the model's own loss at the same input,
    rescaled to the size of the other. The paper says that it is rescaled, not how.
    """
    path = path_of(teaching, fold)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scale = batch.drawn.get(GUIDANCE)
        target = taught(teaching, batch, path, scale)
        prediction, output = guided(model, batch, teaching.conditions, scale)
        distilled = student_error(prediction, batch, path, target)
        if not gamma:
            return distilled
        original = loss_of(output, batch)
        return distilled + gamma * (distilled / original).detach() * original

    return Drawing(loss, lambda batch, generator: redraw(begun(batch, path, generator), generator))
