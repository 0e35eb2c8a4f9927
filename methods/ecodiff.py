"""Learns masks of heads and neurons that change the sampler's last latent least; the lowest go.

Zhang, Jin, Liang, Dong, Khakzar, Torr, Stegmaier, Kawaguchi, "Learnable Sparsity for Vision
Generative Models" (EcoDiff), ICLR 2026; arXiv 2412.02852. Every head and feed-forward neuron has a
score. Samples are drawn with hard-concrete masks of the scores; the loss is the squared error of
their last latents to the dense model's, plus a regulariser that pulls scores down. Gradients pass
through all steps of the sampler in the memory of one (time-step gradient checkpointing). No weight
is trained. Deviations from the authors' code: docs/methods/ecodiff.md.
"""

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from prunebench.models.conditions import each
from prunebench.pruning.targets import SCOPES
from prunebench.selection.checks import check_choices
from prunebench.selection.soft_masks import gated

TITLE = "EcoDiff"
KIND = "widths"
FAITHFUL_TO = "the authors' code"
FAMILIES = ("dit", "uvit", "conditional_unet", "flux")
NOTES = (
    "The paper's 20 % is a share of the masks; the target here is in parameters, and the note says "
    "the share. FLUX's modulation outputs, which the paper also sets to 0, keep their values: no "
    "parameter leaves with them."
)
# Their ranking, and masks drawn anew in the backward pass.
RECIPE = {"recovery": "finetune", "sparsities": (0.2,), "parameters": {"redraw": True}}
CHECK = {"prompts": 4, "epochs": 1, "accumulate": 2, "batch": 2}
PAPER = "arXiv 2412.02852"
BIBTEX = """@inproceedings{zhang2026learnable,
  title = {Learnable Sparsity for Vision Generative Models},
  author = {Zhang, Yang and Jin, Er and Liang, Wenzhong and Dong, Yanfei and Khakzar, Ashkan and
            Torr, Philip and Stegmaier, Johannes and Kawaguchi, Kenji},
  booktitle = {International Conference on Learning Representations},
  year = {2026}
}"""

UNITS = ("heads", "neurons")
ALPHA, ZETA, GAMMA = 0.83, 1.1, -0.1  # temperature, and the interval that is clipped to [0, 1]
EDGE = ALPHA * math.log(-GAMMA / ZETA)  # of the score: below, a mask is 0 in half of the draws
WARM_UP = 10  # updates
# The authors' settings, by family. Their file for DiT lacks what their code reads, and for U-ViT
# there is none: these take SDXL's.
SDXL = {"beta": 0.5, "start": 3.0, "delta": 0.5, "heads_rate": 0.1, "neurons_rate": 0.1}
FLUX = {"beta": 0.01, "start": 3.0, "delta": 0.1, "heads_rate": 0.5, "neurons_rate": 0.1}
CHOICES = {"regulariser": ("l1", "l0"), "noise": ("one", "each"), "scope": SCOPES}


@dataclass(frozen=True)
class Settings:
    """How masks are drawn and scores are learnt; see `select`."""

    beta: float
    start: float
    delta: float
    heads_rate: float
    neurons_rate: float
    regulariser: str
    squashed: bool  # whether L1 is of sigmoid(0.4 score + 1), as for FLUX
    epochs: int
    accumulate: int
    redraw: bool


def select(
    context,
    prompts=100,
    epochs=4,
    accumulate=4,
    batch=1,
    beta=-1.0,
    start=-1.0,
    delta=-1.0,
    heads_rate=-1.0,
    neurons_rate=-1.0,
    regulariser="l1",
    scope="kinds",
    noise="one",
    redraw=False,
):
    """Learn a score per head and neuron on conditions of training images and remove the lowest.

    A negative number stands for the authors' value for the model's family.

    Args:
        prompts, epochs, accumulate: conditions, passes over them, and conditions per update.
        batch: conditions that pass at once, under the same masks.
        beta: weight of the regulariser.
        start: all scores at first.
        delta: what makes the masks' noise bounded; see `hard_concrete`.
        heads_rate, neurons_rate: AdamW's learning rates.
        regulariser: "l1", the authors' code, or "l0", the paper's expected number of masks.
        scope: what is ranked together: "kinds", the code's global ranking; "global", the paper's
            one threshold for all; "local", every attention and feed-forward on its own.
        noise: "one" start for all conditions, as in the code, or one for "each".
        redraw: draw the masks anew in the backward pass, as in the code. Its gradients belong to
            other masks than its loss.
    """
    check_choices(CHOICES, regulariser=regulariser, noise=noise, scope=scope)
    is_flux = context.family.__name__.endswith("flux")
    given = (beta, start, delta, heads_rate, neurons_rate)
    published = FLUX if is_flux else SDXL
    own = {n: p if g < 0 else g for (n, p), g in zip(published.items(), given, strict=True)}
    settings = Settings(
        **own,
        regulariser=regulariser,
        squashed=is_flux,
        epochs=epochs,
        accumulate=accumulate,
        redraw=redraw,
    )
    units = [unit for unit in context.widths() if kind(unit.name) in UNITS]
    context.check_reachable(units, one_stays=scope == "local")
    lessons = taught(context, prompts, batch, noise)
    scores, losses = learnt(context, units, lessons, settings)
    plan = context.plan_ranked(scores, scope)
    return replace(plan, notes=record(units, plan, losses))


