"""Official checkpoints: names, shapes, conventions, wrong files; published sizes and costs.

No released checkpoint is at hand. tests/releases.py states the published layouts and computes the
published networks in plain tensor operations; both are read beside prunebench's own modules.
"""

import argparse
import collections
import copy
import functools
import importlib.util
import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import releases
import tiny
import torch
import yaml
from accelerate import init_empty_weights
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from prunebench import assets, models, tracks
from prunebench.errors import UserError
from prunebench.evaluation.cost import count_macs
from prunebench.models import official
from prunebench.pruning import surgery
from prunebench.records import artefacts, sealed

ROOT = Path(__file__).parents[1]
FAMILIES = ("conditional_unet", "dit", "unet", "uvit")
ENTRIES = {name: (family, entry) for family in FAMILIES
           for name, entry in models.published(family).items()}  # fmt: skip

DIT = {"resolution": 8, "channels": 3, "patch": 2, "width": 32, "depth": 2, "heads": 4}
DIT |= {"classes": 10, "learn_sigma": True}
UVIT = {"resolution": 8, "channels": 3, "patch": 2, "width": 32, "depth": 4, "heads": 4}
UVITS = {
    "classes": {**UVIT, "classes": 10},
    "no null class": {**UVIT, "classes": 10, "null_class": False},
    "no convolution": {**UVIT, "classes": 10, "conv": False},
    "unconditional": {**UVIT, "classes": None, "first_time": 1},
    "text": {**UVIT, "classes": None, "context": [5, 12], "first_time": 1},
}
DDPM = {
    **models.published("unet")["ddpm_cifar10"].config,
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
LATENT = {  # what releases.ldm_layout needs to know of each published network
    "ldm_cin256": (192, (1, 2, 3, 5), (0, 1, 1, 1), 512, 3),
    "sd15": (320, (1, 2, 4, 4), (1, 1, 1, 0), 768, 4),
    "sd21_base": (320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, 4, True),
    "sdxl_base": (320, (1, 2, 4), (0, 2, 10), 2048, 4, True),
}
SMALL_LDM = {
    **models.published("conditional_unet")["ldm_cin256"].config,
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "classes": 10,
}


@functools.cache
def _empty(name: str) -> nn.Module:
    family, entry = ENTRIES[name]
    with init_empty_weights(include_buffers=False):
        return models.family(family).build(entry.config)


def _meta(shapes: releases.Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _dit(seed: int = 0) -> dict[str, Tensor]:
    state = releases.random(releases.dit_layout(DIT), seed)
    return state | {"pos_embed": releases.position_table(DIT["width"], 4)}


def _written(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "release.safetensors")
    return folder / "release.safetensors"


def _batch(channels: int = 3, side: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 9, 0])


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05  # the comparison is about something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


# Published sizes and costs.

# Parameters, exactly or in millions, and GMACs with and without attention products, as counted
# by hand from the published configurations, independently of prunebench, to the digits given.
KNOWN = {
    "ddpm_cifar10": ("35.746", "6.222", "6.054"),
    "ddpm_church256": ("113.67", "248.51", "248.17"),
    "ddpm_bedroom256": ("113.67", "248.51", "248.17"),
    "ddpm_celeba64": ("78.7", None, "23.9"),
    "ldm_cin256": (f"{400_920_579 + 1001 * 512:,}", "104.23", "99.77"),  # and the classes' table
    "dit_xl_2_256": ("675,129,632", None, None),  # its MACs: see diffusers' DiT
    "sit_xl_2_256": ("675", None, None),
    "uvit_s_2_cifar10": ("44,255,328", None, "11.32"),
    "uvit_s_2_deep_coco": ("58", None, None),
    "sd15": ("859,520,964", "401.6", "338.6"),
    "sd21_base": ("865,910,724", None, None),
    "sdxl_base": ("2,567,463,684", "3380.6", "2988.7"),
}
# What Peebles & Xie (2023, Tables 1 and 4) print of DiT; their GFLOPs are multiply-accumulates.
PRINTED = {
    "dit_xl_2_256": (675, 118.64),
    "dit_xl_2_512": (675, 524.6),
    "dit_l_2_256": (458, 80.71),
    "dit_b_2_256": (130, 23.01),
    "dit_s_2_256": (33, 6.06),
}


def _as_printed(count: int, known: str, unit: float) -> str:
    """`count` with the digits of `known`: exactly where that has commas, else in `unit`."""
    return f"{count:,}" if "," in known else f"{count / unit:.{len(known.partition('.')[2])}f}"


def _inputs(settings: dict) -> tuple:
    """One image's input on the meta device, with the text or label that the network takes."""
    zeros = functools.partial(torch.zeros, device="meta")
    side = settings.get("resolution") or settings["sample_size"]
    channels = settings.get("channels") or settings.get("in_channels", 4)
    if "addition_embed_type" in settings:
        context = zeros(1, 77, settings["cross_attention_dim"])
        y = {"context": context, "pooled": zeros(1, 1280), "sizes": zeros(1, 6)}
    elif settings.get("context"):
        y = zeros(1, *settings["context"])
    elif "classes" not in settings and "cross_attention_dim" in settings:
        y = zeros(1, 77, settings["cross_attention_dim"])
    else:
        y = zeros(1, dtype=torch.long)
    return zeros(1, channels, side, side), zeros(1), y


@functools.cache
def _macs(family: str, settings: str) -> dict[str, int]:
    with init_empty_weights(include_buffers=False):
        model = models.family(family).build(json.loads(settings)).to("meta").eval()
    return count_macs(model, *_inputs(json.loads(settings)))


@pytest.mark.parametrize("name_", ENTRIES)
def test_published_sizes_and_costs(name_):
    family, entry = ENTRIES[name_]
    parameters = sum(tensor.numel() for tensor in _empty(name_).state_dict().values())
    macs = _macs(family, json.dumps(entry.config, sort_keys=True))
    assert parameters == entry.parameters
    assert macs["macs"] == entry.macs
    assert macs["macs_without_attention_products"] == entry.macs_without_attention_products
    counts = [(parameters, 1e6), *((count, 1e9) for count in macs.values())]
    for (count, unit), known in zip(counts, KNOWN.get(name_, [None] * 3), strict=True):
        assert known is None or _as_printed(count, known, unit) == known


@pytest.mark.parametrize("name_", PRINTED)
def test_dit_costs_what_its_authors_print(name_):
    """Within a unit of a million parameters, and within 2e-4 of what they count beside products."""
    entry, (parameters, cost) = ENTRIES[name_][1], PRINTED[name_]
    assert entry.parameters / 1e6 == pytest.approx(parameters, abs=1.02)
    assert entry.macs / 1e9 == pytest.approx(cost, rel=2e-4, abs=0.005)


@pytest.mark.parametrize("name_", [name for name in ENTRIES if ENTRIES[name][0] == "dit"])
def test_the_cost_of_dit_by_hand(name_):
    """12 d^2 per token and 6 d^2 of modulation in a block; embedders and head beside them."""
    settings, entry = ENTRIES[name_][1].config, ENTRIES[name_][1]
    d, tokens = settings["width"], (settings["resolution"] // settings["patch"]) ** 2
    pixels = settings["channels"] * settings["patch"] ** 2
    blocks = settings["depth"] * (12 * d**2 * tokens + 6 * d**2)
    ends = tokens * pixels * d + _time_embedder(d) + 2 * d**2 + tokens * d * 2 * pixels
    assert entry.macs_without_attention_products == blocks + ends
    assert entry.macs == blocks + ends + settings["depth"] * 2 * tokens**2 * d


def _time_embedder(width: int) -> int:
    """Multiply-accumulates of DiT's: 256 waves through two matrices."""
    return 256 * width + width**2


def test_the_collected_cost_of_dit_is_that_of_diffusers_dit():
    """Each of its 28 blocks embeds the time anew and its head once more; the release does it once.

    The facts have 118.67 and 114.44 GMACs.
    """
    with init_empty_weights(include_buffers=False):
        theirs = DiTTransformer2DModel(sample_size=32, out_channels=8).to("meta").eval()
    index = torch.zeros(1, dtype=torch.long, device="meta")
    found = count_macs(theirs, torch.zeros(1, 4, 32, 32, device="meta"), index, index)
    entry, surplus = ENTRIES["dit_xl_2_256"][1], 28 * _time_embedder(1152)
    assert found == {name: getattr(entry, name) + surplus for name in found}
    assert [f"{count / 1e9:.2f}" for count in found.values()] == ["118.67", "114.44"]


@pytest.mark.parametrize(
    ("depth", "total"), [(19, 459_983_264), (14, 340_457_504), (7, 173_121_440)]
)
def test_shallow_dits_have_their_published_sizes(depth, total):
    """TinyFusion's TinyDiT-D19, D14 and D7 (Fang et al. 2024, Table 1)."""
    model = copy.deepcopy(_empty("dit_xl_2_256"))
    gone = tuple(f"blocks.{index}" for index in range(27, depth - 1, -1))
    surgery.apply(model, surgery.Plan(layers=gone), models.family("dit"))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total


SHORT = {"layers_per_block": 1}
HEADLESS = {**SHORT, "mid_block_type": None}
SHALLOW = {
    **HEADLESS,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}


@pytest.mark.parametrize(
    ("name_", "changes", "total"),
    [
        ("sd15", SHORT, 579_384_964),
        ("sd15", HEADLESS, 482_346_884),
        ("sd15", SHALLOW, 323_384_964),
        ("sd21_base", SHORT, 583_480_964),
        ("sd21_base", HEADLESS, 485_787_524),
        ("sd21_base", {**SHALLOW, "attention_head_dim": [5, 10, 20]}, 326_825_604),
    ],
)
def test_short_stable_diffusions_have_their_published_sizes(name_, changes, total):
    """BK-SDM's Base, Small and Tiny (Kim et al. 2024; Nota-NetsPresso/BK-SDM, README)."""
    family, entry = ENTRIES[name_]
    with init_empty_weights():
        model = models.family(family).build({**entry.config, **changes})
    assert sum(parameter.numel() for parameter in model.parameters()) == total


@pytest.mark.parametrize(
    ("path", "total"),
    [
        ("down_blocks.0.attentions.0", 2_546_240),
        ("down_blocks.1.attentions.0", 9_188_480),
        ("down_blocks.2.attentions.0", 34_760_960),
        ("down_blocks.0.resnets.0", 2_255_040),
        ("mid_block.resnets.0", 31_138_560),
    ],
)
def test_whole_units_of_stable_diffusion_have_their_published_sizes(path, total):
    """SnapFusion's units: transformers with the projections around them, and ResNets."""
    block = _empty("sd15").get_submodule(path)
    assert sum(parameter.numel() for parameter in block.parameters()) == total


def test_every_family_of_the_issue_has_published_configurations():
    assert {family for family, _ in ENTRIES.values()} == set(FAMILIES)
    assert len(ENTRIES) == sum(len(models.published(family)) for family in FAMILIES)
    assert models.published("no_such_family") == {}


# Names and shapes at full size.


def _layout_of(name: str) -> releases.Shapes:
    """The published layout of a published configuration, in the form of its checkpoint."""
    family, entry = ENTRIES[name]
    if family == "dit":
        return releases.dit_layout(entry.config)
    if family == "uvit":
        return releases.uvit_layout(entry.config)
    if family == "unet":
        shapes = releases.ddpm_layout(entry.config)
        return shapes if entry.layout == "ddpm" else _as_early_diffusers(shapes, entry.config)
    shapes = releases.ldm_layout(*LATENT[name])
    if "classes" in entry.config:
        shapes["cond_stage_model.embedding.weight"] = (entry.config["classes"] + 1, 512)
    if "addition_embed_type" in entry.config:
        label = "model.diffusion_model.label_emb.0"
        shapes |= releases.affine(f"{label}.0", 1280, 2816)
        shapes |= releases.affine(f"{label}.2", 1280, 1280)
    return shapes


def _as_early_diffusers(shapes: releases.Shapes, settings: dict) -> releases.Shapes:
    """The layout of Google's DDPM checkpoints on the hub, of the time of diffusers 0.0.4."""
    top, early = len(settings["block_out_channels"]) - 1, {}
    parts = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}
    resnet = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
    mid = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
    for name, shape in shapes.items():
        path = name.split(".")
        if path[0] == "temb":
            new = ["time_embedding", f"linear_{int(path[2]) + 1}"]
        elif path[0] == "mid":
            new = [
                "mid_block",
                mid[path[1]],
                (parts if "attn" in path[1] else resnet).get(*2 * path[2:3]),
            ]
        elif path[0] in ("down", "up"):
            level = int(path[1]) if path[0] == "down" else top - int(path[1])
            new = [f"{path[0]}_blocks", str(level)]
            if path[2].endswith("sample"):
                new += [f"{path[2]}rs", "0", "conv"]
            else:
                attention = path[2] == "attn"
                names = parts if attention else resnet
                new += [
                    "attentions" if attention else "resnets",
                    path[3],
                    names.get(path[4], path[4]),
                ]
        else:
            new = [{"norm_out": "conv_norm_out"}.get(path[0], path[0])]
        matrix = len(shape) == 4 and shape[2:] == (1, 1) and "attn" in name
        early[".".join([*new, path[-1]])] = shape[:2] if matrix else shape
    return early


def _strictly(name: str, shapes: releases.Shapes, layout: str | None = None) -> nn.Module:
    """A published network on the meta device with tensors of the given names and shapes."""
    family, entry = ENTRIES[name]
    known = models.family(family).LAYOUTS[layout or entry.layout]
    values = official.Layout(known.names, None, known.others, known.pointwise)
    model = copy.deepcopy(_empty(name))
    official.assign(model, _meta(shapes), values, f"{name}.pt", torch.float32)
    return model


@pytest.mark.parametrize("name_", ENTRIES)
def test_the_published_layout_loads_strictly_at_full_size(name_):
    family, entry = ENTRIES[name_]
    shapes = _layout_of(name_)
    layout = "compvis" if family == "conditional_unet" else entry.layout
    model = _strictly(name_, shapes, layout)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == entry.parameters == sum(v.numel() for v in model.state_dict().values())


# config.json of the repositories: what it says of the network, which diffusers builds of it.
_DDPM_HUB = {
    "act_fn": "silu", "attention_head_dim": None, "center_input_sample": False,
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    "out_channels": 3, "time_embedding_type": "positional",
}  # fmt: skip
_CIFAR_HUB = {
    **_DDPM_HUB, "block_out_channels": [128, 256, 256, 256], "sample_size": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
_LSUN_HUB = {
    **_DDPM_HUB, "block_out_channels": [128, 128, 256, 256, 512, 512], "sample_size": 256,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}  # fmt: skip
_LATENT_HUB = {
    "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
}  # fmt: skip
_SD_HUB = {
    **_LATENT_HUB, "block_out_channels": [320, 640, 1280, 1280], "sample_size": 64,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
_SDXL_HUB = {
    **_LATENT_HUB, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}  # fmt: skip
_FLUX_HUB = {
    "attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
    "pooled_projection_dim": 768,
}  # fmt: skip
HUB = {
    "ddpm_cifar10": (UNet2DModel, _CIFAR_HUB),
    "ddpm_celebahq256": (UNet2DModel, _LSUN_HUB),
    "ddpm_church256": (UNet2DModel, _LSUN_HUB),
    "ddpm_bedroom256": (UNet2DModel, _LSUN_HUB),
    "sd15": (UNet2DConditionModel,
             {**_SD_HUB, "attention_head_dim": 8, "cross_attention_dim": 768}),
    "sd21_base": (UNet2DConditionModel,
                  {**_SD_HUB, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
                   "use_linear_projection": True}),
    "sdxl_base": (UNet2DConditionModel, _SDXL_HUB),
    "flux_dev": (FluxTransformer2DModel, {**_FLUX_HUB, "guidance_embeds": True}),
    "flux_schnell": (FluxTransformer2DModel, {**_FLUX_HUB, "guidance_embeds": False}),
}  # fmt: skip


@pytest.mark.parametrize("name_", HUB)
def test_diffusers_own_network_is_ours_in_settings_names_and_shapes(name_):
    """Built by diffusers' class from the repository's config.json, at full size."""
    family = next(name for name in models.family_names() if name_ in models.published(name))
    entry, (kind, settings) = models.published(family)[name_], HUB[name_]
    with init_empty_weights(include_buffers=False):
        theirs, ours = kind(**settings), models.family(family).build(entry.config)
    state = theirs.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert sum(tensor.numel() for tensor in state.values()) == entry.parameters
    assert {name: _plain(ours.config[name]) for name in settings} == settings
    layout = models.family(family).LAYOUTS["diffusers"]
    official.assign(ours, state, layout, name_, torch.float32)
    assert not state  # every tensor was taken


def test_every_network_that_diffusers_publishes_is_compared_with_its_own():
    published = [models.published(family).items() for family in models.family_names()]
    stored = {name: entry.layout for family in published for name, entry in family}
    assert set(HUB) == {name for name, layout in stored.items() if layout == "diffusers"}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name_", LATENT)
def test_compvis_names_mean_what_diffusers_takes_them_for(name_):
    """diffusers' own converter of single files sends every official name to the same place."""
    model = _empty(name_)
    names = models.family("conditional_unet").LAYOUTS["compvis"].names(model, ())
    stored = {theirs: torch.empty(0) for theirs in names.values()}
    settings = {"class_embed_type": None, "addition_embed_type": None, **ENTRIES[name_][1].config}
    converted = convert_ldm_unet_checkpoint(
        dict(stored), {**settings, "layers_per_block": 2, "num_class_embeds": None}
    )
    unet = {ours: theirs for ours, theirs in names.items() if ours != "class_context.weight"}
    assert converted.keys() == unet.keys()
    assert all(converted[ours] is stored[theirs] for ours, theirs in unet.items())


# Meaning: the loaded network computes what the release computes.


def test_dit_computes_what_the_release_computes(tmp_path):
    state, (x, y), t = _dit(), _batch(), torch.tensor([0.0, 250.0, 999.0])
    model = official.load("dit", DIT, _written(tmp_path, state), "dit")
    with torch.no_grad():
        _close(model(x, t, y), releases.dit(state, DIT, x, t, y))
        null = torch.full_like(y, 10)
        _close(model(x, t, null), releases.dit(state, DIT, x, t, null))


def test_sit_is_turned_from_the_releases_time_to_the_suites(tmp_path):
    """The release runs from noise at 0 to data at 1, so its velocity is data minus noise."""
    state, (x, y), t = _dit(), _batch(), torch.tensor([0.0, 0.3, 1.0])
    model = official.load("dit", DIT, _written(tmp_path, state), "sit")
    with torch.no_grad():
        velocity = releases.dit(state, DIT, x, 1 - t, y)[:, :3]
        _close(model(x, t, y)[:, :3], -velocity)


@pytest.mark.parametrize("case", UVITS)
def test_uvit_computes_what_the_release_computes(tmp_path, case):
    settings = UVITS[case]
    state, (x, y) = releases.random(releases.uvit_layout(settings)), _batch()
    if settings.get("context"):
        y = torch.randn(3, *settings["context"], generator=torch.Generator().manual_seed(2))
    model = official.load("uvit", settings, _written(tmp_path, state), "uvit")
    t = torch.tensor([0.0, 250.0, 999.0])
    counted = t + settings.get("first_time", 0)
    with torch.no_grad():
        _close(model(x, t, y), releases.uvit(state, settings, x, counted, y))
    assert model.null_class == (10 if case in ("classes", "no convolution") else None)


def test_ddpm_computes_what_the_release_computes(tmp_path):
    state, (x, y) = releases.random(releases.ddpm_layout(DDPM)), _batch()
    model = official.load("unet", DDPM, _written(tmp_path, state), "ddpm")
    t = torch.tensor([0.0, 250.0, 999.0])
    with torch.no_grad():
        _close(model(x, t, y), releases.ddpm(state, DDPM, x, t))
    early = _as_early_diffusers(releases.ddpm_layout(DDPM), DDPM)
    values = {
        new: state[old].view(shape) for (new, shape), old in zip(early.items(), state, strict=True)
    }
    again = official.load("unet", DDPM, _written(tmp_path, values), "diffusers")
    assert torch.equal(model(x, t, y), again(x, t, y))
    current = official.load("unet", DDPM, _written(tmp_path, again.state_dict()), "diffusers")
    assert torch.equal(model(x, t, y), current(x, t, y))


def test_ldm_takes_class_table_and_network_and_leaves_the_rest_of_the_pipeline(tmp_path):
    shapes = releases.ldm_layout(8, (1, 2), (0, 1), 12, 3)
    shapes["cond_stage_model.embedding.weight"] = (11, 12)
    state = releases.random(shapes)
    others = ("first_stage_model.decoder.conv_in.weight", "model_ema.decay", "betas", "logvar")
    others += ("alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1")
    whole = state | {name: torch.zeros(1) for name in others}
    model = official.load("conditional_unet", SMALL_LDM, _written(tmp_path, whole), "compvis")
    assert torch.equal(model.class_context.weight, state["cond_stage_model.embedding.weight"])
    first = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    own = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(model.get_parameter(own), state[first])
    x, y = _batch()
    assert model(x, torch.tensor([0, 5, 999]), y).isfinite().all()


def test_a_transposed_position_table_is_refused(tmp_path):
    state = _dit()
    state["pos_embed"] = state["pos_embed"].view(4, 4, -1).transpose(0, 1).reshape(1, 16, -1)
    for layout in ("dit", "sit"):
        with pytest.raises(UserError, match=r"release.safetensors: the key 'pos_embed' differs by"):
            official.load("dit", DIT, _written(tmp_path, dict(state)), layout)


def test_a_position_table_in_half_precision_is_the_fixed_one(tmp_path):
    state = {name: tensor.half() for name, tensor in _dit().items()}
    model = official.load("dit", DIT, _written(tmp_path, state), "dit")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Wrong checkpoints.

TINY = {
    "dit": ("dit", DIT, _dit),
    "sit": ("dit", DIT, _dit),
    "uvit": ("uvit", UVITS["classes"],
             lambda: releases.random(releases.uvit_layout(UVITS["classes"]))),
    "ddpm": ("unet", DDPM, lambda: releases.random(releases.ddpm_layout(DDPM))),
    "diffusers": ("unet", DDPM, lambda: releases.random(
        _as_early_diffusers(releases.ddpm_layout(DDPM), DDPM))),
    "compvis": ("conditional_unet", SMALL_LDM, lambda: releases.random(
        releases.ldm_layout(8, (1, 2), (0, 1), 12, 3)
        | {"cond_stage_model.embedding.weight": (11, 12)})),
}  # fmt: skip


@pytest.mark.parametrize("layout", TINY)
def test_the_first_wrong_key_is_named_with_the_file(tmp_path, layout):
    family, settings, build = TINY[layout]
    official.load(family, settings, _written(tmp_path, build()), layout)
    for position in (0, len(build()) // 2, len(build()) - 1):
        name = list(build())[position]
        without = {key: value for key, value in build().items() if key != name}
        more = f"{next(iter(build()))}.more"
        with_one_more = build() | {more: torch.zeros(1)}
        narrow = build() | {name: build()[name][..., :-1].contiguous()}
        whole = build() | {name: torch.zeros_like(build()[name], dtype=torch.int64)}
        for state, words in (
            (without, "is missing"),
            (narrow, f"is float32 {tuple(narrow[name].shape)}, not float "),
            (whole, "is int64"),
            (with_one_more, "is unexpected"),
        ):
            key = more if words == "is unexpected" else name
            file = _written(tmp_path, state)
            with pytest.raises(UserError) as caught:
                official.load(family, settings, file, layout)
            assert str(caught.value).startswith(f"{file}: the key '{key}' {words}")


def test_several_wrong_keys_the_networks_first_is_named(tmp_path):
    state = _dit()
    del state["blocks.1.attn.qkv.bias"], state["blocks.0.mlp.fc1.bias"]
    state["another"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"'blocks.0.mlp.fc1.bias' is missing"):
        official.load("dit", DIT, _written(tmp_path, state), "dit")


@pytest.mark.parametrize(("other", "key"), [("width", "pos_embed"), ("depth", "blocks.2.attn.qkv")])
def test_a_checkpoint_of_another_size_is_refused(tmp_path, other, key):
    with pytest.raises(UserError, match=rf"the key '{key}"):
        official.load("dit", {**DIT, other: 2 * DIT[other]}, _written(tmp_path, _dit()), "dit")


def test_unknown_layouts_and_impossible_configs_are_named(tmp_path):
    file = _written(tmp_path, _dit())
    with pytest.raises(
        UserError, match="unknown layout 'uvit' of family dit; known: suite, dit, s"
    ):
        official.load("dit", DIT, file, "uvit")
    with pytest.raises(UserError, match=r"config of family dit: .*'depht'"):
        official.load("dit", {**DIT, "depht": 3}, file, "dit")
    heads = {**tiny.INSTANCES["unet"].config, "attention_head_dim": 64}
    with pytest.raises(UserError, match="config of family unet: attention_head_dim is more than"):
        official.load("unet", heads, file, "suite")


# Files.


def _same(file: Path) -> None:
    model = official.load("dit", DIT, file, "dit")
    for name, tensor in _dit().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_training_scripts_save_is_unwrapped(tmp_path, monkeypatch):
    file, average, raw = tmp_path / "release.pt", _dit(), _dit(seed=1)
    callback, path = type("ModelCheckpoint", (), {}), ""
    for part in ("pytorch_lightning", ".callbacks", ".model_checkpoint"):
        path += part
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    callback.__module__, sys.modules[path].ModelCheckpoint = path, callback
    for content in (
        average,
        {"model": raw, "ema": average, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)},
        {"state_dict": average, "callbacks": {callback: {"best": None}}, "epoch": 3},
        [{f"module.{name}": tensor for name, tensor in raw.items()}, {}, 3, 100, average],
        {f"module.{name}": tensor for name, tensor in average.items()},
    ):
        torch.save(content, file)
        _same(file)
    torch.save(average, file, _use_new_zipfile_serialization=False)
    _same(file)


def _averages() -> dict[str, tuple[object, str | None]]:
    """What scripts save -> what is said of it; None where the average is taken."""
    average, raw = _dit(), _dit(seed=1)
    parallel = {f"module.{name}": value for name, value in average.items()}
    return {
        "timm's": ({"state_dict": raw, "state_dict_ema": average, "epoch": 3}, None),
        "DeiT's": ({"model": raw, "model_ema": average, "ema_decay": 0.999}, None),
        "EDM's": ({"net": raw, "ema": average}, None),
        "nested": ({"model": raw, "ema": {"model": average, "decay": 0.999}}, None),
        "AveragedModel's": ({**parallel, "n_averaged": torch.tensor(5)}, None),
        "compiled": ({f"_orig_mod.{name}": value for name, value in average.items()}, None),
        "both": ({"model": {f"module._orig_mod.{n}": v for n, v in average.items()}}, None),
        "Lightning's": ({"state_dict": {f"model.{n}": v for n, v in average.items()}}, None),
        "two averages": (
            {"model": raw, "ema_0.9999": average, "ema_0.999": average},
            "holds several averages, 'ema_0.9999' and 'ema_0.999'; save the one",
        ),
        "without names": (
            {"model": raw, "ema": {"shadow_params": list(average.values())}},
            "holds no state dict|'shadow_params'|'shadow",
        ),
    }


@pytest.mark.parametrize("script", _averages())
def test_an_average_is_taken_or_refused_by_its_keys(script, tmp_path):
    content, message = _averages()[script]
    torch.save(content, tmp_path / "release.pt")
    if message is None:
        _same(tmp_path / "release.pt")
        return
    with pytest.raises(UserError, match=message):
        official.read(tmp_path / "release.pt")


def test_the_average_of_a_compvis_file_is_taken(tmp_path):
    shapes = releases.ldm_layout(8, (1, 2), (0, 1), 12, 3)
    shapes["cond_stage_model.embedding.weight"] = (11, 12)
    state = releases.random(shapes)
    raw = {n: torch.zeros_like(v) if n.startswith("model.") else v for n, v in state.items()}
    average = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value
        for name, value in state.items()
        if name.startswith("model.")
    }
    average |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    expected = official.load("conditional_unet", SMALL_LDM, _written(tmp_path, state), "compvis")
    file = _written(tmp_path, raw | average)
    found = official.load("conditional_unet", SMALL_LDM, file, "compvis")
    tiny.assert_same(found.state_dict(), expected.state_dict())
    with pytest.raises(UserError, match=r"'model_ema\.other' is the average of no weight"):
        official.read(_written(tmp_path, raw | average | {"model_ema.other": torch.ones(2)}))


def test_weights_that_are_not_finite_are_named(tmp_path):
    state, file = _dit(), tmp_path / "release.pt"
    state["blocks.0.mlp.fc1.weight"][3, 1] = float("nan")
    torch.save(state, file)
    with pytest.raises(UserError, match=r"'blocks\.0\.mlp\.fc1\.weight' has NaN or infinite"):
        official.load("dit", DIT, file, "dit")
    torch.save({name: value * 1e6 for name, value in _dit().items()}, file)
    with pytest.raises(UserError, match=r"'pos_embed' differs|infinite values in torch\.float16"):
        official.load("dit", DIT, file, "dit", torch.float16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS, .*pull",
        ),
        (b"<!DOCTYPE html><html><head>", "is a web page, not the file"),
        (b"\n <html lang='en'>", "is a web page, not the file"),
    ],
)
@pytest.mark.parametrize("name_", ["release.pt", "release.safetensors"])
def test_what_a_download_left_in_place_of_a_file_is_named(content, message, name_, tmp_path):
    (tmp_path / name_).write_bytes(content)
    with pytest.raises(UserError, match=f"{name_} {message}"):
        official.read(tmp_path / name_)


