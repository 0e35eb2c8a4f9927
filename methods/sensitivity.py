"""Removes the layers whose single removals raise the loss least.

The baseline "Sensitivity" of TinyFusion (G. Fang et al., CVPR 2025, arXiv 2412.01199): every layer
is skipped alone, on the same draws, and those that raise the training loss least go.
"""

from prunebench.selection.layer_scores import loss_without

TITLE = "Sensitivity, layers"
KIND = "layers"
FAITHFUL_TO = "TinyFusion's text"
NOTES = "One layer skipped at a time; what several cost together is not asked."
CHECK = {"draws": 6, "batch": 6}
PAPER = "arXiv 2412.01199"
RECIPE = {"sparsities": (0.5,)}
BIBTEX = """@inproceedings{fang2025tinyfusion,
  title = {{TinyFusion}: Diffusion Transformers Learned Shallow},
  author = {Fang, Gongfan and Li, Kunjun and Ma, Xinyin and Wang, Xinchao},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2025}
}"""


def select(context, draws=256, batch=64, granularity="block"):
    """Skip every layer alone on `draws` shared draws; the smallest increases go.

    Args:
        granularity: "block", or "branch" (a transformer's attention and MLP on their own).
    """
    batches, layers = context.draws(draws, batch), context.layers(granularity)
    whole = loss_without(context, (), batches)
    rise = {unit.name: loss_without(context, (unit.name,), batches) - whole for unit in layers}
    order = sorted(layers, key=lambda unit: rise[unit.name])
    return context.plan_layers(order, loss=whole, rise=rise, granularity=granularity)
