"""Cross-attention UNets: published sizes, and what removing units of them does."""

import copy
import functools
import itertools

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from prunebench.evaluation.cost import count_macs
from prunebench.models import conditional_unet as family
from prunebench.models.unet import Shortcut
from prunebench.models.units import Width, parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.targets import most

# The keys of the public configurations that differ from diffusers' defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LDM4 = {  # cin256-v2
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": 1,
    "block_out_channels": [192, 384, 576, 960],
    "cross_attention_dim": 512,
    "down_block_types": ["DownBlock2D", *3 * ["CrossAttnDownBlock2D"]],
    "up_block_types": [*3 * ["CrossAttnUpBlock2D"], "UpBlock2D"],
    "classes": 1000,
}
PUBLISHED = {"sd15": SD15, "sdxl": SDXL}
# SDXL in miniature: several transformer blocks in a row, linear projections, added conditions.
SMALL = {
    **SDXL,
    "sample_size": 8,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [8, 16, 16],
    "cross_attention_dim": 12,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 1, 2],
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 6 * 4,
}


def _meta(config: dict) -> family.ConditionalUNet:
    with init_empty_weights(include_buffers=False):
        return family.build(config)


@functools.cache
def _trained_looking() -> family.ConditionalUNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.build(SMALL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _small() -> family.ConditionalUNet:
    return copy.deepcopy(_trained_looking())


def _inputs(config: dict = SMALL, count: int = 2) -> tuple:
    """Images, times, and a context of three tokens, with SDXL's added conditions where needed."""
    generator = torch.Generator().manual_seed(1)
    side, dim = config["sample_size"], config["cross_attention_dim"]
    y = {"context": torch.randn(count, 3, dim, generator=generator)}
    if "addition_time_embed_dim" in config:
        sizes = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        y["pooled"] = torch.randn(count, pooled, generator=generator)
        y["sizes"] = torch.tensor([[64.0, 48, 0, 8, 64, 64]]).repeat(count, 1)
    x = torch.randn(count, 4, side, side, generator=generator)
    return x, torch.arange(count) * 100 + 1, y if "pooled" in y else y["context"]


@torch.no_grad()
def _output(model: nn.Module) -> torch.Tensor:
    return model(*_inputs())


def _is_transformer(name: str) -> bool:
    return ".transformer_blocks." in name


# Published sizes, counted by hand from the configurations of SD v1.5 and SDXL.


@pytest.mark.parametrize(
    ("name_", "total", "resnets", "shortcuts", "same_width", "transformers"),
    [
        ("sd15", 859_520_964, (22, 537_670_400), 23_257_280, 8, (16, 242_408_640)),
        ("sdxl", 2_567_463_684, (17, 327_898_880), 13_423_040, 6, (70, 2_185_401_600)),
    ],
)
def test_published_sizes(name_, total, resnets, shortcuts, same_width, transformers):
    model = _meta(PUBLISHED[name_])
    assert parameter_count(model) == total
    units = family.layers(model, "block")
    residual = [unit for unit in units if not _is_transformer(unit.name)]
    blocks = [unit for unit in units if _is_transformer(unit.name)]
    whole = [model.get_submodule(unit.name) for unit in residual]
    assert (len(residual), sum(parameter_count(block) for block in whole)) == resnets
    assert sum(unit.parameters for unit in residual) == resnets[1] - shortcuts
    assert sum(block.conv_shortcut is None for block in whole) == same_width
    assert (len(blocks), sum(unit.parameters for unit in blocks)) == transformers
    branches = family.layers(model, "branch")
    assert sum(_is_transformer(unit.name) for unit in branches) == 3 * len(blocks)
    assert sum(u.parameters for u in branches) == sum(u.parameters for u in units)


@pytest.mark.parametrize(
    ("name_", "reachable", "share", "by_transformers"),
    [("sd15", 756_821_760, 0.881, 0.282), ("sdxl", 2_499_877_440, 0.974, 0.851)],
)
def test_reachable_share(name_, reachable, share, by_transformers):
    """Without ResNets among the candidates half of Stable Diffusion could not go."""
    model = _meta(PUBLISHED[name_])
    units, total = family.layers(model, "block"), parameter_count(model)
    assert sum(unit.parameters for unit in units) == reachable
    assert most(model, family, "layers") == pytest.approx(share, abs=5e-4)
    blocks = sum(unit.parameters for unit in units if _is_transformer(unit.name))
    assert blocks / total == pytest.approx(by_transformers, abs=5e-4)


@pytest.mark.parametrize(
    ("name_", "sizes"),
    [
        ("sd15", {320: (5, 2_340_160), 640: (5, 8_366_720), 1280: (6, 31_479_040)}),
        ("sdxl", {640: (10, 10_005_120), 1280: (60, 34_755_840)}),
    ],
)
def test_sizes_of_transformer_blocks(name_, sizes):
    model = _meta(PUBLISHED[name_])
    found = {}
    for unit in family.layers(model, "block"):
        if _is_transformer(unit.name):
            width = len(model.get_submodule(f"{unit.name}.norm1").weight)
            found.setdefault(width, []).append(unit.parameters)
    assert found == {width: [size] * count for width, (count, size) in sizes.items()}


def test_sizes_of_sub_layers():
    """Width 1280 of SDXL: 6,554,880 + 8,520,960 + 19,672,320, and 2 * 1280 per LayerNorm."""
    model = _meta(SDXL)
    prefix = "mid_block.attentions.0.transformer_blocks.9."
    units = {unit.name: unit.parameters for unit in family.layers(model, "branch")}
    sizes = {branch: units[prefix + branch] - 2560 for branch in ("attn1", "attn2", "ff")}
    assert sizes == {"attn1": 6_554_880, "attn2": 8_520_960, "ff": 19_672_320}


def test_ldm4_has_its_published_size_and_cost():
    """The parameters of LDM-4 on ImageNet, its class embedding, and 99.82 GMACs (Diff-Pruning)."""
    model = _meta(LDM4)
    embedding = 1001 * 512
    assert parameter_count(model.class_context) == embedding
    assert parameter_count(model) == 400_920_579 + embedding
    inputs = (torch.zeros(1, 3, 64, 64), *torch.zeros(2, 1, dtype=torch.long))
    macs = count_macs(model, *(tensor.to("meta") for tensor in inputs))
    assert macs["macs_without_attention_products"] == pytest.approx(99.82e9, rel=1e-3)


# Removing layers.


@pytest.mark.parametrize(
    ("name_", "granularity"), itertools.product(PUBLISHED, ("block", "branch"))
)
def test_a_random_set_removes_what_it_states(name_, granularity):
    """Also that the network still maps its input to its shape."""
    model = _meta(PUBLISHED[name_])
    total, units = parameter_count(model), family.layers(model, granularity)
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(4))
    chosen = [units[index] for index in order[: len(units) // 2]]
    for unit in chosen:
        family.remove_layer(model, unit.name)
    assert parameter_count(model) == total - sum(unit.parameters for unit in chosen)
    assert set(family.layers(model, granularity)) == set(units) - set(chosen)
    model.to("meta")
    x, t, y = _inputs({**PUBLISHED[name_], "sample_size": 16}, count=1)
    y = {k: v.to("meta") for k, v in y.items()} if isinstance(y, dict) else y.to("meta")
    assert model(x.to("meta"), t.to("meta"), y).shape == x.shape


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_every_single_removal_keeps_the_output_shape(granularity):
    """Every removal also changes the output, as each unit takes part."""
    expected = _output(_small())
    for unit in family.layers(_small(), granularity):
        model = _small()
        family.remove_layer(model, unit.name)
        output = _output(model)
        assert output.shape == expected.shape and output.isfinite().all()
        assert not torch.equal(output, expected), unit.name


def _zero(linear: nn.Module) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


LAST = {"attn1": "to_out.0", "attn2": "to_out.0", "ff": "net.2"}


@pytest.mark.parametrize("branch", LAST)
def test_a_removed_sub_layer_is_one_that_adds_zero(branch):
    path = "down_blocks.2.attentions.0.transformer_blocks.1"
    zeroed, removed = _small(), _small()
    _zero(zeroed.get_submodule(f"{path}.{branch}.{LAST[branch]}"))
    family.remove_layer(removed, f"{path}.{branch}")
    assert torch.equal(_output(zeroed), _output(removed))
    left = {name for name, _ in removed.get_submodule(path).named_parameters()}
    assert not any(name.startswith((branch, family.BRANCHES[branch])) for name in left) and left


@pytest.mark.parametrize(("path", "shortcut"), [("mid_block", False), ("up_blocks.1", True)])
def test_a_removed_resnet_is_one_that_adds_zero(path, shortcut):
    zeroed, removed = _small(), _small()
    block = zeroed.get_submodule(f"{path}.resnets.0")
    assert (block.conv_shortcut is not None) == shortcut
    _zero(block.conv2)
    family.remove_layer(removed, f"{path}.resnets.0")
    torch.testing.assert_close(_output(zeroed), _output(removed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", itertools.permutations(family.BRANCHES))
def test_the_last_sub_layer_takes_the_block_along(order):
    path = "mid_block.attentions.0.transformer_blocks.0"
    whole, parts = _small(), _small()
    family.remove_layer(whole, path)
    for branch in order:
        family.remove_layer(parts, f"{path}.{branch}")
    assert isinstance(parts.get_submodule(path), Shortcut)
    tiny.assert_same(whole.state_dict(), parts.state_dict())
    assert torch.equal(_output(whole), _output(parts))


# Widths.


def _reordered(model: nn.Module, unit: Width) -> family.ConditionalUNet:
    """The model with a width's channels reversed inside every normalisation group."""
    model = copy.deepcopy(model)
    order = torch.arange(unit.size).view(unit.groups, -1).flip(1).flatten()
    for member in unit.members:
        parameter = model.get_parameter(member.tensor).data
        rows = parameter.index_select(member.axis, member.index[order].flatten())
        parameter.index_copy_(member.axis, member.index.flatten(), rows)
    return model


def _in_one_block(units: list[Width]) -> list[Width]:
    places = ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0")
    return [unit for unit in units if unit.name.startswith(places)]


def test_order_of_channels_does_not_matter():
    """A width's members name all that belongs to a channel: in step they may change places."""
    whole = _small()
    expected = _output(whole)
    units = _in_one_block(family.widths(whole))
    assert {unit.name.rpartition(".")[2] for unit in units} == {"channels", "heads", "neurons"}
    for unit in units:
        torch.testing.assert_close(
            _output(_reordered(whole, unit)), expected, rtol=1e-4, atol=1e-5, msg=unit.name
        )


def test_every_member_of_a_width_matters():
    """One tensor out of step with the others, and the output is another."""
    whole = _small()
    expected = _output(whole)
    for unit in _in_one_block(family.widths(whole)):
        for member in unit.members:
            model = _reordered(whole, unit)
            model.get_parameter(member.tensor).data = whole.get_parameter(member.tensor).data
            difference = (_output(model) - expected).abs().max()
            assert difference > 1e-4, f"{member.tensor} takes no part in {unit.name}"


def test_removing_a_dead_head_or_neuron_changes_nothing():
    for unit in [u for u in _in_one_block(family.widths(_small())) if u.groups == 1]:
        model = _small()
        for member in unit.members:
            model.get_parameter(member.tensor).data.index_fill_(member.axis, member.index[0], 0)
        expected = _output(model)
        surgery.shrink(model, [(unit, tuple(range(1, unit.size)))])
        family.refresh(model)
        torch.testing.assert_close(_output(model), expected, rtol=1e-4, atol=1e-5)


def test_widths_of_published_networks():
    """One width per ResNet and feed-forward, two of heads per block; lone heads are none."""
    for config, heads in ((SD15, 8), (SDXL, 20), (LDM4, None)):
        model = _meta(config)
        blocks = [unit.name for unit in family.layers(model, "block")]
        transformers = sum(map(_is_transformer, blocks))
        units = family.widths(model)
        found = {kind: [u for u in units if u.name.endswith(kind)] for kind in ("heads", "neurons")}
        assert len(found["neurons"]) == transformers
        assert len(found["heads"]) == (2 * transformers if heads else 0)
        assert max((unit.size for unit in found["heads"]), default=None) == heads
        channels = [unit for unit in units if unit.name.endswith(".channels")]
        assert len(channels) == len(blocks) - transformers
        assert {unit.groups for unit in channels} == {32}


# The network itself.


TEXT = {key: SMALL[key] for key in SMALL if not key.startswith(("addition", "projection"))}


@pytest.mark.parametrize("config", [SMALL, {**TEXT, "use_linear_projection": False}])
def test_the_dense_network_is_diffusers_own(config):
    """To the last bit: with SDXL's added conditions, and with text alone."""
    model, (x, t, y) = family.build(config).eval(), _inputs(config)
    own = UNet2DConditionModel(**config).eval()
    assert any(isinstance(module, BasicTransformerBlock) for module in own.modules())
    own.load_state_dict(model.state_dict(), strict=True)
    context, added = y, None
    if isinstance(y, dict):
        context, added = y["context"], {"text_embeds": y["pooled"], "time_ids": y["sizes"]}
    with torch.no_grad():
        expected = own(x, t, context, added_cond_kwargs=added).sample
        assert torch.equal(model(x, t, y), expected) and expected.std() > 0.01


def test_a_class_is_one_context_token():
    """y selects a row, the last row is "no class", and the row is all that a class changes."""
    model = tiny.dense("ldm")
    x, t, y = tiny.inputs("ldm")
    assert model.null_class == tiny.CLASSES
    assert model.class_context.weight.shape == (tiny.CLASSES + 1, 8)
    seen = []
    attention = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.register_forward_pre_hook(
        lambda _, __, keywords: seen.append(keywords["encoder_hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        outputs = [model(x, t, labels) for labels in (y, torch.full_like(y, model.null_class))]
        model.class_context.weight[y] = model.class_context.weight[model.null_class].clone()
        again = model(x, t, y)
    assert seen[0].shape == (3, 1, 8)
    assert not torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], again)


# Feature distillation.


def _features(model: nn.Module) -> dict[str, torch.Tensor]:
    """What forward hooks on the family's feature points see; a down block's output is a tuple."""
    seen, hooks = {}, []

    def keep(name: str, output: torch.Tensor | tuple) -> None:
        seen[name] = output[0] if name.startswith("down") else output

    for name in family.features(model):
        module = model.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda _, __, out, name=name: keep(name, out)))
    _output(model)
    for hook in hooks:
        hook.remove()
    return seen


def test_features_are_the_blocks_outputs_and_keep_their_shape():
    shapes = {name: tuple(value.shape) for name, value in _features(_small()).items()}
    assert shapes == {
        "down_blocks.0": (2, 8, 4, 4),
        "down_blocks.1": (2, 16, 2, 2),
        "down_blocks.2": (2, 16, 2, 2),
        "up_blocks.0": (2, 16, 4, 4),
        "up_blocks.1": (2, 16, 8, 8),
        "up_blocks.2": (2, 8, 8, 8),
    }
    assert set(family.features(_small()).values()) == {None}
    narrow, empty = _small(), _small()
    halves = [
        (unit, torch.arange(unit.size).view(unit.groups, -1)[:, ::2].flatten().tolist())
        for unit in family.widths(narrow)
    ]
    surgery.shrink(narrow, halves)
    family.refresh(narrow)
    for unit in family.layers(empty, "block"):
        family.remove_layer(empty, unit.name)
    for model in (narrow, empty):
        assert {name: tuple(v.shape) for name, v in _features(model).items()} == shapes


def test_stable_diffusion_has_eight_features():
    """BK-SDM matches four down and four up blocks, not the middle."""
    names = family.features(_meta(SD15))
    expected = [f"{side}_blocks.{index}" for side in ("down", "up") for index in range(4)]
    assert list(names) == expected
