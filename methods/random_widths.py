"""Removes channels, heads and neurons at random; every seed of a row is another mask."""

import torch

TITLE = "Random widths"
KIND = "widths"
CONTROL = True


def select(context):
    generator = context.generator()
    scores = {unit.name: torch.rand(unit.size, generator=generator) for unit in context.widths()}
    return context.plan_widths(scores)
