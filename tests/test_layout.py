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


@pytest.fixture
def crossed() -> tracks.Track:
    """Three precisions, and a second sampling of one of the models."""
    smoke = tiny.smoke()
    content = tiny.plain(smoke) | {"precisions": ["fp32", "bf16", "int8"]}
    content["models"]["dit"]["samplings"] = {"few": {"sampler": "ddim", "steps": 2}}
    content["divisions"]["combined"] = {
        "compares": "combinations", "methods": ["random_layers"],
        "recoveries": ["finetune-low", "output_kd-low"],
    }  # fmt: skip
    return tiny.track("crossed", content, smoke.methods)


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


def test_what_is_sampled_and_timed_has_a_folder_for_precision_and_sampling(crossed):
    layout = tracks.Layout(crossed, "r")
    names = {**CELL, "dense_seed": 0, "precision": "int8", "sampling": "few", "seed": 1}
    own = "r/crossed/dit/random_layers/0.25"
    axes = "precision-int8/sampling-few/seed1"
    assert layout.record("score", **names) == f"{own}/finetune-low/{axes}/score.json"
    assert layout.record("cost", **names) == f"{own}/selection/{axes}/cost.json"
    assert layout.record("select", **names) == f"{own}/selection/seed1/select.json"
    assert layout.record("recover", **names) == f"{own}/finetune-low/seed1/recover.json"
    paths = tracks.Paths(crossed, tracks.Cell(track="crossed", **names), "r")
    base = "r/crossed/dit/dense/0.0/none/precision-fp32/sampling-default/seed1"
    assert paths.dense_sample == f"{base}/sample.json"


STAGES_OF_CELLS = ("select", "cost", "recover", "sample", "score", "shard")


@pytest.mark.parametrize("stage", STAGES_OF_CELLS)
@pytest.mark.parametrize("which", ["several", "crossed"])
def test_names_are_read_back_from_wildcards(request, which, stage):
    track = request.getfixturevalue(which)
    layout, axes = tracks.Layout(track), {axis: values[-1] for axis, values in track.axes.items()}
    names = {**CELL, **axes, "seed": 1, "shard": 0}
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


def test_a_division_of_combinations_crosses_its_rows(crossed):
    cells = crossed.cells("combined")
    seeds, models = len(crossed.settings.seeds), {"dit": 6, "sit": 3, "unet": 3}
    rows = {"dense": 1, "random_layers": 2}  # two recoveries; no other control
    for model, combinations in models.items():
        for method, recoveries in rows.items():
            own = [c for c in cells if (c.model, c.method) == (model, method)]
            assert len(own) == combinations * recoveries * seeds
            assert len({(c.precision, c.sampling, c.recovery) for c in own}) * seeds == len(own)
    fewer = [c for c in cells if c.method == "fewer_steps"]
    assert {c.method for c in cells} == {*rows, "fewer_steps"}
    assert {(c.precision, c.sampling) for c in (*fewer, *crossed.cells())} == {("fp32", "default")}
    assert len({tracks.Paths(crossed, c).score for c in cells}) == len(cells) == len(set(cells))


def test_another_sampling_changes_only_what_is_drawn_with_it(crossed):
    names = {"model": "dit", "dense_seed": 0, "method": "random_layers"}

    def prints(track, sampling):
        return {s: track.fingerprint(s, **names, sampling=sampling) for s in STAGES_OF_CELLS}

    content = tiny.plain(crossed)
    content["models"]["dit"]["samplings"]["few"]["steps"] = 3
    edited = tiny.track("crossed", content, crossed.methods)
    assert (
        prints(crossed, "default") == prints(edited, "default") == prints(tiny.smoke(), "default")
    )
    before, after = prints(crossed, "few"), prints(edited, "few")
    assert {s for s in before if before[s] != after[s]} == {"cost", "sample", "shard"}
    content["models"]["dit"]["sampling"]["steps"] = 8
    again = prints(tiny.track("crossed", content, crossed.methods), "few")
    # Selection may look at how the model is sampled, and dense is timed beside every row.
    assert {s for s in again if again[s] != after[s]} == {"select", "cost"}


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


def test_a_precision_or_sampling_given_by_hand_is_checked(crossed):
    row = {**CELL, "seed": 0}
    cell = crossed.cell(**row)
    assert (cell.precision, cell.sampling) == ("fp32", "default")
    assert crossed.cell(**row, precision="int8", sampling="few").sampling == "few"
    for wrong, model in (({"precision": "int4"}, "dit"), ({"sampling": "few"}, "sit")):
        (key, value), row["model"] = *wrong.items(), model
        with pytest.raises(tracks.UserError, match=f"--{key} {value}: not a {key} of {model}"):
            crossed.cell(**row, **wrong)


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
