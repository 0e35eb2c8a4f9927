"""FLUX: published sizes and costs, its conventions, and what removing units of it does.

No released weights were at hand: names, shapes and arithmetic are compared with diffusers' own
class, sizes with counts made by hand and with what EcoDiff masks (YaNgZhAnG-V5/EcoDiff, hooks).
"""

import copy
import itertools
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from safetensors.torch import save_file
from torch import Tensor, nn

from prunebench import models
from prunebench.diffusion.objectives import objective
from prunebench.errors import UserError
from prunebench.evaluation.cost import count_macs
from prunebench.models import flux, official
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.targets import Sizes, most
from prunebench.recovery.distillation import captured

PUBLISHED = models.published("flux")
DEV, SCHNELL = (PUBLISHED[f"flux_{name}"].config for name in ("dev", "schnell"))
WIDTH, HEAD, TOKENS, TEXT = 3072, 128, 64 * 64, 512  # 1024 pixels: latents of 128 x 128
TINY = tiny.INSTANCES["flux"].config
TEXT_TINY = {key: value for key, value in TINY.items() if key != "classes"}


def _meta(config: dict) -> flux.Flux:
    with init_empty_weights(include_buffers=False):
        return flux.build(config)


def _full_inputs(text: int = TEXT) -> tuple:
    y = {"context": torch.zeros(1, text, 4096), "pooled": torch.zeros(1, 768)}
    y = {name: value.to("meta") for name, value in y.items()}
    return torch.zeros(1, 16, 128, 128, device="meta"), torch.zeros(1, device="meta"), y


def _built(config: dict) -> flux.Flux:
    """With every parameter moved off its initial value, so that nothing is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = flux.build(config)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _inputs(channels: int = 1, rows: int = 6, columns: int = 4, dtype=torch.float32) -> tuple:
    """Latents that are not square, and a text of three tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, rows, columns, generator=generator).to(dtype)
    y = {
        "context": torch.randn(2, 3, 8, generator=generator).to(dtype),
        "pooled": torch.randn(2, 8, generator=generator).to(dtype),
    }
    return x, torch.tensor([0.25, 1.0]), y


# Published sizes and costs.


@pytest.mark.parametrize(("config", "total"), [(DEV, 11_901_408_320), (SCHNELL, 11_891_178_560)])
def test_published_sizes(config, total):
    """36 d^2 + 30 d + 4 heads' norms in a double, 15 d^2 + 11 d + 2 in a single block."""
    model = _meta(config)
    assert parameter_count(model) == total
    double = 36 * WIDTH**2 + 30 * WIDTH + 4 * HEAD
    single = 15 * WIDTH**2 + 11 * WIDTH + 2 * HEAD
    layers = flux.layers(model, "block")
    assert [layer.parameters for layer in layers] == [double] * 19 + [single] * 38
    branches = flux.layers(model, "branch")
    assert len(branches) == 3 * 19 + 38
    assert sum(u.parameters for u in branches) == sum(u.parameters for u in layers)
    feed_forward = 8 * WIDTH**2 + 5 * WIDTH + 3 * WIDTH * (WIDTH + 1)
    sizes = {unit.name: unit.parameters for unit in branches[:3]}
    attention = double - 2 * feed_forward
    assert sizes == {
        "transformer_blocks.0.attn": attention,
        "transformer_blocks.0.ff": feed_forward,
        "transformer_blocks.0.ff_context": feed_forward,
    }


def test_the_guidance_embedder_is_what_tells_dev_from_schnell():
    names = [{name for name, _ in _meta(c).named_parameters()} for c in (DEV, SCHNELL)]
    assert {name.rpartition(".")[0] for name in names[0] ^ names[1]} == {
        f"time_text_embed.guidance_embedder.linear_{index}" for index in (1, 2)
    }
    assert _meta(DEV).guidance_scale == 3.5 and _meta(SCHNELL).guidance_scale is None
    assert _meta({**DEV, "guidance_scale": 1}).guidance_scale == 1


