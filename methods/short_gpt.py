"""Removes the blocks that turn the hidden states least: Block Influence.

X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
2403.03853: BI_i = 1 - E[cos(h_i, h_i+1)] over tokens, h_i the hidden state in front of block i, for
language models. On diffusion transformers it is a baseline of TinyFusion (arXiv 2412.01199).
"""

from torch.nn.functional import cosine_similarity

from prunebench.selection.layer_scores import influences

TITLE = "ShortGPT"
KIND = "layers"
FAITHFUL_TO = "abstract, TinyFusion's code"
NOTES = "Made for language models: it asks how far a block turns its input, at all times alike."
CHECK = {"draws": 6, "batch": 6}
PAPER = "arXiv 2403.03853"
RECIPE = {"sparsities": (0.5,)}
BIBTEX = """@inproceedings{men2025shortgpt,
  title = {{ShortGPT}: Layers in Large Language Models are More Redundant Than You Expect},
  author = {Men, Xin and Xu, Mingyu and Zhang, Qingyu and Yuan, Qianhao and Wang, Bingning and
            Lin, Hongyu and Lu, Yaojie and Han, Xianpei and Chen, Weipeng},
  booktitle = {Findings of the Association for Computational Linguistics},
  year = {2025}
}"""


def select(context, draws=256, batch=64):
    """Measure every block's influence on `draws` draws in one pass; the lowest go."""
    influence = influences(context, context.draws(draws, batch), turned)
    order = sorted(context.layers(), key=lambda layer: influence[layer.name])
    return context.plan_layers(order, block_influence=influence)


def turned(before, after):
    """1 - cosine of hidden states [rows, width] before and behind a block, [rows]."""
    return 1 - cosine_similarity(before, after, dim=1)