def test_a_folder_without_the_weights_lists_what_it_has(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    with pytest.raises(UserError, match=r"found: unet/diffusion_pytorch_model\.fp16\.safetensors"):
        official.denoiser_of(tmp_path)


def test_a_tensor_of_two_shards_is_taken_from_the_one_that_the_index_names(tmp_path):
    right, wrong = _dit(), _dit(seed=1)
    name = "blocks.0.mlp.fc1.weight"
    others = {key: value for key, value in right.items() if key != name}
    save_file({**others, name: wrong[name]}, tmp_path / "b.safetensors")
    save_file({name: right[name]}, tmp_path / "a.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    where = dict.fromkeys(others, "b.safetensors") | {name: "a.safetensors"}
    artefacts.write_json(file, {"weight_map": where})
    _same(file)
    artefacts.write_json(file, {"weight_map": where | {"more": "a.safetensors"}})
    with pytest.raises(UserError, match=r"the key 'more' is not in a\.safetensors"):
        official.read(file)
    artefacts.write_json(file, {"metadata": {}})
    with pytest.raises(UserError, match="has no weight_map"):
        official.read(file)


def test_shards_are_read_through_their_index(tmp_path):
    names = list(_dit())
    half = len(names) // 2
    index = {}
    for number, part in enumerate((names[:half], names[half:])):
        save_file({name: _dit()[name] for name in part}, tmp_path / f"{number}.safetensors")
        index |= dict.fromkeys(part, f"{number}.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    artefacts.write_json(file, {"metadata": {}, "weight_map": index})
    _same(file)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"1.safetensors does not exist"):
        official.load("dit", DIT, file, "dit")


class _Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_nothing_else_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**_dit(), "more": _Harmful()}, "release.pt")
    with pytest.raises(UserError, match=r"release\.pt holds more than tensors .*: it asks for"):
        official.load("dit", DIT, Path("release.pt"), "dit")
    assert not Path("harm").exists()


