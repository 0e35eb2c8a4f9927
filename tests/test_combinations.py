"""Whether gains add up: made-up records with known interactions, and what a board says of them."""

import dataclasses
import math
from pathlib import Path

import examples
import numpy as np
import pandas as pd
import pytest
import tiny
from scipy.stats import bootstrap
from test_leaderboard import DENSE, make_score, write_cell

from prunebench import tracks
from prunebench.leaderboard import build, collect, combinations
from prunebench.records import sealed
from prunebench.stages import cost

# What each change does to FID and to time, by itself.
FID = {"pruned": 3.0, "kd": -1.0, "int8": 0.5, "few": 2.0}
TIME = {"pruned": 0.8, "kd": 1.0, "int8": 0.7, "few": 0.5}
ORIGIN, SEEDS = 2.0, 4


def records(noise: float = 0.0, seeds: int = SEEDS, dense_seed: int = 0, **together) -> list:
    """Every combination of two precisions, two samplings and a row recovered in two ways.

    Args:
        noise: standard deviation of what a seed adds to all of its cells, and a tenth of what it
            adds to each.
        together: (FID, time) of interactions, by the names of their changes: "pruned_int8".
    """
    random = np.random.default_rng(dense_seed)
    shared = random.normal(size=seeds) * noise
    own = {"method": "dense", "sparsity": 0.0, "recovery": "none"}
    pruned = {"method": "a", "sparsity": 0.25, "recovery": "finetune-low"}
    rows = {(): own, ("pruned",): pruned,
            ("pruned", "kd"): {**pruned, "recovery": "output_kd-low"}}  # fmt: skip
    made = []
    for row, names in rows.items():
        for axes in ((), ("int8",), ("few",), ("int8", "few")):
            changes = {*row, *axes}
            fid, time = ORIGIN, 1.0
            for name in changes:
                fid, time = fid + FID[name], time * TIME[name]
            for name, (more, times) in together.items():
                if set(name.split("_")) <= changes:
                    fid, time = fid + more, time * times
            drawn = {"precision": "int8" if "int8" in axes else "fp32",
                     "sampling": "few" if "few" in axes else "default"}  # fmt: skip
            for seed in range(seeds):
                cell = {**examples.CELL, **names, **drawn, "dense_seed": dense_seed, "seed": seed}
                each = fid + shared[seed] + random.normal() * noise / 10
                label = DENSE if not row else {"title": "A method"}
                made.append(make_score(cell, fid=each, ms=10 * time, dense_ms=10.0, **label))
    return made


def found(made: list) -> dict[str, combinations.Together]:
    sources = [collect.Source(None, b"", record) for record in made]
    return {one.name: one for one in combinations.found(collect.cell_frame(sources))}


ROW, KD = "A method 25%, finetune-low", "A method 25%, output_kd-low"
SWAP = f"{KD} instead of finetune-low"


def test_every_combination_whose_parts_were_measured_has_a_line():
    axes = ("int8", "few", "int8 + few")
    expected = {f"{row} + {name}" for row in (ROW, KD, SWAP) for name in axes}
    assert set(found(records())) == {*expected, "int8 + few"}
    without = [record for record in records() if record.identity.precision == "fp32"
               or record.identity.method != "dense"]  # fmt: skip
    # Of int8 alone only the fine-tuned row is left, beside which distillation can stand.
    assert set(found(without)) == {f"{ROW} + few", f"{KD} + few"} | {
        f"{SWAP} + {name}" for name in axes
    }


def test_independent_changes_have_no_interaction():
    for one in found(records(noise=0.3)).values():
        assert one.fid.value == pytest.approx(0, abs=0.2) and one.fid.units == SEEDS
        assert one.time is None or one.time.value == pytest.approx(1)
        assert one.fid.predicted + one.fid.value == pytest.approx(one.fid.measured)
    (summary,) = combinations.sentences(list(found(records()).values()))
    assert summary.startswith("0 of 12 intervals of pairs exclude independence; of")


def test_known_interactions_are_found_where_they_are():
    made = found(records(pruned_int8=(1.5, 1.2), kd_few=(-0.75, 1.0)))
    values = {name: (one.fid.value, one.time and one.time.value) for name, one in made.items()}
    expected = {  # also of all that holds the pair; distillation times nothing
        f"{ROW} + int8": (1.5, 1.2), f"{ROW} + few": (0, 1), f"{ROW} + int8 + few": (1.5, 1.2),
        f"{KD} + int8": (1.5, 1.2), f"{KD} + few": (-0.75, 1), f"{KD} + int8 + few": (0.75, 1.2),
        # The fine-tuned row has its own trouble with int8, which is no trouble of distillation's.
        f"{SWAP} + int8": (0, None), f"{SWAP} + few": (-0.75, None),
        f"{SWAP} + int8 + few": (-0.75, None), "int8 + few": (0, 1),
    }  # fmt: skip
    assert set(values) == set(expected)
    for name, (fid, time) in expected.items():
        assert values[name][0] == pytest.approx(fid), name
        assert values[name][1] == (time and pytest.approx(time)), name
    joint = made[f"{ROW} + int8"]
    assert joint.fid.measured == pytest.approx(2 + 3 + 0.5 + 1.5)
    assert joint.time.measured == pytest.approx(0.8 * 0.7 * 1.2)


