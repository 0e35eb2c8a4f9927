"""Masks channels ever more where that raises the gradient norm of the loss, training in between.

B. Wan, T. Zheng, Z. Chen, Y. Wang, J. Wang, "Pruning for Sparse Diffusion Models Based on Gradient
Flow", ICASSP 2025, arXiv 2501.09464. A reconstruction: all that was available of the paper is what
its abstract says (progressive soft pruning along the gradient flow of an energy; a criterion that
prunes what raises the gradient norm). Formulas, schedules and constants are this suite's reading.

With m the masks, G the gradient of the loss in the effective weights m * w and H its Hessian, the
score of a group is S_g = -sum_{i in g} w_i (H G)_i, signed, and the highest go first. It is minus
the slope of 1/2 |G|^2 in m_g, so both processes follow one quantity. The mask of a channel
multiplies the weights that read it, so that it scales every path once; the group is these weights.
"""

import copy
from functools import partial
from itertools import pairwise

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunebench.errors import CellError
from prunebench.models.activations import checkpoint_activations
from prunebench.pruning import surgery, targets
from prunebench.selection.checks import check_choices
from prunebench.selection.context import unmetered
from prunebench.selection.scores import in_parts, slices
from prunebench.selection.soft_masks import full, gains, hard, masked, readers

TITLE = "Gradient flow of masks (reconstruction)"
KIND = "widths"
RECONSTRUCTION = True
FAITHFUL_TO = "abstract"
TRAINS = True
GUESSED = (
    "masks move along the gradient flow of the energy -1/2 |G|^2, as sparsity-indexed ODEs do; "
    "what raises the gradient norm to first order, with its sign, falls first"
)
NOTES = (
    "Reconstruction from the abstract: criterion, masks and schedule are this suite's reading, and "
    "there is no published number to compare with."
)
VARIANTS = {
    "unsigned": {
        "TITLE": "Gradient flow, unsigned (reconstruction)",
        "GUESSED": "as the flow of masks, but the channels whose sum of |w H G| is lowest, so that "
        "the gradient norm changes least either way, fall first",
        "parameters": {"score": "unsigned"},
    },
    "literal": {
        "TITLE": "Gradient flow, literal sign in rounds (reconstruction)",
        "GUESSED": "no flow of masks: in every round the channels whose removal raises the "
        "gradient norm most, to first order, are chosen anew, their masks lowered in equal steps",
        "parameters": {"process": "soft"},
    },
}
# The suite's proposal, to be comparable with Diff-Pruning; the paper's own recipe is not known.
RECIPE = {"recovery": "finetune", "sparsities": (0.3,), "parameters": {"uniform": True}}
CHECK = {"rounds": 1, "timesteps": 1, "batch": 4, "share": 0.5, "flow_steps": 1}
PAPER = "arXiv 2501.09464"

CHOICES = {
    "process": ("soft", "flow"),
    "schedule": ("linear", "cubic"),
    "dt": ("linear", "exponential"),
    "score": ("signed", "unsigned"),
}


