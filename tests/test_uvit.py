"""U-ViT: the released architecture, its long skips, and what removing parts of it means.

The sizes are those of Bao et al. 2023, Table 2, and what SparseDM masks (libs/uvit_linear.py
of wangkafeng/SparseDM). No
released checkpoint is at hand: names, token order and shapes follow the release's source.
"""

import copy

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from torch import nn

from prunebench.evaluation import cost
from prunebench.models import uvit
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.targets import plan_n_of_m
from prunebench.training import loop

TINY = tiny.INSTANCES["uvit"].config
CIFAR = {"resolution": 32, "channels": 3, "patch": 2, "width": 512, "depth": 12, "heads": 8}
IMAGENET = {"resolution": 32, "channels": 4, "patch": 2, "heads": 16, "classes": 1000}


def _meta(config: dict) -> uvit.UViT:
    with init_empty_weights(include_buffers=False):
        return uvit.build(config)


def _built(**changes) -> uvit.UViT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return uvit.build({**TINY, **changes}).eval()


def _seen(module: nn.Module, run) -> list:
    """What `module` was called with first, and what it returned, in every call during `run`."""
    calls = []
    handle = module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    with torch.no_grad():
        run()
    handle.remove()
    return calls


# The released architecture.


def test_cifar10_size_and_what_sparsedm_masks():
    """13 blocks, 52 matrices, 40,894,464 masked weights, half of them zero at 2:4."""
    model = _meta({**CIFAR, "classes": None})
    assert parameter_count(model) == 44_255_328
    assert len(uvit.features(model)) == len(uvit.layers(model, "block")) == 13
    names = uvit.weights(model)
    assert len(names) == 52
    assert sum(model.get_parameter(name).numel() for name in names) == 40_894_464
    inputs = torch.zeros(1, 3, 32, 32, device="meta"), *(torch.zeros(1, device="meta"),) * 2
    macs = cost.count_macs(model, *inputs)
    attention = macs["macs"] - macs["macs_without_attention_products"]
    assert macs["macs_without_attention_products"] / 1e9 == pytest.approx(11.32, abs=5e-3)
    assert attention / 1e9 == pytest.approx(0.88, abs=5e-3)
    zeros = {}  # all blocks have the same four shapes; masking one block tells the others
    for shape in {model.get_parameter(name).shape for name in names}:
        mask = plan_n_of_m({"w": torch.zeros(shape)}, 2, 4).masks["w"]
        zeros[shape] = int((~mask).sum())
    zeroed = sum(zeros[model.get_parameter(name).shape] for name in names)
    assert zeroed == 20_447_232
    assert zeroed / parameter_count(model) == pytest.approx(0.462, abs=5e-4)


@pytest.mark.parametrize(
    ("config", "blocks", "millions"),
    [
        ({**CIFAR, "classes": None}, 13, 44),
        (
            {**CIFAR, "resolution": 64, "patch": 4, "width": 768, "depth": 16, "heads": 12}
            | {"classes": 1000},
            17,
            131,
        ),
        ({**IMAGENET, "width": 1024, "depth": 20}, 21, 287),
        ({**IMAGENET, "width": 1152, "depth": 28, "conv": False}, 29, 501),
    ],
    ids=["small", "mid", "large", "huge"],
)
def test_published_sizes(config, blocks, millions):
    model = _meta(config)
    assert round(parameter_count(model) / 1e6) == millions
    layers = uvit.layers(model, "block")
    assert len(layers) == blocks
    width = config["width"]
    assert {layer.parameters for layer in layers} == {12 * width**2 + 10 * width}


