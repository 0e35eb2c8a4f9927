"""Removes the channels whose weights have the smallest squared norm, averaged over their layers.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, in the form of Diff-Pruning's
magnitude baseline: the sum of w^2 per slice, averaged over the layers of a group.
"""

from prunebench.models.precision import precise
from prunebench.selection.scores import Values, matrices, per_channel

TITLE = "Magnitude, widths"
KIND = "widths"
CONTROL = True
NOTES = (
    "Every width is scored on the dense model; the tools of the published baseline slice group by "
    "group and score a later one on what is left, which keeps other channels of a UNet."
)
# Diff-Pruning's magnitude baseline: the same share of every width.
RECIPE = {"sparsities": (0.3,), "parameters": {"uniform": True}}
PAPER = "arXiv 1608.08710"
BIBTEX = """@inproceedings{li2017pruning,
  title = {Pruning Filters for Efficient {ConvNets}},
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}"""


def select(context, uniform=False):
    squares = Values(matrices(context.model), lambda weight: precise(weight) ** 2)
    scores = {
        unit.name: per_channel(unit, squares, lambda slices: slices.sum(1))
        for unit in context.widths()
    }
    return context.plan_uniform(scores) if uniform else context.plan_widths(scores)