def select(
    context,
    process="flow",
    rounds=10,
    schedule="linear",
    own_decay=False,
    flow_steps=100,
    r=1.1,
    dt="linear",
    score="signed",
    share=0.1,
    threshold=0.05,
    timesteps=100,
    batch=128,
    micro_batch=128,
    uniform=False,
):
    """Move the masks and train under them for `rounds` rounds, then slice.

    Args:
        process: "flow", steps along a flow of masks, or "soft", masks that fall round by round.
        schedule, own_decay: how `soft` chooses groups and lowers their masks, see there.
        flow_steps, r, dt: number, length and "linear" or "exponential" sizes of `flow`'s steps.
        score: "signed", or "unsigned": the sum of |w H G|, lowest first.
        share: of the training budget, spent in the rounds; the rest is left to the recovery.
        threshold, timesteps, batch: Diff-Pruning's gate, the times it is tested at, the images.
        micro_batch: images that pass at once; the scores are the same, the memory is less.
        uniform: give every width the target as its own share instead of the model.
    """
    check(rounds, r, process=process, schedule=schedule, dt=dt, score=score)
    trains = any(spread(context, share, rounds))
    network = copy.deepcopy(context.model) if trains else context.model
    units = context.widths()
    groups = [readers(unit, network) for unit in units]
    losses = gated(context, threshold, timesteps, batch, micro_batch)
    times = len(losses) // -(-batch // micro_batch)
    slope = partial(slopes, losses, network, groups, score == "unsigned")
    rule = targets.plan_uniform if uniform else partial(targets.plan_widths, context.model)

    def plan_at(scores, part=1.0, **notes):
        return rule(units, scores, part * context.sparsity, **notes)

    masks = full(network, units)
    if process == "soft":
        moves = soft(masks, slope, plan_at, rounds, schedule, own_decay)
    else:
        moves = flow(masks, slope, plan_at, rounds, flow_steps, r, dt)
    for after, count in zip(moves, spread(context, share, rounds), strict=True):
        before, masks = masks, after
        if count:
            with masked(network, groups, masks):
                context.train(network, count)
    told = record(process, times, before, masks, context)
    plan = plan_at(masks, **told)
    return plan, surgery.apply(unmetered(network), plan, context.family)


def check(rounds, r, **options):
    if rounds < 1 or r < 1:
        raise CellError(f"rounds is {rounds} and r is {r}; both must be at least 1")
    check_choices(CHOICES, **options)


def gated(context, threshold, timesteps, batch, micro_batch=128):
    """Losses of one batch with one noise up to Diff-Pruning's gate, each a function of weights.

    Those of a time's micro-batches sum to its mean loss.
    """
    # Blocks would be computed again after functional_call, with the model's own weights.
    checkpoint_activations(context.model, False)
    (calibration,) = context.draws(batch, batch)
    parts = in_parts(calibration, batch, micro_batch)
    highest, losses = 0.0, []

    def loss_at(t, part, share, weights):
        def model(*inputs):
            return functional_call(context.model, weights, inputs)

        return context.loss(model, context.at_time(part, t)) * share

    for t in context.data.objective.grid(timesteps):
        with torch.no_grad():
            value = sum(loss_at(t, *part, {}).item() for part in parts)
        highest = max(highest, value)
        if value < threshold * highest:
            break
        losses += [partial(loss_at, t, *part) for part in parts]
    return losses