@pytest.mark.parametrize(("name_", "text"), [("flux_dev", 512), ("flux_schnell", 256)])
def test_published_cost(name_, text):
    """Of the collected facts: 37,192 GMACs of FLUX-dev at 1024 pixels, 29,756 without products."""
    entry = PUBLISHED[name_]
    model = _meta(entry.config)
    macs = count_macs(model, *_full_inputs(text))
    tokens, square = TOKENS + text, WIDTH**2
    blocks = 19 * (tokens * 12 * square + 12 * square) + 38 * (tokens * 12 * square + 3 * square)
    embedders = TOKENS * 64 * WIDTH + text * 4096 * WIDTH
    condition = (256 + 768) * WIDTH + 2 * square  # time, pooled text
    if entry.config["guidance_embeds"]:
        condition += 256 * WIDTH + square
    head = 2 * square + TOKENS * WIDTH * 64
    linears = blocks + embedders + condition + head
    products = 57 * 2 * tokens**2 * WIDTH
    assert macs == {"macs": linears + products, "macs_without_attention_products": linears}
    assert macs == {name: getattr(entry, name) for name in macs}
    assert parameter_count(model) == entry.parameters
    if name_ == "flux_dev":
        assert [round(value / 1e9) for value in macs.values()] == [37_192, 29_756]


def test_widths_are_what_ecodiff_masks():
    """1,368 heads and 933,888 neurons; 20 % fewer of each leave about 9.52 B parameters.

    The latter with 20 % of the modulations' 1,050,624 outputs, which are no widths here. How the
    release rounds is not known: 9.51 B where each block loses 5 of 24 heads, 9.53 B unrounded.
    """
    model = _meta(DEV)
    units = flux.widths(model)
    counts = {
        kind: sum(unit.size for unit in units if unit.name.endswith(kind))
        for kind in ("heads", "neurons")
    }
    assert counts == {"heads": 1_368, "neurons": 933_888}
    sizes = Sizes(model, units)
    share = 0.2 * sum(unit.size * sizes.removed({unit.name: 1}) for unit in units)
    linears = [
        m.linear for m in model.modules() if hasattr(m, "linear") and m is not model.norm_out
    ]
    assert sum(linear.out_features for linear in linears) == 1_050_624
    modulations = 0.2 * sum(map(parameter_count, linears))
    assert (sizes.total - share - modulations) / 1e9 == pytest.approx(9.52, abs=0.02)


def test_what_can_go_of_the_published_network():
    model = _meta(DEV)
    assert most(model, flux, "layers") == pytest.approx(0.9946, abs=5e-5)
    assert most(model, flux, "widths") == pytest.approx(0.713, abs=5e-4)
    names = flux.weights(model)
    assert len(names) == 19 * 12 + 38 * 5
    matrices = 19 * 24 * WIDTH**2 + 38 * 12 * WIDTH**2
    assert sum(model.get_parameter(name).numel() for name in names) == matrices


def test_full_size_is_built_and_pruned_without_memory():
    """Everything is on the meta device; the pruned networks still map latents to their shape."""
    narrow, shallow = _meta(DEV), _meta(DEV)
    assert not list(narrow.buffers())
    plan = surgery.Plan(
        kept={unit.name: tuple(range(0, unit.size, 2)) for unit in flux.widths(narrow)}
    )
    surgery.apply(narrow, plan, flux)
    layers = [f"transformer_blocks.{index}" for index in range(1, 19, 2)]
    layers += [f"single_transformer_blocks.{index}" for index in range(0, 38, 3)]
    layers += ["transformer_blocks.0.attn", "transformer_blocks.2.ff_context"]
    surgery.apply(shallow, surgery.Plan(layers=tuple(layers)), flux)
    x, t, y = _full_inputs()
    for model in (narrow, shallow):
        assert all(parameter.is_meta for parameter in model.parameters())
        with torch.no_grad():
            assert model(x[..., :16, :32], t, y).shape == (1, 16, 16, 32)
    assert {module.heads for module in narrow.modules() if hasattr(module, "heads")} == {12}