def test_the_interval_is_over_what_seeds_share_and_agrees_with_the_bootstrap():
    """Seeds move all of their cells by 2.0, which cancels, and each by 0.2, which does not."""
    one = found(records(noise=2.0, seeds=40, pruned_int8=(1.5, 1.2)))[f"{ROW} + int8"]
    assert one.fid.units == 40 and one.fid.told
    assert 0.05 < one.fid.high - one.fid.value < 0.2
    table = {
        place: [r.quality["fid"].value for r in records(2.0, 40, pruned_int8=(1.5, 1.2))
                if (r.identity.method, r.identity.recovery, r.identity.precision,
                    r.identity.sampling) == key]
        for place, key in enumerate([
            ("a", "finetune-low", "int8", "default"), ("a", "finetune-low", "fp32", "default"),
            ("dense", "none", "int8", "default"), ("dense", "none", "fp32", "default")])
    }  # fmt: skip
    gaps = np.array(table[0]) - table[1] - table[2] + np.array(table[3])
    resampled = bootstrap((gaps,), np.mean, random_state=0).confidence_interval
    assert one.fid.low == pytest.approx(resampled.low, abs=0.03)
    assert one.fid.high == pytest.approx(resampled.high, abs=0.03)


def test_student_covers_independence_as_often_as_it_says():
    random, names = np.random.default_rng(0), pd.MultiIndex.from_product(
        [[0], range(3)], names=combinations.UNIT
    )  # fmt: skip
    told = 0
    for _ in range(400):
        parts = pd.DataFrame(random.normal(size=(3, 4)), names)
        told += combinations.interaction(parts).told
    assert 0.02 < told / 400 < 0.09


def test_dense_trainings_are_the_units_where_there_are_several():
    made = [*records(0.1), *records(0.1, dense_seed=1, pruned_int8=(2.0, 1.0))]
    one = found(made)[f"{ROW} + int8"].fid
    assert one.units == 2 and one.value == pytest.approx(1.0, abs=0.1)
    assert not one.told and one.high > 5  # two trainings that differ tell nothing


def test_one_seed_has_no_interval():
    made = list(found(records(seeds=1, pruned_int8=(9.0, 2.0))).values())
    assert all(math.isnan(one.fid.low) and not one.fid.told for one in made)
    assert combinations.sentences(made) == ["No pair has an interval: that takes two seeds."]


def test_what_excludes_independence_is_said_and_nothing_else():
    made = found(records(pruned_int8=(1.5, 1.2), kd_few=(-0.75, 1.0)))
    summary, *told = combinations.sentences(list(made.values()))
    assert summary.startswith(f"{len(told)} of 12 intervals of pairs exclude independence;")
    first = f"sit: “{ROW}” and int8"
    harm = f"{first} hurt each other: FID {made[f'{ROW} + int8'].fid.measured:.2f} where "
    assert any(text.startswith(harm) and "[+" in text for text in told)
    assert any(text.startswith(f"sit: “{SWAP}” and few help each other: FID ") for text in told)
    assert any(text.startswith(f"{first} take more time together") for text in told)
    assert not any(text.startswith((f"sit: “{ROW}” and few", "sit: int8 and few")) for text in told)
    assert len(told) == 4 + 2  # of the pairs; not of three changes, which hold a pair


def test_a_seed_that_a_part_lacks_is_left_out():
    made = [r for r in records(pruned_int8=(1.5, 1.0))
            if not (r.identity.method == "dense" and r.identity.precision == "int8"
                    and r.identity.seed == 2)]  # fmt: skip
    all_ = found(made)
    assert all_[f"{ROW} + int8"].fid.units == 3 and all_[f"{ROW} + few"].fid.units == 4


def test_the_board_of_a_division_of_combinations(tmp_path):
    made = records(0.1, pruned_int8=(1.5, 1.2))
    files = [write_cell(tmp_path, record) for record in made]
    wanted = [record.identity.model_dump(exclude={"stage"}) for record in made]
    build(files, tmp_path / "out", expected_cells=wanted, title="t", compares="combinations")
    out = {file.name: file.read_text() for file in (tmp_path / "out").glob("*.*")
           if file.suffix in (".md", ".csv", ".html")}  # fmt: skip
    lines = pd.read_csv(tmp_path / "out/combinations.csv")
    assert len(lines) == 10 and lines.fid_low.notna().all() and lines.time_value.isna().sum() == 3
    sentence = "and int8 hurt each other"
    assert all(sentence in out[name] for name in (
        "combinations.md", "leaderboard.md", "leaderboard.html"))  # fmt: skip
    assert "Dense (int8, few" in out["leaderboard.md"]
    assert len(list((tmp_path / "out/raw").rglob("*.json"))) == len(made)
    again = [dataclasses.replace(source) for source in collect.read_sources(files, wanted)]
    rows = collect.aggregate(collect.cell_frame(again), "combinations")
    assert (rows.seeds_ok == SEEDS).all() and len(rows) == 12
    assert rows[rows.kind == "none"].combination.iloc[0] == "fp32, default"


