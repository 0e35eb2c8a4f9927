"""Removes the blocks whose absence moves the entropy of the output least: lowest CED first.

C. Li et al., "Which Layer Causes Distribution Deviation? Entropy-Guided Adaptive Pruning for
Diffusion and Flow Models", arXiv 2511.21122. Conditional entropy deviation: CED_b = |H(X) - H(X |
drop block b)| with the output taken as Gaussian, so that CED_b = |log sigma_b - log sigma|.

Reconstruction: the paper's method section was not available. Pooled sigma, the number of draws and
averaging CED over classes follow the sister paper Ent-Prog (arXiv 2511.21136) and reviews. This is
the ranking only; the paper's progressive pruning during fine-tuning is not part of it.
"""

import math

import torch

TITLE = "EntPruner (CED ranking)"
KIND = "layers"
RECONSTRUCTION = True
NOTES = (
    "One-shot CED ranking; the progressive NTK/ZiCo stages are not implemented yet. The paper is "
    "about transformers; on UNets the units are ResNet blocks and attention layers."
)
PAPER = "arXiv 2511.21122"
BIBTEX = """@article{li2025entpruner,
  title = {Which Layer Causes Distribution Deviation? Entropy-Guided Adaptive Pruning for
           Diffusion and Flow Models},
  author = {Li, C. and Zhang, J. and Shi, Z. and Yang, Z. and Li, Z. and Chang, X.},
  journal = {arXiv preprint arXiv:2511.21122},
  year = {2025}
}"""


def select(context, draws=1000, batch=100, per_dimension=False):
    """Rank blocks on `draws` shared draws of (image, class, time, noise), lowest CED first.

    `per_dimension` sums log sigma over the output's dimensions instead of pooling them.
    """
    batches = context.draws(draws, batch)
    intact = entropy(context, context.model, batches, per_dimension)
    scores = {}
    for layer in context.layers():
        with context.without(layer.name) as model:
            dropped = entropy(context, model, batches, per_dimension)
        scores[layer.name] = (dropped - intact).abs().mean().item()
        if not math.isfinite(scores[layer.name]):
            raise ValueError(f"the entropy without {layer.name} is not finite: constant outputs")
        context.log.info("CED of %s: %.5f", layer.name, scores[layer.name])
    order = sorted(context.layers(), key=lambda layer: scores[layer.name])
    return context.plan_layers(order, ced=scores)


@torch.no_grad()
def entropy(context, model, batches, per_dimension):
    """log sigma of the output within each class, [classes]; constants of the Gaussian cancel."""
    outputs = torch.cat([context.predict(model, batch) for batch in batches]).double().flatten(1)
    labels = torch.cat([batch.y for batch in batches])
    within = [outputs[labels == label] for label in labels.unique()]
    if per_dimension:
        return torch.stack(
            [rows.std(0, correction=0).log().sum() for rows in within if len(rows) > 1]
        )
    return torch.stack([rows.std(correction=0).log() for rows in within])
