"""Removes channels, heads and neurons at random; every seed of a row is another mask."""

import torch

TITLE = "Random widths"
KIND = "widths"
CONTROL = True
# Beside recipes that prune every width by one share, random masks do so too.
RECIPE = {"sparsities": (0.3,), "parameters": {"uniform": True}}


def select(context, uniform=False):
    generator = context.generator()
    scores = {unit.name: torch.rand(unit.size, generator=generator) for unit in context.widths()}
    return context.plan_uniform(scores) if uniform else context.plan_widths(scores)
