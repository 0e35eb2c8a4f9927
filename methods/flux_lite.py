"""Removes the blocks whose output differs least from their input in squared error.

Freepik's Flux.1 Lite, https://huggingface.co/Freepik/flux.1-lite-8B-alpha: its authors measured the
mean squared error between input and output of every block of FLUX.1-dev, and distilled a network
without some of them. As "Flux-Lite" it is a baseline of TinyFusion (arXiv 2412.01199), which ranks
by the error. Reconstruction: the model card has no formula, list of blocks or training recipe.
"""

from prunebench.selection.layer_scores import influences

TITLE = "Flux-lite"
KIND = "layers"
RECONSTRUCTION = True
FAITHFUL_TO = "the model card"
NOTES = (
    "The block error is the model card's; that blocks of the smallest error go is TinyFusion's "
    "reading. Errors grow with the hidden states' scale, so that late blocks look important."
)
CHECK = {"draws": 6, "batch": 6}
PAPER = "Freepik/flux.1-lite-8B-alpha"
RECIPE = {"sparsities": (0.5,)}
BIBTEX = """@misc{flux1lite,
  title = {Flux.1 Lite: Distilling Flux1.dev for Efficient Text-to-Image Generation},
  author = {Verdu, Daniel and Martin, Javier},
  year = {2024},
  howpublished = {huggingface.co/Freepik/flux.1-lite-8B-alpha}
}"""


def select(context, draws=256, batch=64):
    """Measure every block's error on `draws` draws in one pass; the lowest go."""
    error = influences(context, context.draws(draws, batch), squared_change)
    order = sorted(context.layers(), key=lambda layer: error[layer.name])
    return context.plan_layers(order, block_error=error)


def squared_change(before, after):
    """Mean squared difference of hidden states [rows, width] before and behind a block, [rows]."""
    return (after - before).square().mean(1)
