"""Removes, stage by stage during fine-tuning, the layers whose absence moves output entropy least.

C. Li et al., "Which Layer Causes Distribution Deviation? Entropy-Guided Adaptive Pruning for
Diffusion and Flow Models", arXiv 2511.21122. Layers are ranked by conditional entropy deviation,
CED_b = |H(X) - H(X | drop block b)| with the output taken as Gaussian, so that CED_b = |pi_b|,
pi_b = log sigma_b - log sigma. Then, in each of four stages, NTK condition number and ZiCo vote on
how many layers go now, and what is left is fine-tuned at a constant rate; after the last removal
recovery does that, with the falling rate and an average begun anew.

Reconstruction: the paper's method section was not available. Pooled sigma, the number of draws and
averaging CED over classes follow the sister paper Ent-Prog (arXiv 2511.21136) and reviews; proxies,
ranks and ties are the same author's AutoProg-Zero's. See docs/methods/entpruner.md.
"""

import copy
import math
from functools import partial

import torch

from prunebench.models.copies import without
from prunebench.models.units import parameter_count
from prunebench.selection.proxies import ntk_condition, vote, zico

TITLE = "EntPruner"
KIND = "layers"
TRAINS = True
RECONSTRUCTION = True
FAITHFUL_TO = "abstract, reviews, the authors' related code"
RECIPE = {"recovery": "finetune", "sparsities": (0.5,)}
NOTES = (
    "Without a training budget it is the one-shot CED ranking. The paper is about transformers; on "
    "UNets the units are ResNet blocks and attention layers."
)
# Untrained, EntPruner's own row is the same.
VARIANTS = {
    "one_shot": {
        "TITLE": "EntPruner, one-shot CED",
        "TRAINS": False,
        "RECOVERY": "required",
        "NOTES": "EntPruner's ranking with all layers removed at once: no stages and no vote.",
        "parameters": {"stages": 1},
    }
}
NEEDS_CLASSES = True  # ranks how outputs of one class vary
CHECK = {
    "draws": 20,
    "batch": 20,
    "proxy_batch": 2,
    "ntk_batches": 1,
    "zico_batches": 1,
    "stages": 2,
    "share": 1.0,
}
PAPER = "arXiv 2511.21122"
BIBTEX = """@article{li2025entpruner,
  title = {Which Layer Causes Distribution Deviation? Entropy-Guided Adaptive Pruning for
           Diffusion and Flow Models},
  author = {Li, C. and Zhang, J. and Shi, Z. and Yang, Z. and Li, Z. and Chang, X.},
  journal = {arXiv preprint arXiv:2511.21122},
  year = {2025}
}"""


