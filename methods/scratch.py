"""A newly initialised model in the shape of a random layer mask, trained on the recovery's budget.

The control for "was there anything worth keeping?": Liu et al., "Rethinking the Value of Network
Pruning", ICLR 2019.
"""

import torch

TITLE = "Scratch"
KIND = "layers"
CONTROL = True
RECOVERY = "required"
NOTES = (
    "A random layer mask of its own; trained with the recovery's settings, not dense training's."
)
PAPER = "arXiv 1810.05270"
BIBTEX = """@inproceedings{liu2019rethinking,
  title = {Rethinking the Value of Network Pruning},
  author = {Liu, Zhuang and Sun, Mingjie and Zhou, Tinghui and Huang, Gao and Darrell, Trevor},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}"""


def select(context):
    layers = context.layers()
    order = torch.randperm(len(layers), generator=context.generator())
    plan = context.plan_layers([layers[i] for i in order])
    return plan, context.fresh(plan)