def test_a_class_that_is_not_read_is_named(tmp_path):
    torch.save({**_dit(), "more": collections.UserDict()}, tmp_path / "release.pt")
    with pytest.raises(UserError, match=r"it asks for collections\.UserDict; save its state dict"):
        official.read(tmp_path / "release.pt")


@pytest.mark.parametrize("name_", ["release.safetensors", "release.pt"])
def test_bad_files_are_named(tmp_path, name_):
    file = tmp_path / name_
    with pytest.raises(UserError, match=f"{name_} does not exist"):
        official.read(file)
    good = tmp_path / f"good.{file.suffix}"
    save_file(_dit(), good) if file.suffix == ".safetensors" else torch.save(_dit(), good)
    file.write_bytes(good.read_bytes()[:-4000])
    with pytest.raises(UserError, match=f"{name_} is corrupt"):
        official.read(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"{name_} "):
        official.read(file)
    if file.suffix == ".pt":
        for content, words in ((3, "holds no state dict"), ({"a": 3}, "'a' is of type int")):
            torch.save(content, file)
            with pytest.raises(UserError, match=words):
                official.read(file)
        file.write_bytes(pickle.dumps({"a": 1}, protocol=2))
        with pytest.raises(UserError, match=r"release\.pt"):
            official.read(file)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tensors_are_mapped_cast_and_assigned_without_a_copy(tmp_path, suffix):
    file = tmp_path / f"release.{suffix}"
    save_file(_dit(), file) if suffix == "safetensors" else torch.save(_dit(), file)
    stored = official.read(file)
    places = {name: tensor.data_ptr() for name, tensor in stored.items()}
    with init_empty_weights(include_buffers=False):
        model = models.family("dit").build(DIT)
    official.assign(model, stored, models.family("dit").LAYOUTS["dit"], "here", torch.float32)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert stored == {}
    half = official.load("dit", DIT, file, "dit", torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in half.parameters())


