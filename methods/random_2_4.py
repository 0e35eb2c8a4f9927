"""Keeps two random weights of every four along the input dimension; every seed is another mask."""

import torch

from prunebench.pruning.targets import plan_n_of_m

TITLE = "Random, 2:4"
KIND = "weights"
CONTROL = True
SPARSITIES = (0.5,)
RECOVERY = "required"
NOTES = "Half of each matrix at random; untrained it draws noise, so it is only shown recovered."


def select(context):
    generator = context.generator()
    scores = {
        name: torch.rand(weight.shape, generator=generator)
        for name, weight in context.weights().items()
    }
    return plan_n_of_m(scores, 2, 4)
