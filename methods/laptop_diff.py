"""Removes the layers whose single removals change the output least in sum: an exact knapsack.

D. Zhang et al., "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion
Models", arXiv 2404.11098. The one-shot criterion of a layer is its output loss, the mean squared
change of the prediction when that layer alone is bypassed, scored once on the dense model. The
paper's ground for adding up single losses is their additivity, which is measured here.

Reconstruction: no code is public and only the paper's opening could be read. Candidates, number of
draws, their times (the model's own training law: uniform for noise prediction), the 0-1 knapsack
over all parameters and its solver are not the authors' text. For the paper's recovery see
prunebench/recovery/normalised_kd.py.
"""

import math

import numpy
from scipy.optimize import LinearConstraint, milp

from prunebench.errors import CellError
from prunebench.models.units import parameter_count
from prunebench.pruning.plan import Plan
from prunebench.selection.layer_scores import output_loss, predictions

TITLE = "LAPTOP-Diff"
KIND = "layers"
RECONSTRUCTION = True
FAITHFUL_TO = "the paper's opening"
NOTES = (
    "Output-loss scores and an exact knapsack; only the paper's opening was available. It is about "
    "text-to-image UNets; on transformers the units are whole blocks."
)
CHECK = {"draws": 40, "batch": 20}
PAPER = "arXiv 2404.11098"
RECIPE = {"recovery": "normalised_kd", "sparsities": (0.5,)}
BIBTEX = """@article{zhang2024laptop,
  title = {{LAPTOP-Diff}: Layer Pruning and Normalized Distillation for Compressing Diffusion
           Models},
  author = {Zhang, Dingkun and Li, Sijia and Chen, Chen and Xie, Qingsong and Lu, Haonan},
  journal = {arXiv preprint arXiv:2404.11098},
  year = {2024}
}"""


def select(context, draws=256, batch=64, granularity="block", slack=0.5):
    """Score every layer on `draws` shared draws and solve the knapsack.

    Args:
        granularity: "block" or "branch" (a transformer's attention and MLP on their own).
        slack: share of the smallest layer by which the removed parameters may fall short of the
            target. 0 is the strict constraint; with equal layers 0.5 is the nearest number of them.
    """
    layers = context.layers(granularity)
    batches = context.draws(draws, batch)
    reference = predictions(context, context.model, batches)
    scores = {unit.name: output_loss(context, (unit.name,), batches, reference) for unit in layers}
    sizes = {unit.name: unit.parameters for unit in layers}
    target = context.sparsity * parameter_count(context.model) - slack * min(sizes.values())
    removed = cover(scores, sizes, math.ceil(target))
    context.log.info("removes %s of %d layers", ", ".join(removed) or "none", len(layers))
    joint = output_loss(context, removed, batches, reference)
    notes = {
        "output_loss": scores,
        "granularity": granularity,
        "share_of_prunable": sum(sizes[name] for name in removed) / sum(sizes.values()),
        **additivity(joint, sum(scores[name] for name in removed)),
    }
    return Plan(layers=removed, notes=notes)


def additivity(joint, single):
    """Whether the loss of the set is the sum of its layers' losses, as the criterion assumes."""
    ratio = joint / single if single else None
    shown = "no sum" if ratio is None else f"joint/sum = {ratio:.2f}"
    losses = {"joint": joint, "sum": single, "ratio": ratio}
    return {"additivity": losses, "summary": f"additivity: {shown}"}


def cover(scores, sizes, required):
    """The layers with the smallest sum of scores that hold at least `required` parameters.

    Args:
        scores, sizes: score (at least 0) and number of parameters of each layer, by name.

    Returns:
        Their names, sorted; none of them could stay without falling short of `required`.

    Raises:
        CellError: all layers together hold less than `required`.
    """
    names = sorted(scores)
    held = sum(sizes.values())
    if held < required:
        raise CellError(
            f"{required} parameters have to go but the {len(names)} layers hold {held}; "
            "lower the sparsity"
        )
    if required <= 0:
        return ()
    costs, weights = (numpy.array([part[name] for name in names]) for part in (scores, sizes))
    # HiGHS takes 1 - 1e-6 for 1: a solution that falls short in whole numbers is cut off, by the
    # fact that every cover has a layer that it lacks.
    constraints = [LinearConstraint(weights / required, lb=1)]
    while weights @ (chosen := _cheapest(costs, constraints)) < required:
        constraints.append(LinearConstraint(~chosen, lb=1))
    removed = [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]
    return _irredundant(removed, sizes, required)


def _cheapest(costs, constraints):
    """The solution with the smallest sum of costs, bool [layers]."""
    # HiGHS stops at an absolute gap of 1e-6, which must be nothing beside the scores.
    scale = 1e6 / costs.sum() if costs.any() else 1.0
    answer = milp(
        costs * scale,
        integrality=numpy.ones(len(costs)),
        bounds=(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if not answer.success:
        raise CellError(f"the knapsack was not solved: {answer.message}")
    return answer.x > 0.5


def _irredundant(chosen, sizes, required):
    """Layers that cost nothing may be chosen in excess; put back what the cover does not need."""
    needed = set(chosen)
    for name in sorted(chosen, key=lambda name: -sizes[name]):
        if sum(sizes[other] for other in needed) - sizes[name] >= required:
            needed.remove(name)
    return tuple(sorted(needed))