# The network itself.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance", [True, False])
def test_the_dense_network_is_diffusers_own(guidance, dtype):
    """To the last bit, from latents packed as FluxPipeline packs them."""
    config = {**TEXT_TINY, "guidance_embeds": guidance}
    model, (x, t, y) = _built(config).to(dtype), _inputs(dtype=dtype)
    own = FluxTransformer2DModel(**config).eval().to(dtype)
    assert isinstance(own.single_transformer_blocks[0], FluxSingleTransformerBlock)
    own.load_state_dict(model.state_dict(), strict=True)
    packed = x.view(2, 1, 3, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 4)
    ids = torch.tensor([[0, row, column] for row in range(3) for column in range(2)])
    with torch.no_grad():
        expected = own(
            packed,
            y["context"],
            y["pooled"],
            t,
            ids.to(dtype),
            torch.zeros(3, 3),
            torch.full((2,), 3.5) if guidance else None,
            return_dict=False,
        )[0]
        expected = expected.view(2, 3, 2, 1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        assert torch.equal(model(x, t, y), expected) and expected.std() > 0.01


def test_tokens_are_patches_row_by_row_and_times_run_to_a_thousand():
    model, (x, t, y) = _built({**TEXT_TINY, "in_channels": 8}), _inputs(channels=2)
    names = ("x_embedder", "pos_embed", "time_text_embed.time_proj")
    seen = {name: [] for name in names}
    for name in names:
        hook = model.get_submodule(name).register_forward_pre_hook
        hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    with torch.no_grad():
        assert model(x, t, y).shape == x.shape
    (tokens,), (ids,), times = (seen[name] for name in names)
    for row, column, channel, p, q in itertools.product(range(3), *4 * [range(2)]):
        pixel = x[:, channel, 2 * row + p, 2 * column + q]
        assert torch.equal(tokens[:, 2 * row + column, 4 * channel + 2 * p + q], pixel)
    assert ids.tolist() == [[0, 0, 0]] * 3 + [[0, r, c] for r in range(3) for c in range(2)]
    assert times[0].tolist() == [250, 1000] and times[1].tolist() == [3500, 3500]


def test_the_flow_objective_counts_time_as_flux_does():
    """0 is clean, 1 is noise, the target points from the image to the noise, t goes in as it is."""
    goal = objective(tiny.INSTANCES["flux"].objective)
    image, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    t = torch.tensor([0.0, 1.0])
    noised, target = goal.noised(image, noise, t)
    assert torch.equal(noised, torch.stack([image[0], noise[0]]))
    assert torch.equal(target, noise - image)
    assert torch.equal(goal.model_time(t), t)


def test_a_class_is_one_context_token_and_one_pooled_vector():
    """The last row is "no class", and the rows are all that a class changes."""
    model, (x, t, y) = tiny.dense("flux"), tiny.inputs("flux")
    null = torch.full_like(y, model.null_class)
    assert model.null_class == tiny.CLASSES
    for table in (model.class_context, model.class_pooled):
        assert table.weight.shape == (tiny.CLASSES + 1, 8)
        with torch.no_grad():
            outputs = [model(x, t, labels) for labels in (y, null)]
            assert (outputs[0] != outputs[1]).flatten(1).any(1).all()
            table.weight[y] = table.weight[model.null_class].clone()
    with torch.no_grad():
        assert torch.equal(model(x, t, y), outputs[1])


def test_guidance_reaches_the_output():
    weak, strong = (_built({**TEXT_TINY, "guidance_scale": scale}) for scale in (1.0, 7.0))
    tiny.assert_same(weak.state_dict(), strong.state_dict())
    assert not torch.equal(weak(*_inputs()), strong(*_inputs()))


def _checkpoint(folder: Path, change: dict[str, Tensor]) -> Path:
    """Diffusers' own network saved as it publishes FLUX, with some tensors changed."""
    state = FluxTransformer2DModel(**TEXT_TINY).to(torch.bfloat16).state_dict()
    save_file(state | change, folder / "diffusion_pytorch_model.safetensors")
    return folder / "diffusion_pytorch_model.safetensors"


def test_a_published_checkpoint_is_read_straight_to_its_dtype(tmp_path):
    file = _checkpoint(tmp_path, {})
    model = official.load("flux", TEXT_TINY, file, "diffusers", torch.bfloat16)
    own = official.read(file)
    tiny.assert_same(dict(model.state_dict()), own)
    assert next(iter(own.values())).dtype == torch.bfloat16


def test_a_checkpoint_that_does_not_fit_names_its_first_wrong_key(tmp_path):
    key = "transformer_blocks.0.attn.to_q.weight"
    cases = {
        rf"'{key}' is bfloat16 \(8, 32\), not float \(32, 32\)": {
            key: torch.zeros(8, 32, dtype=torch.bfloat16)
        },
        "'transformer_blocks.0.spare' is unexpected": {"transformer_blocks.0.spare": torch.ones(1)},
    }
    for message, change in cases.items():
        file = _checkpoint(tmp_path, change)
        with pytest.raises(UserError, match=message):
            official.load("flux", TEXT_TINY, file, "diffusers")
    with pytest.raises(
        UserError, match=r"'transformer_blocks\.2\.norm1\.linear\.weight' is missing"
    ):
        official.load(
            "flux", {**TEXT_TINY, "num_layers": 3}, _checkpoint(tmp_path, {}), "diffusers"
        )


# Removing layers.

OUTPUTS = {  # of every branch, the layers that write to a residual stream
    "attn": ("attn.to_out.0", "attn.to_add_out"),
    "ff": ("ff.net.2",),
    "ff_context": ("ff_context.net.2",),
}


def _silenced(layer: str) -> flux.Flux:
    """The dense model with zeros where a layer writes to the streams."""
    model = tiny.dense("flux")
    path, _, leaf = layer.rpartition(".")
    if leaf in OUTPUTS:
        names = [f"{path}.{output}" for output in OUTPUTS[leaf]]
    elif layer.startswith("single"):
        names = [f"{layer}.proj_out"]
    else:
        names = [f"{layer}.{output}" for outputs in OUTPUTS.values() for output in outputs]
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_a_removed_layer_is_one_that_adds_zero(granularity):
    """To the last bit, in both streams."""
    tiny.assert_removed_layers_add_zero("flux", granularity, _silenced)


@pytest.mark.parametrize("order", itertools.permutations(flux.BRANCHES))
def test_the_last_branch_takes_the_block_along(order):
    whole, parts = tiny.dense("flux"), tiny.dense("flux")
    flux.remove_layer(whole, "transformer_blocks.1")
    for index, branch in enumerate(order):
        before = {unit.name: unit.parameters for unit in flux.layers(parts, "branch")}
        size = parameter_count(parts)
        flux.remove_layer(parts, f"transformer_blocks.1.{branch}")
        assert size - parameter_count(parts) == before[f"transformer_blocks.1.{branch}"]
        left = [unit.name for unit in flux.layers(parts, "branch")]
        expected = [f"transformer_blocks.1.{b}" for b in flux.BRANCHES if b in order[index + 1 :]]
        assert [name for name in left if name.startswith("transformer_blocks.1")] == expected
    assert isinstance(parts.transformer_blocks[1], flux.Bypass)
    tiny.assert_same(whole.state_dict(), parts.state_dict())
    assert torch.equal(tiny.output(whole, "flux"), tiny.output(parts, "flux"))


@pytest.mark.parametrize("kind", ["none", "block", "branch", "widths"])
def test_gradients_are_the_same_with_activation_checkpointing(kind):
    """What lets a trajectory through FLUX be differentiated on one GPU; pruned blocks keep it."""
    plain = surgery.apply(tiny.dense("flux"), tiny.plan("flux", kind), flux)
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        model.train()(*tiny.inputs("flux")).square().mean().backward()
    used = [p.grad for p in plain.parameters() if p.grad is not None]
    assert len(used) > len(list(plain.parameters())) // 2
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)


