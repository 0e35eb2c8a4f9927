"""Removes the layers whose weights are smallest on average."""

from prunebench.models.precision import precise

TITLE = "Magnitude, layers"
KIND = "layers"
CONTROL = True


def select(context):
    def magnitude(layer):
        weights = [*context.model.get_submodule(layer.name).parameters()]
        total = sum(precise(w).abs().sum() for w in weights)
        return float(total / sum(w.numel() for w in weights))

    scores = {layer.name: magnitude(layer) for layer in context.layers()}
    order = sorted(context.layers(), key=lambda layer: scores[layer.name])
    return context.plan_layers(order, magnitude=scores)