def select(
    context,
    draws=1000,
    batch=100,
    per_dimension=False,
    granularity="block",
    stages=4,
    share=0.25,
    rerank=False,
    time_rank=False,
    proxy_batch=16,
    ntk_batches=16,
    zico_batches=2,
):
    """Rank on `draws` shared draws of (image, class, time, noise), then prune in `stages` stages.

    The stages spend `share` of the training budget at most, the recovery after them the rest.
    `per_dimension` sums log sigma over the output's dimensions instead of pooling them. `rerank`
    ranks the survivors anew at every stage. `time_rank` adds AutoProg-Zero's rank by time to the
    vote, as a rank by parameters: a clock would give one seed several plans.
    """
    batches = context.draws(draws, batch)
    rank = partial(ranked, context, batches=batches, per_dimension=per_dimension)
    order, notes = rank(context.model, context.layers(granularity))
    step = context.settings.batch
    images = int(share * context.train_images) // stages // step * step
    if not (images or rerank):  # votes would decide when layers go, but no longer which
        plan = context.plan_layers(order, **notes, summary="one-shot: no training between stages")
        return plan, without(context.model, context.family, plan.layers)
    ntk, noisy = (context.draws(proxy_batch * n, proxy_batch) for n in (ntk_batches, zico_batches))

    def choose(networks):
        kappa = [ntk_condition(network, ntk, context.predict) for network in networks]
        scores = [zico(network, noisy, context.loss) for network in networks]
        return vote(kappa, scores, [parameter_count(n) for n in networks if time_rank])

    order, votes, model = prune(context, order, stages, images, choose, rank if rerank else None)
    summary = when(votes, images // step, context.train_images // step)
    return context.plan_layers(order, **notes, votes=votes, summary=summary), model


def when(votes, steps, total):
    """At which step of the cell's training layers went, in words."""
    gone = [(len(vote["removed"]), stage * steps) for stage, vote in enumerate(votes)]
    told = [f"{count} at step {step}" for count, step in gone if count]
    return f"layers removed: {', '.join(told)} of {total}"


def prune(context, order, stages, images, choose, rank):
    """The order in which layers went, every stage's vote, and the model, trained between stages."""
    model, votes, removed = copy.deepcopy(context.model), [], []
    for stage in range(1, stages + 1):
        survivors, ranking = [layer for layer in order if layer not in removed], {}
        if rank and votes:
            survivors, ranking = rank(model, survivors)
        order = removed + survivors
        final = context.plan_layers(order).layers
        queue = [layer for layer in order if layer.name in final]
        counts = candidates(len(removed), len(queue), stage, stages)
        steps = [[layer.name for layer in queue[len(removed) : count]] for count in counts]
        networks = [without(model, context.family, names) for names in steps]
        best, ballot = choose(networks) if len(networks) > 1 else (0, {})
        model, removed = networks[best], queue[: counts[best]]
        votes.append({"candidates": counts, **ballot, "removed": steps[best], **ranking})
        context.log.info("stage %d of %d: %s", stage, stages, votes[-1])
        if removed == queue:  # only fine-tuning would follow, and that is recovery's
            break
        context.train(model, images, before_removal=True)
    return order, votes, model


def candidates(removed, target, stage, stages):
    """How many layers may be gone after a stage: as many as now, or more of an even schedule."""
    points = range(stage + 1) if stage < stages else [stages]
    return sorted({max(removed, math.ceil(point * target / stages)) for point in points})


def ranked(context, model, layers, batches, per_dimension):
    """Layers by ascending CED, tied ones in the given order; CED and signed pi by name."""
    intact = log_sigmas(context, model, batches)
    pi = {}
    for layer in layers:
        dropped = log_sigmas(context, without(model, context.family, [layer.name]), batches)
        pi[layer.name] = [after - before for after, before in zip(dropped, intact, strict=True)]
    ced, other = (
        {name: values[form].abs().mean().item() for name, values in pi.items()}
        for form in (per_dimension, not per_dimension)
    )
    for name, value in ced.items():
        if not math.isfinite(value):
            raise ValueError(f"the entropy without {name} is not finite: constant outputs")
    signed = {name: values[per_dimension].mean().item() for name, values in pi.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in other.items()}
    unused = "pooled" if per_dimension else "per_dimension"
    notes = {"ced": ced, "pi": signed, f"ced_{unused}": finite}
    return sorted(layers, key=lambda layer: ced[layer.name]), notes


@torch.no_grad()
def log_sigmas(context, model, batches):
    """log sigma of the output, pooled and summed over dimensions, each [classes].

    What else a Gaussian's entropy has cancels. Classes of one draw only have the pooled form.
    """
    outputs = torch.cat([context.predict(model, batch) for batch in batches]).double().flatten(1)
    labels = torch.cat([batch.y for batch in batches])
    within = [outputs[labels == label] for label in labels.unique()]
    pooled = [rows.std(correction=0).log() for rows in within]
    each = [rows.std(0, correction=0).log().sum() for rows in within if len(rows) > 1]
    return torch.stack(pooled), torch.stack(each or [torch.tensor(math.nan)])
