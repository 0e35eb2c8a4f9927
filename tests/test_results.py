"""The committed results of the embedded track follow from the raw records and mean something."""

import json
from pathlib import Path

import pandas as pd
import pytest

from prunebench import leaderboard, tracks

RESULTS = Path(__file__).parents[1] / "results" / "embedded"
DIVISIONS = {
    "matched": RESULTS,
    "published": RESULTS / "published",
    "recovery": RESULTS / "recovery",
}
TABLES = ("leaderboard.csv", "leaderboard.md", "leaderboard.tex", "leaderboard.bib")
ORACLE = ("oracle.csv", "oracle.md")
PRUNED = ("layers", "widths", "weights")


def raw(division: str) -> list[Path]:
    return sorted(f for f in (DIVISIONS[division] / "raw").rglob("seed*.json"))


def masks() -> list[Path]:
    return sorted((RESULTS / "raw" / "oracle").rglob("mask*.json"))


def board(division: str = "matched") -> pd.DataFrame:
    return pd.read_csv(DIVISIONS[division] / "leaderboard.csv")


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return board()


def test_these_are_the_divisions_of_the_track():
    assert list(tracks.load("embedded").divisions) == list(DIVISIONS)


@pytest.mark.parametrize("division", DIVISIONS)
def test_the_tables_follow_from_the_raw_records(tmp_path, division):
    track = tracks.load("embedded")
    leaderboard.build(
        raw(division),
        tmp_path,
        expected_cells=[tracks.as_dict(cell) for cell in track.cells(division)],
        title=f"{track.content['title']}: {division}",
        compares=track.divisions[division]["compares"],
        oracle_files=masks() if division == "matched" else (),
    )
    for name in (*TABLES, *(ORACLE if division == "matched" else ())):
        assert (tmp_path / name).read_text() == (DIVISIONS[division] / name).read_text()


@pytest.mark.parametrize("division", DIVISIONS)
def test_every_cell_is_there_and_well(division):
    cells = tracks.load("embedded").cells(division)
    expected = {tuple(tracks.as_dict(cell).values()) for cell in cells}
    records = [json.loads(file.read_text()) for file in raw(division)]
    assert {tuple(record["cell"].values()) for record in records} == expected
    assert {record["status"] for record in records} == {"ok"}
    assert (board(division).seeds_ok >= 3).all()


def test_records_come_from_a_clean_tree_and_mixed_code_is_told():
    files = [file for division in DIVISIONS for file in raw(division)] + masks()
    found = [json.loads(file.read_text())["provenance"] for file in files]
    assert not any(provenance["dirty"] for provenance in found)
    assert len({(p["cpu"], p["cores"]) for p in found}) == 1
    for division, folder in DIVISIONS.items():
        records = [json.loads(file.read_text()) for file in raw(division)]
        codes = {s["code"] for record in records for s in record["stages"].values()}
        codes |= {record["provenance"]["code"] for record in records}
        told = "different versions of the code" in (folder / "leaderboard.md").read_text()
        assert told == (len(codes) > 1)


def test_the_budget_is_kept():
    """No pruned cell trains on more images than its budget, in selection and recovery together."""
    budgets, checked = tracks.load("embedded").content["budgets"], 0
    for division in DIVISIONS:
        for file in raw(division):
            record = json.loads(file.read_text())
            limit = budgets.get(record["cell"]["recovery"].rpartition("-")[2], 0)
            assert record["budget"]["recovery"]["student_forward"] <= limit, file
            if "trained" in record:  # records of before this was kept lack it
                assert sum(record["trained"].values()) <= limit, file
                checked += record["trained"]["selection"] > 0
    assert checked > 9


def test_dense_beats_every_pruned_row_without_recovery(rows):
    dense = rows[rows.method == "dense"].set_index("model").fid_mean
    pruned = rows[(rows.recovery == "none") & rows.kind.isin(PRUNED)]
    assert len(pruned) > 24
    worse = pruned.fid_mean > pruned.model.map(dense)
    assert worse.all(), pruned[~worse][["model", "method", "fid_mean"]]


def test_scratch_is_worse_than_pruned_and_recovered(rows):
    trained = rows[(rows.recovery == "finetune-low") & (rows.kind == "layers")]
    scratch = trained[trained.method == "scratch"].set_index("model").fid_mean
    others = trained[trained.method != "scratch"]
    assert len(others) > 9
    better = others.fid_mean < others.model.map(scratch)
    assert better.all(), others[~better][["model", "method", "fid_mean"]]


def test_recovery_helps_on_average(rows):
    pruned = rows[rows.kind.isin(["layers", "widths"]) & (rows.method != "scratch")]
    means = pruned.groupby(["model", "recovery"]).fid_mean.mean().unstack()
    assert (means["finetune-low"] < means["none"]).all()


def test_the_oracle_holds_every_mask_and_bounds_the_selections(rows):
    found = pd.read_csv(RESULTS / "oracle.csv")
    counts = found.groupby(["model", "recovery", "seed"]).layers.nunique()
    assert (counts == 28).all() and found.exhaustive.all()
    layers = rows[
        (rows.kind == "layers") & rows.model.isin(found.model) & (rows.method != "scratch")
    ]
    assert layers.oracle_beaten_mean.between(0, 1).all() and len(layers) >= 16
    untrained = layers[(layers.recovery == "none")]
    assert (untrained.oracle_gap_mean > -0.5).all()  # sampling noise of other seeds at most
    random = untrained[untrained.method == "random_layers"].oracle_beaten_mean
    assert random.between(0.1, 0.9).all()


def test_without_recovery_a_selection_is_one_of_the_masks():
    """Same seed, same mask: the oracle and the cell drew the same images, to the last bit."""
    found = pd.read_csv(RESULTS / "oracle.csv", float_precision="round_trip")
    checked = 0
    for file in raw("matched"):
        record = json.loads(file.read_text())
        cell, plan = record["cell"], record["plan"]
        if cell["recovery"] == "none" and plan["layers"] and cell["seed"] in set(found.seed):
            same = found[(found.model == cell["model"]) & (found.recovery == "none")]
            same = same[(same.layers == " ".join(plan["layers"])) & (same.seed == cell["seed"])]
            for fid in same.fid:
                assert fid == record["quality"]["fid"], file
                checked += 1
    assert checked >= 6
