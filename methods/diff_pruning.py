"""Removes channels with the smallest first-order Taylor term, summed over the less noisy timesteps.

G. Fang, X. Ma, X. Wang, "Structural Pruning for Diffusion Models", NeurIPS 2023, arXiv 2305.10924.
One calibration batch and one noise; gradients accumulate over ascending timesteps until the loss
falls below `threshold` times its running maximum, tested before the gradient is taken. A channel's
score is the sum of |w * gradient| over its slice, averaged over the layers of its group, as in the
authors' Diffusers scripts.
"""

from prunebench.pruning.scores import matrices, per_channel

TITLE = "Diff-Pruning"
KIND = "widths"
NOTES = (
    "Parameter target of the table instead of the paper's channel ratio. The paper is about noise "
    "prediction in UNets; a velocity loss does not fall below the gate: flow models use all times."
)
PAPER = "arXiv 2305.10924"
BIBTEX = """@inproceedings{fang2023structural,
  title = {Structural Pruning for Diffusion Models},
  author = {Fang, Gongfan and Ma, Xinyin and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""


def select(context, threshold=0.05, timesteps=1000, batch=128):
    """Accumulate gradients over `timesteps` evenly spaced times; `threshold` 0 uses all of them."""
    stopped = accumulate(context, threshold, timesteps, batch)
    terms = {
        name: (weight * weight.grad).detach().abs()
        for name, weight in matrices(context.model).items()
        if weight.grad is not None
    }
    scores = {
        unit.name: per_channel(unit, terms, lambda slices: slices.sum(1))
        for unit in context.widths()
    }
    return context.plan_widths(scores, stopped_at=stopped, timesteps=timesteps)


def accumulate(context, threshold, timesteps, batch):
    """Sum gradients in `.grad` up to the gate; returns the index of the first time left out."""
    (calibration,) = context.draws(batch, batch)
    highest = 0.0
    for index, t in enumerate(context.data.objective.grid(timesteps)):
        loss = context.loss(context.model, context.at_time(calibration, t))
        highest = max(highest, loss.item())
        if loss.item() < threshold * highest:
            return index
        loss.backward()
    return timesteps