def hessian_gradient(losses, weights):
    """H G of the summed `losses` in `weights` (which require gradients), like `weights`.

    Double backward through <G, grad L>. There G is detached: its own derivative would double the
    result. Every loss maps weights to a number; one graph at a time is alive.
    """
    leaves = list(weights.values())
    gradient, product = ([torch.zeros_like(leaf) for leaf in leaves] for _ in range(2))
    derivative = partial(torch.autograd.grad, inputs=leaves, materialize_grads=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for loss in losses:
            add(gradient, derivative(loss(weights)))
        for loss in losses:
            parts = derivative(loss(weights), create_graph=True)
            inner = sum((g * part).sum() for g, part in zip(gradient, parts, strict=True))
            add(product, derivative(inner))
    return dict(zip(weights, product, strict=True))


def add(sums, parts):
    for total, part in zip(sums, parts, strict=True):
        total.add_(part)


def slopes(losses, network, groups, absolute, masks):
    """d/dm_g of 1/2 |G(m * w)|^2 = sum_{i in g} w_i (H G)_i = -S_g for every width, [size].

    The chain rule leaves w beside H G, not m * w: a score does not fade with its own mask.
    """
    factors = gains(network, groups, masks)
    raw = {name: weight.detach() for name, weight in network.named_parameters()}
    effective = {n: w * factors[n] if n in factors else w.detach() for n, w in raw.items()}
    for weight in effective.values():
        weight.requires_grad_()
    products = hessian_gradient(losses, effective)
    terms = {name: raw[name] * products[name] for name in factors}
    if absolute:
        terms = {name: term.abs() for name, term in terms.items()}
    return {u.name: torch.cat([*slices(u, terms).values()], dim=1).sum(1) for u in groups}


def soft(masks, slope, plan_at, rounds, schedule, own_decay):
    """Masks of every round k of K: the lowest slopes are chosen anew, their masks lowered.

    The share p_k of the target that is chosen is k / K ("linear") or 1 - (1 - k / K)^3 ("cubic").
    The chosen get 1 - k / K, all others 1. With `own_decay` every mask goes to 0 or 1 in equal
    steps over the rounds left instead: 1 / K for a group that is chosen from the start.
    """
    for k in range(1, rounds + 1):
        x = k / rounds
        part = x if schedule == "linear" else 1 - (1 - x) ** 3
        goals = hard(plan_at(slope(masks), part), masks)
        if own_decay:
            masks = {n: mask.lerp(goals[n], 1 / (rounds - k + 1)) for n, mask in masks.items()}
        else:
            masks = {n: goal.clamp(min=1 - x) for n, goal in goals.items()}
        yield masks


def flow(masks, slope, plan_at, rounds, steps, r, dt):
    """Masks of every round: m <- m + dt Delta, within [0, 1]; the last ends with a threshold.

    The sparsity coordinate, the mean mask, goes from 1 to the share of channels that stay.
    """
    counts = hard(plan_at(masks), masks)  # how many stay does not depend on the scores
    sizes = step_sizes(torch.cat([*counts.values()]).mean().item(), steps, dt)
    for k in range(1, rounds + 1):
        for size in sizes[steps * (k - 1) // rounds : steps * k // rounds]:
            m, e = (torch.cat([*values.values()]) for values in (masks, slope(masks)))
            m = (m + size * direction(e, -m.sign() / len(m), r)).clamp(0, 1)
            parts = m.split([len(mask) for mask in masks.values()])
            masks = dict(zip(masks, parts, strict=True))
        yield masks if k < rounds else hard(plan_at(masks), masks)


def direction(e, s, r):
    """Delta = x e + y s with <Delta, s> = 1 and |Delta| = r / |s|; without e where it is parallel.

    e = -grad E of the energy E = -1/2 |G|^2; s = -grad of the sparsity coordinate.
    """
    e, s = e.double(), s.double()
    across = e - (e @ s) / (s @ s) * s  # |e|^2 |s|^2 - <e, s>^2 = |across|^2 |s|^2, stably
    x = ((r**2 - 1) / (s @ s)).sqrt() / across.norm()
    x = torch.where(across.norm() > 1e-6 * e.norm(), x, 0.0)
    return (x * e + (1 - x * (e @ s)) / (s @ s) * s).float()


def step_sizes(end, steps, kind):
    """`steps` steps that take the sparsity coordinate from 1 to `end`."""
    shares = [i / steps for i in range(steps + 1)]
    levels = [1 - (1 - end) * x if kind == "linear" else end**x for x in shares]
    return [high - low for high, low in pairwise(levels)]


def spread(context, share, rounds):
    """Images of every round: whole training steps, as even as they go."""
    batch = context.settings.batch
    steps = int(share * context.train_images) // batch
    return [batch * (steps * k // rounds - steps * (k - 1) // rounds) for k in range(1, rounds + 1)]


def record(process, times, before, masks, context):
    """Notes: how far masks of removed groups had gone before the last move, and training so far."""
    left = torch.cat([before[name][mask == 0] for name, mask in masks.items()]).mean().item()
    summary = f"{process}: the removed were masked to {left:.2f} before the last round"
    if context.train_images:
        part = f"{context.trained_images:,} of {context.train_images:,}"
        summary += f"; {part} images trained under soft masks"
    return {"summary": summary, "mask_before_removal": left, "times": times}
