"""Where artefacts lie: one tree in the Snakefile and in the package, with room for every axis."""

import ast
import re

import pytest
import tiny

from prunebench import tracks
from prunebench.records import sealed
from prunebench.tracks.stages import STAGES

CELL = {"model": "dit", "method": "random_layers", "sparsity": 0.25, "recovery": "finetune-low"}


@pytest.fixture
def several() -> tracks.Track:
    smoke = tiny.smoke()
    return tiny.track("several", {**tiny.plain(smoke), "dense_seeds": [0, 3]}, smoke.methods)


def test_the_snakefile_shows_the_tree_of_the_package():
    text = (tiny.ROOT / "Snakefile").read_text()
    tree = ast.literal_eval(re.search(r"^TREE = (\{.*?^\})", text, re.M | re.S)[1])
    assert tree == {name: stage.record for name, stage in STAGES.items()}


def test_a_stage_has_one_name():
    for name, stage in STAGES.items():
        module, _, function = stage.function.partition(":")
        assert module == f"prunebench.stages.{name}" and function == name
        own = stage.record.rpartition("/")[2].partition(".")[0]
        assert own == {"shard": "shard{shard}of{shards}"}.get(name, name)
        assert f"\nrule {name}:" in _rules() or name == "leaderboard"


def _rules() -> str:
    return "".join(file.read_text() for file in (tiny.ROOT / "workflow/rules").glob("*.smk"))


def test_every_parameter_of_a_rules_command_is_quoted():
    used = re.findall(r"\{((?:params|log|output|input|wildcards)[^}]*)\}", _rules())
    assert used and all(name.endswith(":q") for name in used)


def test_an_axis_has_a_folder_where_the_track_has_several_values(several):
    one, two = tracks.Layout(tiny.smoke(), "r"), tracks.Layout(several, "r")
    assert one.dense("dit", 0) == "r/smoke/dit/dense/dense.json"
    assert two.dense("dit", 3) == "r/several/dit/dense_seed-3/dense/dense.json"
    names = {**CELL, "dense_seed": 3, "seed": 1}
    assert two.record("score", **names) == (
        "r/several/dit/dense_seed-3/random_layers/0.25/finetune-low/seed1/score.json"
    )
    assert two.log(two.dense("dit", 3)) == "r/several/logs/dit/dense_seed-3/dense/dense.log"


@pytest.mark.parametrize("stage", ["select", "cost", "recover", "sample", "score", "shard"])
def test_names_are_read_back_from_wildcards(several, stage):
    layout = tracks.Layout(several)
    names = {**CELL, "dense_seed": 3, "seed": 1, "shard": 0}
    wildcards = {
        name: str(value)
        for name, value in layout.wildcards(stage, names).items()
        if name in STAGES[stage].wildcards
    }
    found = layout.names_of(wildcards)
    shares = stage in ("select", "cost")  # one for all recoveries
    expected = {**names, "recovery": "none" if shares else CELL["recovery"]}
    assert {n: str(found[n]) for n in STAGES[stage].names} == {
        n: str(expected[n]) for n in STAGES[stage].names
    }


def test_cells_are_crossed_with_the_dense_seeds(several):
    cells, single = several.cells(), tiny.smoke().cells()
    assert len(cells) == len(set(cells)) == 2 * len(single)
    assert {cell.dense_seed for cell in cells} == {0, 3}
    assert len({tracks.Paths(several, cell).score for cell in cells}) == len(cells)
    paths = tracks.Paths(several, next(cell for cell in cells if cell.dense_seed == 3))
    assert all("/dense_seed-3/" in path for path in (paths.dense, paths.select, paths.dense_sample))
    assert {place["dense_seed"] for place in several.oracle()} == {0}


def test_a_dense_seed_given_by_hand_is_checked(several):
    assert tiny.smoke().dense_seed(None) == 0
    with pytest.raises(tracks.UserError, match="--dense-seed: track several has several; give"):
        several.dense_seed(None)
    with pytest.raises(tracks.UserError, match="--dense-seed 1: not a dense seed of several"):
        several.dense_seed(1)
    names = {"model": "dit", "dense_seed": 0}
    prints = {several.fingerprint("dense", **{**names, "dense_seed": seed}) for seed in (0, 3)}
    assert len(prints) == 2 and tiny.smoke().fingerprint("dense", **names) in prints


def test_dense_models_of_other_seeds_are_others(several, tmp_path):
    files = {
        seed: sealed.read(tiny.run("dense", several, tmp_path, model="dit", dense_seed=seed)).files[
            "model.safetensors"
        ]
        for seed in (0, 3)
    }
    alone = tiny.run("dense", tiny.smoke(), tmp_path, model="dit")
    assert files[0] != files[3]
    assert sealed.read(alone).files["model.safetensors"] == files[0]
