"""Removes channels whose weights' first-order Taylor terms nearly cancel, over all timesteps.

P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv
1906.10771, as the Taylor baseline of Diff-Pruning (Fang et al., arXiv 2305.10924): gradients G of
one batch and one noise accumulate over every timestep, and a channel's score is |sum of w G| over
its slice of a layer, averaged over the layers of its group (torch-pruning's `multivariable`).

Two code paths of Diff-Pruning disagree on what its row "Taylor" is; this one differs from
Diff-Pruning in the score as well as in the gate (docs/methods/taylor.md).
"""

from prunebench.selection.scores import (
    accumulate_gradients,
    matrices,
    of_widths,
    per_channel,
    taylor_terms,
)

TITLE = "Taylor, widths"
KIND = "widths"
FAITHFUL_TO = "the authors' code"
NOTES = "Diff-Pruning's baseline: all timesteps, and terms may cancel within a slice."
# Diff-Pruning's Taylor baseline: the same share of every width.
RECIPE = {"sparsities": (0.3,), "parameters": {"uniform": True, "sequential": True}}
CHECK = {"timesteps": 4, "batch": 4}
PAPER = "arXiv 1906.10771"
BIBTEX = """@inproceedings{molchanov2019importance,
  title = {Importance Estimation for Neural Network Pruning},
  author = {Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz, Jan},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}"""


def select(context, timesteps=1000, batch=128, uniform=False, sequential=False):
    """Score every width by |sum of w G|.

    `uniform` gives each width the target as its own share; with `sequential` a width is scored on
    what the cuts of those before it left.
    """
    accumulate_gradients(context, timesteps, batch)
    terms = taylor_terms(matrices(context.model))
    scores = of_widths(context, cancelling, terms, sequential=sequential, uniform=uniform)
    return context.plan_uniform(scores) if uniform else context.plan_widths(scores)


def cancelling(unit, terms):
    return per_channel(unit, terms, lambda rows: rows.sum(1).abs())
