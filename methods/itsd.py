"""Removes the blocks that cost the model least per parameter, measured on shared draws.

H. Wang and H. Wang, "Improved Techniques for Training Smaller and Faster Stable Diffusion", ICLR
2025 workshop on deep generative models. Its abstract says that weight blocks are pruned by an
improved "performance sensitivity"; more of it was not available, so that the criterion itself is
a guess: S_b = (P(M) - P(M without b)) / n_b with n_b the block's parameters, which is SnapFusion's
quality lost per latency gained (Y. Li et al. 2023) with parameters in place of latency.

P is minus the squared change of the output at equal noise ("output") or minus the training loss
("loss"), where the paper may have used a metric of images. `greedy` scores the blocks that are left
anew after each removal. See docs/methods/itsd.md.
"""

from prunebench.selection.layer_scores import greedy, loss_without, output_loss, predictions

TITLE = "ITSD, sensitivity"
KIND = "layers"
RECONSTRUCTION = True
FAITHFUL_TO = "abstract"
GUESSED = "sensitivity is the squared change of the output per parameter, scored once"
NOTES = "Only the abstract was available. The paper's losses and step distillation are recoveries."
CHECK = {"draws": 6, "batch": 6}
PAPER = "OpenReview t9m14jybcI"
VARIANTS = {
    "loss": {
        "GUESSED": "sensitivity is the rise of the training loss per parameter, scored once",
        "parameters": {"measure": "loss"},
    },
    "re_scored": {
        "TITLE": "ITSD, sensitivity: scored anew",
        "GUESSED": "as by output, but the blocks left are scored anew after each removal",
        "parameters": {"re_score": True},
    },
}
MEASURES = ("output", "loss")


def select(context, draws=256, batch=64, measure="output", re_score=False, granularity="block"):
    """Rank blocks by what their absence costs per parameter on `draws` shared draws.

    Args:
        measure: "output", the squared change of the prediction, or "loss", the rise of the loss.
        re_score: take one block at a time and score the others anew without it.
        granularity: "block", or "branch" (a transformer's attention and MLP on their own).
    """
    if measure not in MEASURES:
        raise ValueError(f"measure '{measure}' is none of {', '.join(MEASURES)}")
    batches, layers = context.draws(draws, batch), context.layers(granularity)
    cost = COSTS[measure](context, batches)

    def sensitivity(gone, unit):
        return (cost([*gone, unit.name]) - cost(gone)) / unit.parameters

    if re_score:
        order, rounds = greedy(context, layers, sensitivity)
    else:
        rounds = [{unit.name: sensitivity([], unit) for unit in layers}]
        order = sorted(layers, key=lambda unit: rounds[0][unit.name])
    return context.plan_layers(order, measure=measure, sensitivity=rounds)


def output_cost(context, batches):
    """What the removal of layers costs as squared change of the prediction; nothing costs 0."""
    reference = predictions(context, context.model, batches)
    return lambda names: output_loss(context, names, batches, reference) if names else 0.0


def loss_cost(context, batches):
    """What the removal of layers costs as loss; every set of layers is measured once."""
    known = {}

    def cost(names):
        key = tuple(sorted(names))
        if key not in known:
            known[key] = loss_without(context, key, batches)
        return known[key]

    return cost


COSTS = {"output": output_cost, "loss": loss_cost}