def test_other_boards_are_as_they_were(tmp_path):
    made = [record for record in records() if record.identity.precision == "fp32"
            and record.identity.sampling == "default"]  # fmt: skip
    build([write_cell(tmp_path, record) for record in made], tmp_path / "out",
          expected_cells=None, title="t")  # fmt: skip
    assert not list((tmp_path / "out").glob("combinations*"))
    assert "fp32" not in (tmp_path / "out/leaderboard.md").read_text()
    assert (tmp_path / "out/raw/sit/a/0.25/finetune-low/seed0.json").exists()


# The real stages.

BASE, FAR = ("fp32", "default"), ("int8", "few")
RUN = {  # what is run of a small division, and whether it is timed
    ("dit", "dense"): ((BASE, True), (("bf16", "few"), False), (FAR, True)),
    ("dit", "random_layers"): ((FAR, False),),
    ("unet", "dense"): ((("bf16", "default"), False), (("int8", "default"), True)),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[tracks.Track, Path, dict[tuple, tracks.Cell]]:
    """A track, its folder of runs, and cells by model, method, precision and sampling."""
    smoke, runs = tiny.smoke(), tmp_path_factory.mktemp("toy")
    content = tiny.plain(smoke) | {"precisions": ["fp32", "bf16", "int8"], "seeds": [0]}
    del content["oracle"], content["models"]["sit"]
    content["models"]["dit"]["samplings"] = {"few": {"sampler": "ddim", "steps": 2}}
    content["divisions"] = {
        "combined": {"compares": "combinations", "methods": ["random_layers"],
                     "recoveries": ["none"]}
    }  # fmt: skip
    track = tiny.track("toy", content, smoke.methods)
    cells = {(c.model, c.method, c.precision, c.sampling): c for c in track.cells()}
    for model in track.settings.models:
        tiny.run("dense", track, runs, model=model)
    for row, combinations_ in RUN.items():
        tiny.run("select", track, runs, cells[*row, *BASE])  # one for all
        for axes, timed in combinations_:
            for stage in ("cost", "sample") if timed else ("sample",):
                tiny.run(stage, track, runs, cells[*row, *axes])
    return track, runs, cells


def test_precisions_and_samplings_run_through_the_real_stages(toy):
    track, runs, cells = toy
    images, arithmetic = set(), {}
    for row, combinations_ in RUN.items():
        for (precision, sampling), timed in combinations_:
            own = tracks.Paths(track, cells[*row, precision, sampling], runs)
            drawn = sealed.read(Path(own.sample)).sampling
            assert drawn.steps == (2 if sampling == "few" else 4)
            assert (drawn.arithmetic is None) == (precision == "fp32")
            arithmetic[row[0], precision] = drawn.arithmetic
            images.add(Path(own.sample).with_name("images.safetensors").read_bytes())
            if timed:
                assert sealed.read(Path(own.cost)).latency.arithmetic == drawn.arithmetic
    assert len(images) == sum(map(len, RUN.values()))
    assert arithmetic["unet", "int8"].left and not arithmetic["unet", "bf16"].left
    assert arithmetic["dit", "int8"].weights == "int8"
    assert arithmetic["dit", "bf16"].weights == "bfloat16"


def test_a_combination_is_scored_beside_the_undisturbed_dense_model(toy):
    track, runs, cells = toy
    tiny.run("extractor", track, runs)
    score = sealed.read(tiny.run("score", track, runs, cells["dit", "dense", *FAR]))
    assert score.quality["lpips"].value > 0  # it would equal its own images
    assert score.identity.precision == "int8" and score.sampling.steps == 2


def test_a_combination_is_timed_beside_the_undisturbed_dense_model(toy, monkeypatch):
    track, runs, cells = toy
    seen, own = [], cost.sampler_for

    def spy(*arguments, **options):
        seen.append(own(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(cost, "sampler_for", spy)
    tiny.run("cost", track, runs, cells["dit", "random_layers", *FAR])
    pruned, dense = seen
    kinds = [type(sampler.model.t_embedder.mlp[0].weight).__name__ for sampler in seen]
    assert kinds == ["Int8Tensor", "Parameter"]
    assert (pruned.steps, dense.steps) == (2, 4)