# In a track.


@pytest.fixture
def track_of(tmp_path, register):
    """The file of a track of one model, whose data set has images of a shape; None: smoke's."""

    def track(shape=(3, 8, 8), classes=10, **changes) -> Path:
        content = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
        if shape is not None:
            register("made", assets.File("made.npz"), kind="dataset", shape=shape, classes=classes)
            content["dataset"]["name"] = "made"
        model = content["models"]["dit"]
        del model["training"]
        weights = {"file": str(tmp_path / "release.safetensors")}
        model |= {"config": DIT, "weights": weights, **changes}
        kept = {key: value for key, value in model.items() if value is not None}
        content["models"] = {"dit": kept}
        del content["oracle"]
        content["methods"]["folders"] = [str(ROOT / "methods")]
        file = tmp_path / "track.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return track


def test_dense_takes_the_checkpoint_of_the_track(tmp_path, track_of):
    weights = {"file": str(_written(tmp_path, _dit())), "layout": "dit"}
    track = tracks.load(str(track_of(weights=weights)))
    dense = tiny.run("dense", track, tmp_path / "runs", model="dit")
    record = sealed.read(dense)
    assert record.status == "ok" and record.budget.student_backward == 0
    assert record.weights.sha256 == artefacts.sha256(Path(weights["file"]))
    assert record.weights.given["layout"] == "dit"
    network, plan = surgery.load(dense.parent)
    assert plan == surgery.Plan()
    x, y = _batch()
    t = torch.tensor([0.0, 250.0, 999.0])
    with torch.no_grad():
        _close(network(x, t, y), releases.dit(_dit(), DIT, x, t, y))
    # The suite's own file is a layout too.
    own = dense.parent / surgery.WEIGHTS
    again = official.load("dit", DIT, own, official.SUITE)
    assert torch.equal(network(x, t, y), again(x, t, y))


