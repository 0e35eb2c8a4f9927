"""Removes layers at random; every seed of a row is another mask."""

import torch

TITLE = "Random layers"
KIND = "layers"
CONTROL = True


def select(context):
    layers = context.layers()
    order = torch.randperm(len(layers), generator=context.generator())
    return context.plan_layers([layers[i] for i in order])
