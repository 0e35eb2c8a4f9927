"""Removes the layers whose weights are smallest on average."""

TITLE = "Magnitude, layers"
KIND = "layers"
CONTROL = True


def select(context):
    def magnitude(layer):
        weights = [p.detach().abs() for p in context.model.get_submodule(layer.name).parameters()]
        return float(sum(w.sum() for w in weights) / sum(w.numel() for w in weights))

    scores = {layer.name: magnitude(layer) for layer in context.layers()}
    order = sorted(context.layers(), key=lambda layer: scores[layer.name])
    return context.plan_layers(order, magnitude=scores)