@pytest.mark.parametrize("classes", [7, 10])
def test_a_checkpoint_is_fine_tuned_on_other_classes(tmp_path, track_of, classes):
    ours = tiny.smoke().model("dit").config
    released = models.family("dit").build({**ours, "classes": classes})
    generator = torch.Generator().manual_seed(0)
    for parameter in released.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    save_file(released.state_dict(), tmp_path / "release.safetensors")
    weights = {"file": str(tmp_path / "release.safetensors"), "layout": "suite", "classes": classes}
    training = {"images": 32, "batch": 16, "learning_rate": 1e-6}
    track = tracks.load(str(track_of(None, config=ours, weights=weights, training=training)))
    dense = tiny.run("dense", track, tmp_path / "runs", model="dit")
    record = sealed.read(dense)
    assert record.budget.student_backward == 32
    assert record.weights.sha256 == artefacts.sha256(Path(weights["file"]))
    network, _ = surgery.load(dense.parent)
    state, old = network.state_dict(), released.state_dict()
    table, before = (s.pop("y_embedder.embedding_table.weight") for s in (state, old))
    near = {"rtol": 0, "atol": 1e-5}
    assert any(not torch.equal(tensor, old[name]) for name, tensor in state.items())
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, old[name], **near)
    torch.testing.assert_close(table[-1], before[-1], **near)  # "no class"
    assert len(table) == 11
    assert torch.allclose(table[:7], before[:7], **near) == (classes == 10)


