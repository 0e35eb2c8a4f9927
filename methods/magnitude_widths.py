"""Removes the channels whose weights have the smallest squared norm, averaged over their layers.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, in the form of Diff-Pruning's
magnitude baseline: the sum of w^2 per slice, averaged over the layers of a group.
"""

from prunebench.models.precision import precise
from prunebench.selection.scores import Values, matrices, of_widths, per_channel

TITLE = "Magnitude, widths"
KIND = "widths"
CONTROL = True
NOTES = (
    "Every width is scored on the dense model, but in the as-published division, as the published "
    "baseline's tools do it, on what the cuts before it left."
)
# Diff-Pruning's magnitude baseline: the same share of every width.
RECIPE = {"sparsities": (0.3,), "parameters": {"uniform": True, "sequential": True}}
PAPER = "arXiv 1608.08710"
BIBTEX = """@inproceedings{li2017pruning,
  title = {Pruning Filters for Efficient {ConvNets}},
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}"""


def select(context, uniform=False, sequential=False):
    """Score every width by its mean squared norm.

    `uniform` gives each width the target as its own share; with `sequential` a width is scored on
    what the cuts of those before it left.
    """
    squares = Values(matrices(context.model), lambda weight: precise(weight) ** 2)
    scores = of_widths(context, norm, squares, sequential=sequential, uniform=uniform)
    return context.plan_uniform(scores) if uniform else context.plan_widths(scores)


def norm(unit, squares):
    return per_channel(unit, squares, lambda slices: slices.sum(1))
