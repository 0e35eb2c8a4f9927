"""What families say can be pruned, against what removing it really does."""

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from torch import nn

from prunebench import models
from prunebench.errors import UserError
from prunebench.models.units import Member, Width, parameter_count
from prunebench.pruning.surgery import shrink
from prunebench.selection.scores import matrices, per_channel


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown model family 'dti'; known: .*dit, "):
        models.family("dti")


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_layers_state_what_their_removal_removes(name, granularity):
    family, whole = tiny.INSTANCES[name].module, tiny.dense(name)
    layers = family.layers(whole, granularity)
    assert len({layer.name for layer in layers}) == len(layers) > 1
    for layer in layers:
        model = tiny.dense(name)
        family.remove_layer(model, layer.name)
        assert parameter_count(whole) - parameter_count(model) == layer.parameters > 0
        assert layer.name not in {left.name for left in family.layers(model, granularity)}
        output = tiny.output(model, name)
        assert output.shape == tiny.output(whole, name).shape and output.isfinite().all()


def test_every_layer_can_go_at_once(name):
    family, model = tiny.INSTANCES[name].module, tiny.dense(name)
    total = sum(layer.parameters for layer in family.layers(model, "block"))
    expected = parameter_count(model) - total
    for layer in family.layers(model, "block"):
        family.remove_layer(model, layer.name)
    assert parameter_count(model) == expected
    assert family.layers(model, "block") == family.layers(model, "branch") == []
    assert tiny.output(model, name).isfinite().all()