def test_a_track_may_name_a_published_configuration(tmp_path, track_of):
    file = track_of((4, 32, 32), 1000, config="dit_xl_2_256")
    model = tracks.load(str(file)).model("dit")
    assert model.config == models.published("dit")["dit_xl_2_256"].config
    assert model.weights.layout == "dit"
    other = {"name": "flow", "times": "uniform"}
    sampling = {"sampler": "euler", "steps": 4}
    flow = track_of((4, 32, 32), 1000, config="sit_xl_2_256", objective=other, sampling=sampling)
    assert tracks.load(str(flow)).model("dit").weights.layout == "sit"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": "dit_xl_3"}, r"dit.config: unknown name 'dit_xl_3'; did you mean 'dit_xl"),
        ({}, r"dit.weights.layout: this key is missing; .* known: dit, sit, suite"),
        ({"weights": {"file": "a", "layout": "uvit"}}, r"weights.layout: 'uvit' is none of"),
        ({"weights": {"layout": "dit"}}, r"models.dit.weights: needs either the key 'asset' or"),
        ({"weights": {"asset": "a", "file": "b", "layout": "dit"}}, r"weights: needs either the k"),
        ({"weights": {"path": "a"}}, r"models.dit.weights.path: unknown key; known: asset"),
        ({"weights": None}, r"models.dit: needs 'training', 'weights', or both"),
        (
            {"weights": {"file": "a", "layout": "dit", "classes": 7}},
            r"models.dit.weights.classes: other classes must be learnt; add 'training'",
        ),
        (
            {"weights": {"file": "a", "layout": "dit", "dtype": "float16"}},
            r"models.dit.weights.dtype: weights in half precision can't be trained; leave it out",
        ),
        ({"weights": {"file": "a", "dtype": "int8"}}, r"weights.dtype: 'int8' should be 'fl"),
        (
            {"shape": (3, 64, 64), "classes": 1000,
             "family": "uvit", "config": "uvit_m_4_imagenet64", "weights": {"file": "a"},
             "sampling": {"sampler": "ddim", "steps": 4, "guidance": 2.0}},
            r"dit.sampling.guidance: the model has no class for 'no class'",
        ),
        (
            {"shape": (4, 32, 32), "classes": 1000,
             "config": "dit_xl_2_256", "objective": {"name": "noise", "beta_end": 0.03}},
            r"models.dit.objective: the checkpoint was trained for \{'name': 'noise'\}",
        ),
    ],
)  # fmt: skip
def test_wrong_entries_are_refused(track_of, changes, words):
    with pytest.raises(UserError, match=words):
        tracks.load(str(track_of(**changes)))


def test_another_checkpoint_makes_dense_anew(track_of):
    prints = [
        tracks.load(str(track_of(weights={"file": file, "layout": "dit"}))).fingerprint(
            "dense", model="dit", dense_seed=0
        )
        for file in ("a", "b")
    ]
    assert prints[0] != prints[1]


def test_the_document_shows_the_table():
    spec = importlib.util.spec_from_file_location("write_models", ROOT / "scripts/write_models.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert page == script.written(page)
    for name in ENTRIES:
        assert f"| `{name}` |" in page
    for family in FAMILIES:
        for layout in models.family(family).LAYOUTS:
            assert f"| {family} | `{layout}` |" in page


def test_a_repository_of_diffusers_is_searched_for_its_denoiser(tmp_path):
    for name in ("vae/diffusion_pytorch_model.safetensors", "unet/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no diffusion_pytorch_model"):
        official.denoiser_of(tmp_path)
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"):
        (tmp_path / name).touch()
        assert official.denoiser_of(tmp_path) == tmp_path / name
    assert official.denoiser_of(tmp_path / name) == tmp_path / name