def kind(name):
    """What a width is made of: "heads" or "neurons"."""
    return name.rpartition(".")[2]


def taught(context, prompts, batch, noise):
    """What the dense model makes of the conditions: (condition, seeds, latents) of each batch."""
    asked, seeds = context.asked(prompts), context.seeds(prompts)
    seeds = seeds[:1] * prompts if noise == "one" else seeds
    sampler, lessons = context.sampler(context.teacher()), []
    for first in range(0, prompts, batch):
        rows = slice(first, first + batch)
        y = each(lambda value, rows=rows: value[rows], asked)
        with torch.no_grad():
            lessons.append((y, seeds[rows], sampler.latents(y, seeds[rows])))
    return lessons


def learnt(context, units, lessons, settings):
    """The scores of every width, [size], and the loss of every batch that passed."""
    context.model.requires_grad_(False)
    device, generator = next(context.model.parameters()).device, context.generator()
    scores = {
        unit.name: nn.Parameter(torch.full((unit.size,), settings.start, device=device))
        for unit in units
    }
    optimizer = optimizer_of(scores, settings)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / WARM_UP))
    losses = []
    with gated(context.model, units) as put:

        def draw():
            put({n: hard_concrete(s, generator, settings.delta) for n, s in scores.items()})
            return nullcontext()

        sampler = context.sampler(around=draw, generators=() if settings.redraw else (generator,))
        for lot in lots(lessons, settings, context.generator()):
            losses += accumulated(sampler, scores, lot, settings)
            optimizer.step()
            optimizer.zero_grad()
            warm_up.step()
    count = sum(map(len, scores.values()))
    context.log.info("learnt %d scores; loss %.3g, then %.3g", count, losses[0], losses[-1])
    return {name: score.detach() for name, score in scores.items()}, losses


def lots(lessons, settings, generator):
    """The batches of every update, for all epochs; each epoch has an order of its own."""
    held, size = [], 0
    for index in itertools.chain(
        *(
            torch.randperm(len(lessons), generator=generator).tolist()
            for _ in range(settings.epochs)
        )
    ):
        held.append(lessons[index])
        size += len(lessons[index][1])
        if size >= settings.accumulate:
            yield held
            held, size = [], 0
    if held:
        yield held


def accumulated(sampler, scores, lot, settings):
    """Add to the scores' gradients those of some batches' mean loss; their squared errors."""
    count, losses = sum(len(seeds) for _, seeds, _ in lot), []
    for y, seeds, latents in lot:
        loss = nn.functional.mse_loss(sampler.latents(y, seeds), latents)
        penalty = regularised(scores, settings.regulariser, settings.squashed)
        ((loss + settings.beta * penalty) * len(seeds) / count).backward()
        losses.append(loss.item())
    return losses


def optimizer_of(scores, settings):
    """AdamW with its default decay and a learning rate for each kind of width."""
    rates = {"heads": settings.heads_rate, "neurons": settings.neurons_rate}
    groups = [
        {"params": [s for name, s in scores.items() if kind(name) == of], "lr": rate}
        for of, rate in rates.items()
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def hard_concrete(scores, generator, delta):
    """A mask in [0, 1] of each score, [size]: the authors' relaxed Bernoulli draw.

    clip(s (zeta - gamma) + gamma, 0, 1) with s = sigmoid((log(u + delta) - log(1 - u + delta) +
    score) / alpha) and u uniform in (0, 1). By delta > 0 the noise is at most log(1 + 1 / delta).
    """
    u = torch.rand(scores.shape, generator=generator).to(scores.device)
    s = torch.sigmoid(((u + delta).log() - (1 - u + delta).log() + scores) / ALPHA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def regularised(scores, form, squashed):
    """The regulariser: means over a width's scores, then over widths, summed over the two kinds.

    "l1" is |score|, or sigmoid(0.4 score + 1) where `squashed`; "l0" the probability that a mask is
    not 0, sigmoid(score - alpha log(-gamma / zeta)), which is exact at delta 0.
    """
    total = 0.0
    for of in UNITS:
        parts = [score for name, score in scores.items() if kind(name) == of]
        if form == "l0":
            parts = [torch.sigmoid(score - EDGE) for score in parts]
        elif squashed:
            parts = [torch.sigmoid(0.4 * score + 1) for score in parts]
        if parts:
            total = total + torch.stack([part.abs().mean() for part in parts]).mean()
    return total


def record(units, plan, losses):
    """Notes: which share of the masks went, of each kind, and how the loss fell."""
    shares = {}
    for of in (*UNITS, "all"):
        mine = [unit for unit in units if of in (kind(unit.name), "all")]
        gone = sum(u.size - len(plan.kept.get(u.name, range(u.size))) for u in mine)
        shares[of] = gone / max(sum(unit.size for unit in mine), 1)
    tenth = max(len(losses) // 10, 1)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return {
        "summary": f"{shares['all']:.0%} of the masks",
        "mask_fraction": shares,
        "loss": {"first_tenth": first, "last_tenth": last},
    }
