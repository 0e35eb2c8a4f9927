"""Removes channels with the smallest first-order Taylor term, summed over the less noisy timesteps.

G. Fang, X. Ma, X. Wang, "Structural Pruning for Diffusion Models", NeurIPS 2023, arXiv 2305.10924.
One calibration batch and one noise; gradients G accumulate over ascending timesteps until the loss
falls below `threshold` times its running maximum. The authors' code (github.com/VainF/Diff-Pruning)
scores a channel in two ways:

- path "b" (their Diffusers scripts, the default): the sum of |w G| over a channel's slice of a
  layer, averaged over the convolutions and matrices of its group;
- path "a" (`ddpm_exp`, which made the paper's tables): the sum of (w G)^2 over all slices plus
  |gamma G| of the group's normalisations, for layers that hold a channel as often as the first.

Deviations: docs/methods/diff_pruning.md.
"""

from collections import ChainMap
from dataclasses import replace

import torch

from prunebench.errors import CellError
from prunebench.selection.scores import (
    accumulate_gradients,
    group_norms,
    matrices,
    of_widths,
    per_channel,
    slices,
    taylor_terms,
)

TITLE = "Diff-Pruning"
KIND = "widths"
FAITHFUL_TO = "the authors' code"
NOTES = (
    "Parameter target of the table instead of the paper's channel ratio, which the as-published "
    "division has. The paper is about noise prediction in UNets; a velocity loss does not fall "
    "below the gate: flow models use all times."
)
RECIPE = {
    "recovery": "finetune",
    "sparsities": (0.3,),
    "parameters": {"uniform": True, "path": "a", "loss": "sum", "sequential": True},
}
CHECK = {"timesteps": 4, "batch": 4}
PAPER = "arXiv 2305.10924"
BIBTEX = """@inproceedings{fang2023structural,
  title = {Structural Pruning for Diffusion Models},
  author = {Fang, Gongfan and Ma, Xinyin and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""


def select(
    context,
    threshold=0.05,
    timesteps=1000,
    batch=128,
    stop="before",
    path="b",
    uniform=False,
    loss="mean",
    sequential=False,
):
    """Score every width by gated Taylor terms and remove its lowest channels.

    Args:
        threshold: share of the largest loss at which the gate closes; 0 never closes it.
        timesteps: evenly spaced times, of which the paper uses all 1000.
        stop: "before" or "after": whether the gate is tested before or after the backward pass.
        path: "a" or "b", see above.
        uniform: give every width the target as its own share (the paper) instead of the model.
        loss: squared errors' "mean" or, in `ddpm_exp`, their "sum" over C, H and W. It changes
            path "a" only, which adds squared and plain terms.
        sequential: score a width on what the cuts of those before it left, as the authors' tool
            does, instead of all on the dense model.
    """
    if path not in ("a", "b") or loss not in ("mean", "sum"):
        raise CellError(f"path '{path}' must be 'a' or 'b' and loss '{loss}' 'mean' or 'sum'")
    used = accumulate_gradients(context, timesteps, batch, threshold, stop)
    # A sum over C, H and W is their number times the mean, and so are its gradients.
    scale = context.data.images[0].numel() if loss == "sum" else 1
    score, values = mixed(context.model, scale) if path == "a" else absolute(context.model)
    scores = of_widths(context, score, values, sequential=sequential, uniform=uniform)
    plan = context.plan_uniform if uniform else context.plan_widths
    summary = f"gradients of {used} of {timesteps} times"
    return plan(scores, stopped_at=used, timesteps=timesteps, summary=summary)


def absolute(model):
    """Path "b": a function from a width and values to its scores, [size], and the values."""
    values = taylor_terms(matrices(model))
    return lambda unit, terms: per_channel(unit, terms, lambda rows: rows.abs().sum(1)), values


def mixed(model, scale=1):
    """Path "a", as `absolute`; `scale` multiplies the gradients."""
    squares = taylor_terms(matrices(model), lambda term: (scale * term) ** 2)
    norms = taylor_terms(group_norms(model), lambda term: (scale * term).abs())

    def score(unit, values):
        often = unit.members[0].index.shape[1]
        same = tuple(member for member in unit.members if member.index.shape[1] == often)
        terms = slices(replace(unit, members=same), values).values()
        return torch.stack([rows.sum(1) for rows in terms]).sum(0)

    return score, ChainMap(squares, norms)
