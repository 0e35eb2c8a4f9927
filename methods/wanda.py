"""Zeroes in every row the weights that are small where inputs are small: |W| times a norm.

M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
arXiv 2306.11695. S_ij = |W_ij| * ||X_j||_2, X_j what goes into column j over all calibration
tokens, here over draws at the times of training; the lowest of each row, or of every M of a row,
go. Weights that stay are not changed.
"""

import torch

from prunebench.errors import CellError
from prunebench.pruning.targets import n_and_m, plan_n_of_m
from prunebench.selection.layer_inputs import matrix, squares, unmatrix, watched

TITLE = "Wanda"
KIND = "weights"
FAITHFUL_TO = "the authors' code"
NOTES = "Made for language models; masks bring no speed on dense kernels."
CHECK = {"draws": 6, "batch": 6}
PAPER = "arXiv 2306.11695"
BIBTEX = """@inproceedings{sun2024wanda,
  title = {A Simple and Effective Pruning Approach for Large Language Models},
  author = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}"""
VARIANTS = {
    "2_4": {
        "TITLE": "Wanda, 2:4",
        "SPARSITIES": (0.5,),
        "NOTES": "Half of each matrix; 2:4 kernels exist on CUDA only.",
        "parameters": {"pattern": "2:4"},
    },
}

GOLDEN = 0.618034  # its multiples are spread evenly between whole numbers


def select(context, draws=128, batch=64, pattern="unstructured"):
    """Measure all inputs on `draws` draws in one pass through the dense network.

    Args:
        pattern: "unstructured", every row of every matrix losing the same share; or "N:M".
    """
    numbers = n_and_m(pattern)
    if pattern != "unstructured" and numbers is None:
        raise CellError(f"pattern '{pattern}' is neither 'unstructured' nor N:M, as '2:4'")
    norms = input_norms(context, context.draws(draws, batch))
    scores = {
        name: unmatrix(importance(weight, norms[name]), weight.shape).cpu()
        for name, weight in context.weights().items()
    }
    if pattern == "unstructured":
        return context.plan_weights({name: place_in_row(s) for name, s in scores.items()})
    return plan_n_of_m(scores, *numbers)


@torch.no_grad()
def input_norms(context, batches):
    """||X_j||_2 of every column of every weight that may be masked, [columns], by name."""
    model, names = context.model, list(context.weights())
    totals = dict.fromkeys(names, 0.0)

    def take(name, inputs):
        totals[name] = totals[name] + squares(layers[name], inputs)

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    with watched(model, names, take):
        for batch in batches:
            context.predict(model, batch)
    return {name: torch.as_tensor(total).sqrt() for name, total in totals.items()}


def importance(weight, norm):
    """|W_ij| * ||X_j||, [rows, columns]."""
    return matrix(weight.detach()).abs() * norm.to(weight.device).float()


def place_in_row(score):
    """Of each weight about the share of its row that scores lower, in the scores' shape.

    Ranking these places over the whole network takes the same share of every row, and as many
    weights in all as the target asks for; rows that lose one more than others are spread evenly.
    """
    rows = score.flatten(1)
    places = rows.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    offsets = torch.arange(len(rows)).mul(GOLDEN).frac().unsqueeze(1)
    return ((places + offsets) / rows.shape[1]).view(score.shape)