def test_widths_state_what_their_removal_removes(name):
    """Every element a width claims is in its tensor, and removing one round removes it."""
    family, whole = tiny.INSTANCES[name].module, tiny.dense(name)
    units = family.widths(whole)
    assert len({unit.name for unit in units}) == len(units) > 1
    for unit in units:
        model, expected = tiny.dense(name), 0
        for member in unit.members:
            shape = model.get_parameter(member.tensor).shape
            assert member.index.shape[0] == unit.size
            assert member.index.unique().numel() == member.index.numel()
            assert member.index.min() >= 0 and member.index.max() < shape[member.axis]
            per_index = shape.numel() // shape[member.axis]
            expected += unit.groups * member.index.shape[1] * per_index
        shrink(model, [(unit, _balanced(unit, unit.size // unit.groups - 1))])
        family.refresh(model)
        assert parameter_count(whole) - parameter_count(model) == expected, unit.name
        assert tiny.output(model, name).isfinite().all()


def _balanced(unit: Width, per_group: int) -> tuple[int, ...]:
    block = unit.size // unit.groups
    return tuple(g * block + i for g in range(unit.groups) for i in range(per_group))


def test_all_widths_shrink_to_their_smallest(name):
    family, model = tiny.INSTANCES[name].module, tiny.dense(name)
    shrink(model, [(unit, _balanced(unit, 1)) for unit in family.widths(model)])
    family.refresh(model)
    assert all(unit.size == unit.groups for unit in family.widths(model))
    assert tiny.output(model, name).isfinite().all()


def test_maskable_weights_are_matrices_of_the_blocks(name):
    family, model = tiny.INSTANCES[name].module, tiny.dense(name)
    names = family.weights(model)
    assert len(set(names)) == len(names) > 0
    assert set(names) <= set(matrices(model))
    assert all(model.get_parameter(weight).dim() >= 2 for weight in names)
    inside = {layer.name for layer in family.layers(model, "block")}
    removed = tiny.dense(name)
    for layer in inside:
        family.remove_layer(removed, layer)
    assert set(family.weights(removed)) == set(dict(removed.named_parameters())) & set(names)


def test_zero_initialised_blocks_can_be_bypassed_bit_identically():
    """adaLN-Zero: a gate of zero makes a block the identity; so does its removal."""
    instance = tiny.INSTANCES["dit"]
    whole = tiny.dense("dit")
    for block in whole.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    expected = tiny.output(whole, "dit")
    assert expected.std() > 0.01
    state = whole.state_dict()
    for granularity in ("block", "branch"):
        for layer in instance.module.layers(whole, granularity):
            model = tiny.dense("dit")
            model.load_state_dict(state)
            instance.module.remove_layer(model, layer.name)
            assert torch.equal(tiny.output(model, "dit"), expected), layer.name


def test_fresh_blocks_of_the_papers_initialisation_are_the_identity():
    model = tiny.INSTANCES["dit"].module.build(tiny.INSTANCES["dit"].config)
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    assert not tiny.output(model, "dit").any()


@pytest.mark.parametrize("order", [("attn", "mlp"), ("mlp", "attn")])
def test_both_branches_make_a_block(order):
    family, one, two = tiny.INSTANCES["dit"].module, tiny.dense("dit"), tiny.dense("dit")
    family.remove_layer(one, "blocks.1")
    for branch in order:
        family.remove_layer(two, f"blocks.1.{branch}")
    tiny.assert_same(one.state_dict(), two.state_dict())
    assert torch.equal(tiny.output(one, "dit"), tiny.output(two, "dit"))


@pytest.mark.parametrize(("gone", "left"), [("attn", "mlp"), ("mlp", "attn")])
def test_a_removed_branch_is_a_branch_with_gate_zero(gone, left):
    family, zeroed, removed = tiny.INSTANCES["dit"].module, tiny.dense("dit"), tiny.dense("dit")
    linear = zeroed.blocks[2].adaLN_modulation[1]
    gate = slice(64, 96) if gone == "attn" else slice(160, 192)
    linear.weight.data[gate] = 0
    linear.bias.data[gate] = 0
    family.remove_layer(removed, f"blocks.2.{gone}")
    difference = tiny.output(zeroed, "dit") - tiny.output(removed, "dit")
    assert difference.abs().max() < 1e-6
    layers = {layer.name: layer.parameters for layer in family.layers(removed, "branch")}
    assert f"blocks.2.{gone}" not in layers
    assert layers[f"blocks.2.{left}"] == parameter_count(removed.blocks[2])


def test_unet_layer_removal_keeps_the_projection_where_the_width_changes():
    family, model = tiny.INSTANCES["unet"].module, tiny.dense("unet")
    projection = model.down_blocks[1].resnets[0].conv_shortcut
    x = torch.randn(1, 8, 4, 4)
    expected = projection(x)
    family.remove_layer(model, "down_blocks.1.resnets.0")
    assert torch.equal(model.down_blocks[1].resnets[0](x, None), expected)
    family.remove_layer(model, "mid_block.resnets.0")
    assert torch.equal(model.mid_block.resnets[0](expected, None), expected)


def test_heads_are_whole_heads():
    """Head h of a fused qkv holds its own rows of q, of k and of v, and nothing of another head."""
    unit = tiny.INSTANCES["dit"].module.widths(tiny.dense("dit"))[0]
    assert (unit.name, unit.size) == ("blocks.0.attn.heads", 4)
    rows = {member.tensor: member.index for member in unit.members}
    expected = [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert rows["blocks.0.attn.qkv.weight"][1].tolist() == expected
    assert rows["blocks.0.attn.proj.weight"][1].tolist() == list(range(8, 16))


@pytest.mark.parametrize("name_", ["dit", "unet", "unet_attention"])
def test_removing_a_dead_channel_changes_nothing(name_):
    """A channel without outgoing weights, in a width without normalisation, can leave silently."""
    family, model = tiny.INSTANCES[name_].module, tiny.dense(name_)
    for unit in [unit for unit in family.widths(model) if unit.groups == 1]:
        model = tiny.dense(name_)
        for member in unit.members:
            rows = member.index[0]
            model.get_parameter(member.tensor).data.index_fill_(member.axis, rows, 0)
        expected = tiny.output(model, name_)
        shrink(model, [(unit, tuple(range(1, unit.size)))])
        family.refresh(model)
        torch.testing.assert_close(tiny.output(model, name_), expected, rtol=1e-4, atol=1e-5)


def test_published_sizes():
    """DiT-XL/2 has 675.1 M parameters of which a block holds 23,905,152 (18 d^2 + 15 d)."""
    family = models.family("dit")
    with init_empty_weights(include_buffers=False):
        model = family.build(
            {"resolution": 32, "channels": 4, "patch": 2, "width": 1152, "depth": 28, "heads": 16}
            | {"classes": 1000, "learn_sigma": True}
        )
    layers = family.layers(model, "block")
    assert {layer.parameters for layer in layers} == {23_905_152}
    total = parameter_count(model) + model.pos_embed.numel()  # a buffer here, a parameter there
    assert total == 675_129_632
    for kept, millions in ((14, 340.5), (19, 460.0), (20, 483.9)):
        assert (total - (28 - kept) * 23_905_152) / 1e6 == pytest.approx(millions, abs=0.05)


def test_channel_scores_by_hand():
    """Diff-Pruning's worked example: w*G = (-2, 4) is one channel of 6 or two of 2 and 4."""
    terms = {"w": torch.tensor([[2.0, 4.0]])}
    rows = Width("row", 1, (Member("w", 0, torch.tensor([[0]])),))
    columns = Width("columns", 2, (Member("w", 1, torch.tensor([[0], [1]])),))
    raw = []
    per_channel(rows, terms, lambda slices: raw.append(slices.sum(1)) or slices.sum(1))
    assert raw[0].tolist() == [6.0]
    score = per_channel(columns, terms, lambda slices: slices.sum(1))
    torch.testing.assert_close(score, torch.tensor([2 / 3, 4 / 3]))


def test_channel_scores_average_over_layers_and_follow_the_index():
    terms = {"a": torch.tensor([[1.0, 1.0], [3.0, 3.0]]), "b": torch.tensor([[10.0, 2.0]])}
    members = (
        Member("a", 0, torch.tensor([[0], [1]])),
        Member("b", 1, torch.tensor([[1], [0]])),
        Member("bias", 0, torch.tensor([[0], [1]])),  # has no values, takes no part
    )
    score = per_channel(Width("w", 2, members), terms, lambda slices: slices.sum(1))
    means = torch.tensor([(2 + 2) / 2, (6 + 10) / 2])
    torch.testing.assert_close(score, means / means.mean())
    zero = {"a": torch.zeros(2, 2), "b": torch.zeros(1, 2)}
    assert per_channel(Width("w", 2, members), zero, lambda s: s.sum(1)).tolist() == [0.0, 0.0]