# Widths.


def _mask_inputs(model: flux.Flux, name: str, gone: Tensor) -> None:
    """Zero columns of what a layer reads, in the forward pass: the layer's weights stay whole."""

    def hook(_: nn.Module, inputs: tuple) -> tuple:
        return (inputs[0].index_fill(-1, gone, 0),)

    model.get_submodule(name).register_forward_pre_hook(hook)


def _gone(index: list[int], block: int) -> Tensor:
    return torch.cat([torch.arange(block) + block * i for i in index])


def _masked() -> tuple[flux.Flux, dict[str, list[int]]]:
    """A dense model whose heads and neurons are masked as EcoDiff does, and what it masks.

    A head's attended values are masked in front of the output projections, of both streams; a
    neuron behind its activation. In a single block both stand in front of `proj_out`.
    """
    model, gone = tiny.dense("flux"), {}
    for index in range(2):
        double, single = f"transformer_blocks.{index}", f"single_transformer_blocks.{index}"
        heads, neurons = [1 + index], [0, 5 + index, 127]
        for projection in ("to_out.0", "to_add_out"):
            _mask_inputs(model, f"{double}.attn.{projection}", _gone(heads, 8))
        for branch in ("ff", "ff_context"):
            _mask_inputs(model, f"{double}.{branch}.net.2", torch.tensor(neurons))
            gone[f"{double}.{branch}.neurons"] = neurons
        both = torch.cat([_gone([0, 3], 8), 32 + torch.tensor(neurons)])
        _mask_inputs(model, f"{single}.proj_out", both)
        gone |= {f"{double}.attn.heads": heads, f"{single}.heads": [0, 3]}
        gone[f"{single}.neurons"] = neurons
    return model, gone


