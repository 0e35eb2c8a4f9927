"""Applying, checking, saving and loading plans; every kind, every family, to the last bit."""

import json

import pytest
import tiny
import torch

from prunebench.errors import CellError, UserError
from prunebench.models.units import Member, Width
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts


def _pruned(name: str, kind: str) -> tuple[torch.nn.Module, Plan]:
    plan = tiny.plan(name, kind)
    return surgery.apply(tiny.dense(name), plan, tiny.INSTANCES[name].module), plan


def _saved(folder, name: str, kind: str) -> tuple[torch.nn.Module, Plan]:
    model, plan = _pruned(name, kind)
    surgery.save(folder, model, plan, tiny.INSTANCES[name].family, tiny.INSTANCES[name].config)
    return model, plan


@pytest.mark.parametrize("kind", tiny.PLAN_KINDS)
def test_save_and_load_are_bit_identical(tmp_path, name, kind):
    model, plan = _saved(tmp_path, name, kind)
    again, loaded = surgery.load(tmp_path)
    tiny.assert_same(model.state_dict(), again.state_dict())
    tiny.assert_same(dict(plan.masks), dict(loaded.masks))
    assert loaded.to_json() == plan.to_json()
    assert torch.equal(tiny.output(model, name), tiny.output(again, name))
    assert not again.training
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


