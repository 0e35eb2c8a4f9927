"""Trains under 2:4 masks that follow the weights: straight-through, pruned weights pulled to zero.

K. Wang et al., "SparseDM: Toward Sparse Efficient Diffusion Models", arXiv 2404.10445. The layers
run with m(W) * W, where m keeps the n largest |W| of every m along the input dimension and is
derived anew from the current W at every forward. The gradient passes straight through to W, pruned
entries too, plus `decay` * W on the pruned ones (SR-STE; Zhou et al. 2021, arXiv 2102.04010). The
average is of W; its mask is the plan. As published, a dense teacher joins the loss.

Reconstruction: of the paper only abstracts were readable; rule, constants and masked layers are
those of the authors' code. Whether the paper's formula has a further term is unknown.
"""

import copy
import dataclasses
import itertools

import torch
from torch import nn
from torch.nn.utils import parametrize

from prunebench.pruning.targets import n_of_m_mask, plan_n_of_m

TITLE = "SparseDM"
KIND = "weights"
RECONSTRUCTION = True
FAITHFUL_TO = "the authors' code"
TRAINS = True
RECOVERY = "required"
SPARSITIES = (0.5,)
NOTES = (
    "Trained with the track's optimiser; where that is Muon, the decay of pruned weights is "
    "orthogonalised with the gradient (authors: AdamW). 2:4 kernels exist on CUDA only."
)
RECIPE = {"recovery": "finetune", "parameters": {"kd": 0.1}}
PAPER = "arXiv 2404.10445"
BIBTEX = """@inproceedings{wang2025sparsedm,
  title = {{SparseDM}: Toward Sparse Efficient Diffusion Models},
  author = {Wang, Kafeng and Chen, Jianfei and Li, He and Mi, Zhenpeng and Zhu, Jun},
  booktitle = {IEEE International Conference on Multimedia and Expo},
  year = {2025}
}"""

LADDER = ((31, 32), (15, 16), (7, 8), (3, 4))  # of the progressive ablation, before n:m itself


def select(context, n=2, m=4, decay=2e-4, kd=0.0, progressive=False, share=1.0):
    """Train on `share` of the budget under n:m masks; what is left fine-tunes under the last one.

    Args:
        decay: pulls pruned weights to zero, through the gradient.
        kd: weight of the error to the dense model's output in the loss.
        progressive: climb 31:32, 15:16, 7:8, 3:4, n:m in equal shares instead of n:m throughout.
    """
    dense = {name: weight.detach().abs() for name, weight in context.weights().items()}
    magnitude, names = plan_n_of_m(dense, n, m), list(dense)
    dense = {name: dense[name] for name in names if name not in magnitude.masks}
    model = sparsify(copy.deepcopy(context.model), magnitude.masks)
    loss = context.distilled(kd)
    for pattern, images in stages(context, (n, m), progressive, share):
        set_pattern(model, *pattern)
        context.train(model, images, loss=loss, adjust=lambda net: decay_pruned(net, decay))
    trained = bake(model, magnitude.masks)
    plan = plan_n_of_m({name: trained.get(name, dense.get(name)) for name in names}, n, m)
    return dataclasses.replace(plan, notes=report(plan, magnitude)), model


class Sparse(nn.Module):
    """m(W) * W of a weight W, with the gradient straight through; 1:1 is dense."""

    n, m = 1, 1

    def mask(self, weight):
        """True for the n largest |W| of every m along the input dimension, in W's shape."""
        return n_of_m_mask(weight.detach().abs(), self.n, self.m)

    def forward(self, weight):
        return weight + (weight * self.mask(weight) - weight).detach()


def sparsify(model, names):
    """Prepare the named weights for a pattern; they are dense until one is set."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(path), leaf, Sparse())
    return model


def latent(model):
    """Pairs of (Sparse, dense weight W)."""
    found = [p for p in model.modules() if isinstance(p, parametrize.ParametrizationList)]
    return [(pattern[0], pattern.original) for pattern in found]


def set_pattern(model, n, m):
    """Keep n of every m from now on; where m does not divide the inputs, the old pattern stays."""
    for sparse, weight in latent(model):
        if weight.shape[1] % m == 0:
            sparse.n, sparse.m = n, m


@torch.no_grad()
def decay_pruned(model, strength):
    """Add `strength` * W to the gradient of the pruned entries.

    After the backward pass: inside it, as in the authors' code, fp16's loss scale divides it away.
    """
    for sparse, weight in latent(model):
        weight.grad.add_(strength * weight * ~sparse.mask(weight))


def stages(context, last, progressive, share):
    """The patterns to train under, `last` at the end, and the images for each, in whole steps."""
    n, m = last
    patterns = [(a, b) for a, b in LADDER if progressive and a * m > n * b] + [last]
    batch, count = context.settings.batch, len(patterns)
    steps = round(share * context.train_images) // batch
    ends = [steps * index // count for index in range(count + 1)]
    images = [(end - start) * batch for start, end in itertools.pairwise(ends)]
    return list(zip(patterns, images, strict=True))


def bake(model, names):
    """Leave m(W) * W in the layers for good; returns |W|, which the masks come from."""
    magnitudes = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        magnitudes[name] = module.parametrizations[leaf].original.detach().abs()
        parametrize.remove_parametrizations(module, leaf)
    return magnitudes


def report(plan, magnitude):
    """How far training moved the mask from the dense model's magnitude mask."""
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    new = sum(int((mask & ~magnitude.masks[name]).sum()) for name, mask in plan.masks.items())
    share, total = new / max(kept, 1), len(plan.masks) + len(plan.notes["stay_dense"])
    line = f"{plan.pattern} in {len(plan.masks)} of {total} weights; {share:.1%} of kept are new"
    return {**plan.notes, "kept_new": share, "summary": line}