def test_slicing_computes_what_masking_does():
    """Masked and sliced agree, double and single blocks; also part by part and saved in between."""
    masked, gone = _masked()
    expected = tiny.output(masked, "flux")
    model = tiny.dense("flux")
    assert (expected - tiny.output(model, "flux")).abs().max() > 1e-2
    units = {unit.name: unit for unit in flux.widths(model)}
    assert units.keys() == gone.keys()
    assert {name: unit.size for name, unit in units.items()} == {
        name: 4 if name.endswith("heads") else 128 for name in gone
    }
    for kind in ("heads", "neurons"):  # the second cut finds its columns after the first
        kept = {
            unit.name: tuple(i for i in range(unit.size) if i not in gone[unit.name])
            for unit in flux.widths(model)
            if unit.name.endswith(kind)
        }
        surgery.apply(model, surgery.Plan(kept=kept), flux)
    torch.testing.assert_close(tiny.output(model, "flux"), expected, rtol=1e-4, atol=1e-5)
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    assert [block.attn.heads for block in blocks] == [3, 3, 2, 2]
    assert model.single_transformer_blocks[0].proj_out.in_features == 2 * 8 + 125


def test_a_width_removes_its_rows_and_columns():
    """A head of a double block has rows with biases in six matrices and columns in two."""
    model = tiny.dense("flux")
    units, sizes = {u.name: u for u in flux.widths(model)}, Sizes(model, flux.widths(model))
    expected = {
        "transformer_blocks.0.attn.heads": 8 * (6 * 33 + 2 * 32),
        "transformer_blocks.0.ff.neurons": 33 + 32,
        "single_transformer_blocks.0.heads": 8 * (3 * 33 + 32),
        "single_transformer_blocks.0.neurons": 33 + 32,
    }
    assert {name: sizes.removed({name: 1}) for name in expected} == expected
    single = {m.tensor: m.index for m in units["single_transformer_blocks.0.neurons"].members}
    columns = single["single_transformer_blocks.0.proj_out.weight"].flatten()
    assert columns.tolist() == list(range(32, 160))


# Saving, features.


@pytest.mark.parametrize("guidance", [True, False])
def test_a_pruned_text_model_is_saved_and_loaded_in_its_dtype(tmp_path, guidance):
    """Bit-identical in bfloat16, with nothing left in the type that models are built in."""
    config = {**TEXT_TINY, "guidance_embeds": guidance} | (
        {"guidance_scale": 5} if guidance else {}
    )
    model = _built(config).to(torch.bfloat16)
    kept = {
        unit.name: tuple(range(1, unit.size))
        for unit in flux.widths(model)
        if not unit.name.startswith("transformer_blocks.1")
    }
    # One block loses a branch that shares a modulation, the other all but one.
    gone = ("transformer_blocks.0.ff", "transformer_blocks.1.attn", "transformer_blocks.1.ff")
    plan = surgery.Plan(layers=gone, kept={n: k for n, k in kept.items() if ".ff.neu" not in n})
    surgery.apply(model, plan, flux)
    surgery.save(tmp_path, model, plan, "flux", config)
    again, loaded = surgery.load(tmp_path)
    assert loaded.to_json() == plan.to_json()
    tiny.assert_same(model.state_dict(), again.state_dict())
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    inputs = _inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(*inputs), again(*inputs))


def test_features_are_the_image_tokens_after_every_block():
    model = tiny.dense("flux")
    names = [f"transformer_blocks.{index}.stream" for index in (0, 1)]
    names += [f"single_transformer_blocks.{index}.stream" for index in (0, 1)]
    assert flux.features(model) == dict.fromkeys(names)
    with torch.no_grad(), captured(model, [*names, "norm_out", "x_embedder"]) as whole:
        tiny.output(model, "flux")
        scaled = model.norm_out(whole[names[-1]], torch.zeros(3, 32))
        assert scaled.shape == whole["norm_out"].shape == (3, 16, 32)
    for layer in ("transformer_blocks.0", "transformer_blocks.1.ff_context", names[3][:-7]):
        flux.remove_layer(model, layer)
    assert list(flux.features(model)) == names
    with captured(model, [*names, "x_embedder"]) as pruned:
        tiny.output(model, "flux")
    assert {tuple(pruned[name].shape) for name in names} == {(3, 16, 32)}
    assert torch.equal(pruned[names[0]], pruned["x_embedder"])  # both passed on
    assert torch.equal(pruned[names[3]], pruned[names[2]])