@pytest.mark.parametrize("kind", ["branch", "widths"])
def test_a_loaded_model_trains_and_saves_again(tmp_path, core, kind):
    _saved(tmp_path / "first", core, kind)
    model, plan = surgery.load(tmp_path / "first")
    model(*tiny.inputs(core)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    instance = tiny.INSTANCES[core]
    surgery.save(tmp_path / "second", model, plan, instance.family, instance.config)
    again, _ = surgery.load(tmp_path / "second")
    tiny.assert_same(model.state_dict(), again.state_dict())
    assert torch.equal(tiny.output(model, core), tiny.output(again, core))


def test_applying_is_what_zeroing_would_do(core):
    """A masked model computes what the dense one does with those weights at zero."""
    model, plan = _pruned(core, "unstructured")
    zeroed = tiny.dense(core)
    for weight, mask in plan.masks.items():
        zeroed.get_parameter(weight).data[~mask] = 0
    tiny.assert_same(model.state_dict(), zeroed.state_dict())


def test_removed_neurons_are_as_good_as_disconnected():
    """Removing widths of a transformer equals cutting their outgoing weights."""
    plan = tiny.plan("dit", "widths", 0.3)
    cut, family = tiny.dense("dit"), tiny.INSTANCES["dit"].module
    assert {name.rpartition(".")[2] for name in plan.kept} == {"heads", "neurons"}
    for unit in family.widths(cut):
        outgoing = unit.members[-1]
        gone = sorted(set(range(unit.size)) - set(plan.kept[unit.name]))
        columns = outgoing.index[gone].flatten()
        cut.get_parameter(outgoing.tensor).data.index_fill_(outgoing.axis, columns, 0)
    model = surgery.apply(tiny.dense("dit"), plan, family)
    expected = tiny.output(cut, "dit")
    torch.testing.assert_close(tiny.output(model, "dit"), expected, rtol=1e-4, atol=1e-5)


def test_module_records_follow_the_tensors(name):
    """What modules say of themselves (printing, MAC counters) fits their weights."""
    for kind in ("branch", "widths"):
        model, _ = _pruned(name, kind)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                assert (module.out_features, module.in_features) == module.weight.shape
            if isinstance(module, torch.nn.Conv2d):
                assert (module.out_channels, module.in_channels) == module.weight.shape[:2]
            if isinstance(module, torch.nn.GroupNorm):
                assert module.num_channels == len(module.weight)
                assert module.num_channels % module.num_groups == 0


def test_axes_shared_by_several_widths_are_cut_once():
    model = torch.nn.Linear(6, 2, bias=False)
    model.weight.data.copy_(torch.arange(12.0).view(2, 6))
    halves = [
        Width(str(n), 3, (Member("weight", 1, torch.arange(3).unsqueeze(1) + 3 * n),))
        for n in (0, 1)
    ]
    surgery.shrink(model, [(halves[0], (0,)), (halves[1], (1, 2))])
    assert model.weight.tolist() == [[0.0, 4.0, 5.0], [6.0, 10.0, 11.0]]
    assert model.in_features == 3


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 63, 1001])
def test_masks_pack_to_bits(size):
    generator = torch.Generator().manual_seed(size)
    masks = {"m": torch.rand(size, generator=generator) < 0.5, "n": torch.ones(size, 1).bool()}
    packed = surgery._packed(masks)
    assert {len(tensor) for tensor in packed.values()} == {-(-size // 8)}
    tiny.assert_same(surgery._unpacked(packed, masks), masks)


# Plans that do not fit the model.


def _mask(name: str, weight: str) -> torch.Tensor:
    return torch.ones(tiny.dense(name).get_parameter(weight).shape, dtype=torch.bool)


FC1 = "blocks.0.mlp.fc1.weight"
MISFITS = {
    "unknown layer": (
        "dit",
        lambda: Plan(layers=("blocks.9",)),
        r"names a layer that does not exist: blocks\.9; the model has blocks\.0, ",
    ),
    "unknown width": (
        "dit",
        lambda: Plan(kept={"blocks.0.mlp.hidden": (0,)}),
        r"names a width that does not exist: blocks\.0\.mlp\.hidden",
    ),
    "unknown weight": (
        "dit",
        lambda: Plan(masks={"x_embedder.proj.weight": torch.ones(1).bool()}, pattern="2:4"),
        r"names a maskable weight that does not exist: x_embedder\.proj\.weight",
    ),
    "nothing kept": (
        "unet",
        lambda: Plan(kept={"conv_in": ()}),
        r"keeps 0 channels of width 'conv_in'.* from 0 to 7, at least one",
    ),
    "kept twice": ("dit", lambda: Plan(kept={"blocks.0.attn.heads": (1, 1)}), "must be distinct"),
    "kept outside": ("dit", lambda: Plan(kept={"blocks.0.attn.heads": (4,)}), "from 0 to 3"),
    "unbalanced norm": (
        "unet",
        lambda: Plan(kept={"conv_in": (0, 1, 2, 3, 4, 5, 6)}),
        "unequal numbers of channels in the 4 normalisation groups of width 'conv_in'",
    ),
    "empty norm group": (
        "unet",
        lambda: Plan(kept={"conv_in": (0, 1, 2, 3)}),
        "unequal numbers of channels",
    ),
    "mask of floats": (
        "dit",
        lambda: Plan(masks={FC1: _mask("dit", FC1).float()}, pattern="unstructured"),
        r"is torch\.float32 \(128, 32\), not bool \(128, 32\)",
    ),
    "mask of another shape": (
        "dit",
        lambda: Plan(masks={FC1: _mask("dit", FC1).T}, pattern="unstructured"),
        r"is torch\.bool \(32, 128\), not bool \(128, 32\)",
    ),
    "masks without a pattern": (
        "dit",
        lambda: Plan(masks={FC1: _mask("dit", FC1)}),
        "has 1 masks and the pattern None",
    ),
    "unknown pattern": (
        "dit",
        lambda: Plan(masks={FC1: _mask("dit", FC1)}, pattern="two of four"),
        "has 1 masks and the pattern 'two of four'",
    ),
    "pattern without masks": (
        "dit",
        lambda: Plan(layers=("blocks.0",), pattern="2:4"),
        "has 0 masks and the pattern '2:4'",
    ),
    "layer twice": (
        "dit",
        lambda: Plan(layers=("blocks.0", "blocks.0")),
        r"removes layer 'blocks\.0' and then again",
    ),
    "layer and its branch": (
        "dit",
        lambda: Plan(layers=("blocks.0", "blocks.0.mlp")),
        r"removes layer 'blocks\.0' and then again all or part of it",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_the_model(case):
    name_, plan, message = MISFITS[case]
    model = tiny.dense(name_)
    with pytest.raises(CellError, match=message):
        surgery.apply(model, plan(), tiny.INSTANCES[name_].module)
    tiny.assert_same(model.state_dict(), tiny.dense(name_).state_dict())


# Damaged files.


@pytest.mark.parametrize("file", [surgery.PLAN, surgery.WEIGHTS, surgery.MASKS])
@pytest.mark.parametrize("damage", ["missing", "cut short", "empty"])
def test_damaged_files_are_named(tmp_path, file, damage):
    _saved(tmp_path, "dit", "unstructured")
    content = (tmp_path / file).read_bytes()
    if damage == "missing":
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content[: len(content) // 2] if damage != "empty" else b"")
    with pytest.raises(UserError) as raised:
        surgery.load(tmp_path)
    assert str(tmp_path / file) in str(raised.value)
    assert ("does not exist" if damage == "missing" else "is corrupt") in str(raised.value)


def _edit_plan(folder, change) -> None:
    content = json.loads((folder / surgery.PLAN).read_text())
    change(content)
    (folder / surgery.PLAN).write_text(json.dumps(content))


EDITS = {
    "other layers": lambda content: content["plan"].update(layers=[]),
    "unknown layer": lambda content: content["plan"].update(layers=["blocks.17"]),
    "other depth": lambda content: content["config"].update(depth=5),
    "no plan": lambda content: content.pop("plan"),
    "other family": lambda content: content.update(family="unknown"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_weights_that_do_not_fit_their_plan(tmp_path, edit):
    _saved(tmp_path, "dit", "block")
    _edit_plan(tmp_path, EDITS[edit])
    with pytest.raises(
        UserError, match="unknown model family" if "family" in edit else str(tmp_path)
    ):
        surgery.load(tmp_path)


def test_masks_that_do_not_fit_their_weights(tmp_path):
    _saved(tmp_path, "dit", "unstructured")
    packed = artefacts.read_tensors(tmp_path / surgery.MASKS)
    artefacts.write_tensors(
        tmp_path / surgery.MASKS, {name: tensor[:-1] for name, tensor in packed.items()}
    )
    with pytest.raises(UserError, match="does not fit its plan"):
        surgery.load(tmp_path)


def test_a_leftover_masks_file_is_not_read(tmp_path):
    _saved(tmp_path, "dit", "unstructured")
    _saved(tmp_path, "dit", "block")
    _, plan = surgery.load(tmp_path)
    assert not plan.masks
