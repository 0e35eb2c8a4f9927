"""Wanda: its score, its rows, and what layers read."""

import pytest
import tiny
import torch
from torch import nn

from prunebench.errors import CellError
from prunebench.selection.layer_inputs import matrix, patches, squares, unmatrix
from prunebench.tracks import methods

FOUND = tiny.found_methods()
select = methods.load(FOUND["wanda"])
GLOBALS = select.__globals__


def _conv(**changes: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 3, **{"kernel_size": 3, "padding": 1, "stride": 2, **changes})


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), _conv(), _conv(kernel_size=1, padding=0)])
def test_patches_times_the_matrix_is_what_the_layer_computes(layer):
    x = torch.randn(2, 7, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 8, 6)
    rows = patches(layer, x) @ matrix(layer.weight).T + layer.bias
    expected = layer(x)
    if expected.dim() == 4:
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(rows, expected.flatten(0, -2))
    total = patches(layer, x).double().square().sum(0)
    torch.testing.assert_close(squares(layer, x), total)
    assert torch.equal(unmatrix(matrix(layer.weight), layer.weight.shape), layer.weight)


def test_norms_are_those_of_all_inputs_of_the_draws():
    context = tiny.context("dit")
    norms = GLOBALS["input_norms"](context, context.draws(6, 4))
    seen, model = [], tiny.dense("dit")
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in tiny.context("dit").draws(6, 4):
            context.predict(model, batch)
    expected = torch.cat(seen).flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(norms["blocks.1.mlp.fc2.weight"].float(), expected)
    assert len(norms) == len(context.weights())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_equal_activations_leave_magnitude_per_row(pattern, monkeypatch):
    """With norms of one, the kept weights of a row are its largest."""
    monkeypatch.setitem(GLOBALS, "input_norms", _ones)
    context = tiny.context("unet", sparsity=0.4)
    plan = select(context, pattern=pattern)
    for name, mask in plan.masks.items():
        weight = context.model.get_parameter(name).detach().abs()
        if pattern == "2:4":
            groups = [t.movedim(1, -1).unflatten(-1, (-1, 4)) for t in (weight, mask)]
        else:
            groups = [t.flatten(1) for t in (weight, mask)]
        low = groups[0].where(groups[1], torch.inf).amin(-1)
        high = groups[0].where(~groups[1], -torch.inf).amax(-1)
        assert (low >= high).all()


def _ones(context: object, _: object) -> dict[str, torch.Tensor]:
    weights = context.weights().items()
    return {name: torch.ones(weight[0].numel()) for name, weight in weights}


def test_rows_lose_alike_and_all_together_what_is_asked():
    context = tiny.context("dit", sparsity=0.3)
    plan = select(context, draws=4, batch=4)
    total = sum(p.numel() for p in context.model.parameters())
    gone = sum(int((~mask).sum()) for mask in plan.masks.values())
    assert gone == round(0.3 * total)
    share = gone / sum(mask.numel() for mask in plan.masks.values())
    for mask in plan.masks.values():
        lost = (~mask).sum(1)
        assert ((lost - share * mask.shape[1]).abs() < 1.1).all()


def test_loud_inputs_keep_their_weights():
    """A column whose inputs are a thousand times louder loses nothing."""
    model = tiny.dense("dit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[7] *= 1000
        model.blocks[0].mlp.fc1.bias[7] = 1000.0
    plan = select(tiny.context("dit", model, sparsity=0.3), draws=4, batch=4)
    assert plan.masks["blocks.0.mlp.fc2.weight"][:, 7].all()
    assert not plan.masks["blocks.0.mlp.fc2.weight"].all(0).all()


@pytest.mark.parametrize("pattern", ["2of4", "2:", "half"])
def test_an_unknown_pattern_is_refused(pattern):
    with pytest.raises(CellError, match=f"'{pattern}' is neither 'unstructured' nor N:M"):
        select(tiny.context("dit"), draws=4, batch=4, pattern=pattern)