def test_parameter_names_are_the_releases():
    model = _meta({**TINY, "mlp_time_embed": True})
    block = [
        *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
        *("norm2.weight", "norm2.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    ]
    join = ["skip_linear.weight", "skip_linear.bias"]
    expected = {
        *("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "label_emb.weight"),
        *(f"time_embed.{index}.{leaf}" for index in (0, 2) for leaf in ("weight", "bias")),
        *(f"in_blocks.{index}.{leaf}" for index in (0, 1) for leaf in block),
        *(f"mid_block.{leaf}" for leaf in block),
        *(f"out_blocks.{index}.{leaf}" for index in (0, 1) for leaf in (*block, *join)),
        *("norm.weight", "norm.bias", "decoder_pred.weight", "decoder_pred.bias"),
        *("final_layer.weight", "final_layer.bias"),
    }
    assert set(model.state_dict()) == expected
    assert model.label_emb.weight.shape == (11, 32) and model.null_class == 10
    assert model.pos_embed.shape == (1, 2 + 16, 32)
    assert model.out_blocks[0].skip_linear.weight.shape == (32, 64)
    assert {model.norm.eps, model.mid_block.norm1.eps} == {1e-5}


def test_tokens_are_class_then_time_then_patches():
    model = tiny.dense("uvit")
    x, _, y = tiny.inputs("uvit")
    t = torch.tensor([0.0, 7.5, 999.0])
    with torch.no_grad():
        tokens = model.embed(x, t, y) - model.pos_embed
    angles = t[:, None] * torch.tensor([10_000 ** (-index / 16) for index in range(16)])
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(tokens[:, 1], time, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens[:, 0], model.label_emb.weight[y], rtol=0, atol=1e-6)
    # Patch 5 of a 4 x 4 grid: second row, second column.
    patch = x[:, :, 2:4, 2:4].flatten(1) @ model.patch_embed.proj.weight.flatten(1).T
    patch = patch + model.patch_embed.proj.bias
    torch.testing.assert_close(tokens[:, 2 + 5], patch, rtol=1e-4, atol=1e-5)


def test_patch_tokens_become_pixels_of_their_patch():
    """Channel fastest, then column, then row within a patch, as the release unfolds them."""
    model = _built(channels=3)
    tokens = torch.arange(2 * 18 * 12).view(2, 18, 12)
    image = model.image(tokens, torch.Size((2, 3, 8, 8)))
    for n, row, column, p, q, channel in ((0, 0, 0, 0, 1, 2), (1, 2, 3, 1, 0, 1)):
        expected = tokens[n, 2 + 4 * row + column, (2 * p + q) * 3 + channel]
        assert image[n, channel, 2 * row + p, 2 * column + q] == expected


def test_without_classes_there_is_no_class_token_and_labels_do_not_matter():
    model, (x, t, y) = _built(classes=None), tiny.inputs("uvit")
    assert model.null_class is None and model.label_emb is None
    assert model.embed(x, t, y).shape == (3, 1 + 16, 32)
    assert torch.equal(model(x, t, y), model(x, t, y + 1))
    assert model(x, t, y).shape == x.shape


@pytest.mark.parametrize("changes", [{}, {"mlp_time_embed": True}, {"conv": False}])
def test_class_and_time_reach_the_output(changes):
    model, (x, t, y) = _built(**changes), tiny.inputs("uvit")
    output = model(x, t, y)
    null = torch.full_like(y, model.null_class)
    assert (output != model(x, t, null)).flatten(1).any(1).all()
    assert (output != model(x, t + 1, y)).flatten(1).any(1).all()


def test_an_odd_depth_is_refused():
    with pytest.raises(ValueError, match="must be even, not 5"):
        uvit.build({**TINY, "depth": 5})


def test_initial_weights_are_the_releases_and_train():
    model = _built(width=64)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    model(*tiny.inputs("uvit", 20)).square().mean().backward()
    unused = torch.zeros_like(model.label_emb.weight[model.null_class])
    assert torch.equal(model.label_emb.weight.grad[model.null_class], unused)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_training_lowers_the_loss():
    losses = loop.train(
        _built(), tiny.data("uvit"), tiny.settings(), images=30 * 8, seed=0,
        muon_names=uvit.weights(_built()),
    )  # fmt: skip
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


# Long skips.


@pytest.mark.parametrize("index", [0, 1])
def test_an_out_block_joins_its_mirror_in_block(index):
    """The output depends on each skip, and the skip is what the mirror block put out."""
    model, inputs = tiny.dense("uvit"), tiny.inputs("uvit")
    with torch.no_grad():
        expected = model(*inputs)
    mirror, joining = model.in_blocks[1 - index], model.out_blocks[index]
    [(_, put_out)] = _seen(mirror, lambda: model(*inputs))
    [(joined, _)] = _seen(joining.skip_linear, lambda: model(*inputs))
    assert torch.equal(joined[..., 32:], put_out)
    joining.skip_linear.weight.data[:, 32:] = 0
    with torch.no_grad():
        assert (model(*inputs) - expected).abs().max() > 1e-3


# Removal.


def _silenced(name: str) -> uvit.UViT:
    """A model in which the residual branches of layer `name` (block or branch) put out zero."""
    model = tiny.dense("uvit")
    path, _, leaf = name.rpartition(".")
    outgoing = {"attn": "attn.proj", "mlp": "mlp.fc2"}
    block, branches = (path, [leaf]) if leaf in outgoing else (name, list(outgoing))
    for branch in branches:
        linear = model.get_submodule(f"{block}.{outgoing[branch]}")
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_a_removed_layer_is_one_whose_branches_are_zero(granularity):
    """To the last bit, for every layer: the long skips and joins go on as they were."""
    tiny.assert_removed_layers_add_zero("uvit", granularity, _silenced)


def test_a_bypassed_in_block_still_feeds_its_long_skip():
    model, inputs = tiny.dense("uvit"), tiny.inputs("uvit")
    uvit.remove_layer(model, "in_blocks.0")
    [(joined, _)] = _seen(model.out_blocks[1].skip_linear, lambda: model(*inputs))
    with torch.no_grad():
        assert torch.equal(joined[..., 32:], model.embed(*inputs))


def test_only_the_joins_are_left_when_every_block_is_gone():
    model = tiny.dense("uvit")
    for layer in uvit.layers(model, "block"):
        uvit.remove_layer(model, layer.name)
    assert {name for name, _ in model.named_parameters() if "_block" in name} == {
        f"out_blocks.{index}.skip_linear.{leaf}" for index in (0, 1) for leaf in ("weight", "bias")
    }
    assert uvit.widths(model) == uvit.weights(model) == []


@pytest.mark.parametrize("block", ["in_blocks.1", "mid_block", "out_blocks.0"])
@pytest.mark.parametrize("order", [("attn", "mlp"), ("mlp", "attn")])
def test_both_branches_make_a_block(block, order):
    whole, one, two = (tiny.dense("uvit") for _ in range(3))
    uvit.remove_layer(one, block)
    for branch in order:
        uvit.remove_layer(two, f"{block}.{branch}")
        if branch == order[0]:  # half a block is a layer with what is left of it
            left = {layer.name: layer.parameters for layer in uvit.layers(two, "block")}
            gone = {layer.name: layer.parameters for layer in uvit.layers(whole, "branch")}
            assert left[block] == gone[f"{block}.{order[1]}"]
    tiny.assert_same(one.state_dict(), two.state_dict())
    assert torch.equal(tiny.output(one, "uvit"), tiny.output(two, "uvit"))


@pytest.mark.parametrize("bias", [False, True])
def test_removed_heads_and_neurons_are_as_good_as_disconnected(bias):
    """Head h of a fused qkv holds its own rows of q, of k and of v, with their biases."""
    model = _built(qkv_bias=bias)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=_generator()))
    units = uvit.widths(model)
    assert [unit.size for unit in units] == [4, 128] * 5
    heads = {member.tensor: member.index for member in units[0].members}
    expected = [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert heads["in_blocks.0.attn.qkv.weight"][1].tolist() == expected
    assert ("in_blocks.0.attn.qkv.bias" in heads) == bias
    cut = copy.deepcopy(model)
    for unit in units:  # channel 0 of every width goes
        outgoing = unit.members[-1]
        tensor = cut.get_parameter(outgoing.tensor).data
        tensor.index_fill_(outgoing.axis, outgoing.index[0], 0)
    surgery.shrink(model, [(unit, tuple(range(1, unit.size))) for unit in units])
    uvit.refresh(model)
    assert {block.attn.num_heads for block in uvit._blocks(model).values()} == {3}
    expected = tiny.output(cut, "uvit")
    torch.testing.assert_close(tiny.output(model, "uvit"), expected, rtol=1e-4, atol=1e-5)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def test_features_are_the_blocks_also_of_a_pruned_model():
    model, inputs = tiny.dense("uvit"), tiny.inputs("uvit")
    names = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert uvit.features(model) == dict.fromkeys(names)
    for layer in ("in_blocks.1", "out_blocks.0"):
        uvit.remove_layer(model, layer)
    assert list(uvit.features(model)) == names
    for name in names:
        [(_, feature)] = _seen(model.get_submodule(name), lambda: model(*inputs))
        assert feature.shape == (3, 18, 32)


def test_an_unconditional_model_is_saved_and_loaded(tmp_path):
    config = {**TINY, "classes": None, "qkv_bias": True, "mlp_time_embed": True, "conv": False}
    model = _built(**config)
    plan = surgery.Plan(layers=("in_blocks.0.attn", "mid_block", "out_blocks.1"))
    surgery.apply(model, plan, uvit)
    surgery.save(tmp_path, model, plan, "uvit", config)
    again, _ = surgery.load(tmp_path)
    tiny.assert_same(model.state_dict(), again.state_dict())
    assert torch.equal(tiny.output(model, "uvit"), tiny.output(again, "uvit"))
