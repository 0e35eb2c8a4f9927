"""BK-SDM: its patterns on the published networks, and what surgery leaves of small ones."""

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from prunebench import models
from prunebench.errors import CellError
from prunebench.models import conditional_unet as family
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.tracks import methods

FOUND = tiny.found_methods()
GLOBALS = methods.load(FOUND["bk_sdm"]).__globals__
# Small networks of Stable Diffusion's shape: four levels, two pairs each, the last two as wide.
SMALL = {
    "sample_size": 16,
    "block_out_channels": [8, 8, 16, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
# What the authors' configurations of the three have in place of the defaults (diffusers' names).
LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}
STUDENTS = {
    "base": {"layers_per_block": 1},
    "small": {"layers_per_block": 1, "mid_block_type": None},
    "tiny": {"layers_per_block": 1, "mid_block_type": None, **LEVELS},
}
# Parameters, counted from the authors' configurations; segmind/distill-sd prints those of SD 1's
# dense, Base and Tiny too.
COUNTS = {
    "sd15": {"base": 579_384_964, "small": 482_346_884, "tiny": 323_384_964},
    "sd21_base": {"base": 583_480_964, "small": 485_787_524, "tiny": 326_825_604},
}


def _plans(model: family.ConditionalUNet) -> dict[str, Plan]:
    units = [unit.name for unit in family.layers(model, "stage")]
    found = GLOBALS["patterns"](units)
    return {name: Plan(layers=tuple(sorted(removed))) for name, removed in found.items()}


@pytest.mark.parametrize("name_", COUNTS)
def test_published_networks_lose_what_the_authors_count(name_):
    """On the meta device; the units that a pattern names hold exactly what goes."""
    with torch.device("meta"):
        dense = family.build(models.published("conditional_unet")[name_].config)
    plans, total = _plans(dense), parameter_count(dense)
    sizes = {unit.name: unit.parameters for unit in family.layers(dense, "stage")}
    assert list(plans) == list(COUNTS[name_])
    for pattern, plan in plans.items():
        with torch.device("meta"):
            model = family.build(models.published("conditional_unet")[name_].config)
        left = parameter_count(surgery.apply(model, plan, family))
        assert left == COUNTS[name_][pattern] == total - sum(sizes[n] for n in plan.layers)
        gone = set(plan.layers) & {unit.name for unit in family.layers(model, "stage")}
        assert not gone


def _inherited(pattern: str, name: str) -> str:
    """What BK-SDM's student takes a parameter from: the authors' rule, from student to teacher."""
    if not name.startswith("up_blocks"):
        return name
    part, level, kind, index, *rest = name.split(".")
    if pattern == "tiny":
        level = str(int(level) + 1)
    if kind in ("resnets", "attentions") and index == "1":
        index = "2"
    return ".".join((part, level, kind, index, *rest))


@pytest.mark.parametrize("pattern", STUDENTS)
def test_a_pruned_network_computes_what_the_authors_student_does(pattern):
    """Against diffusers' own UNet of the student's configuration with inherited weights."""
    torch.manual_seed(0)
    dense = family.build(SMALL).eval()
    channels = SMALL["block_out_channels"][: 3 if pattern == "tiny" else 4]
    config = {**SMALL, **STUDENTS[pattern], "block_out_channels": channels}
    student = UNet2DConditionModel(**config).eval()
    state = dense.state_dict()
    inherited = {name: state[_inherited(pattern, name)] for name in student.state_dict()}
    student.load_state_dict(inherited)
    plan = _plans(dense)[pattern]
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 8)
    pruned = surgery.apply(family.build(SMALL), plan, family).eval()
    left = {name for name, _ in pruned.named_parameters()}
    pruned.load_state_dict({name: state[name] for name in left})
    assert parameter_count(pruned) == parameter_count(student)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x, t, y), student(x, t, y).sample)


def test_a_pruned_network_is_saved_and_compares_levels_that_are_left(tmp_path):
    dense = family.build(SMALL)
    plan = _plans(dense)["tiny"]
    kept = surgery.kept_rows(dense, plan, family)
    assert list(kept) == ["down_blocks.0", "down_blocks.1", *(f"up_blocks.{k}" for k in (1, 2, 3))]
    assert len(surgery.kept_rows(dense, _plans(dense)["small"], family)) == 8
    pruned = surgery.apply(dense, plan, family)
    surgery.save(tmp_path, pruned, plan, "conditional_unet", SMALL)
    again, _ = surgery.load(tmp_path)
    tiny.assert_same(pruned.state_dict(), again.state_dict())


def test_the_nearest_pattern_is_taken_of_those_that_remove_something():
    """LDM's tiny network has one pair a level, and its last level is wider: only Small is left."""
    select = methods.load(FOUND["bk_sdm"])
    plan = select(tiny.context("ldm", sparsity=0.44))
    assert plan.layers == ("mid_block",) and plan.notes["pattern"] == "small"
    assert list(plan.notes["shares"]) == ["small"]
    with pytest.raises(
        CellError, match=r"no pattern removes about 0\.62 of this UNet: small 0\.25"
    ):
        select(tiny.context("ldm", sparsity=0.62))


def test_the_pattern_of_transformers_is_tinyfusions_list():
    layers = [tiny.models.units.Layer(str(index), 1) for index in range(28)]
    kept = sorted(int(name) for name in GLOBALS["kept_of_halves"](layers))
    assert kept == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    odd = GLOBALS["kept_of_halves"](layers[:13])
    assert sorted(map(int, odd)) == [0, 2, 4, 8, 10, 12]
    for count in range(2, 30):  # of equal blocks half go, but for one of an odd number
        assert len(GLOBALS["kept_of_halves"](layers[:count])) == count // 2


def test_half_of_dit_xl_2_by_the_pattern():
    """TinyFusion's D14 counts, with 14 of 28 equal blocks."""
    entry = models.published("dit")["dit_xl_2_256"]
    dit = models.family("dit")
    with torch.device("meta"):
        model = dit.build(entry.config)
    layers = dit.layers(model, "block")
    gone = {layer.name for layer in layers} - GLOBALS["kept_of_halves"](layers)
    for name in gone:
        dit.remove_layer(model, name)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 340_457_504
