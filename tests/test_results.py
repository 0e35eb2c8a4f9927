"""The committed results of the embedded track follow from the raw records and mean something."""

import json
from pathlib import Path

import pandas as pd
import pytest

from prunebench import config, leaderboard

RESULTS = Path(__file__).parents[1] / "results" / "embedded"
RAW = sorted((RESULTS / "raw").rglob("*.json"))


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "leaderboard.csv")


def test_the_tables_follow_from_the_raw_records(tmp_path):
    track = config.load("embedded")
    cells = [config.as_dict(cell) for cell in track.cells()]
    leaderboard.build(RAW, tmp_path, expected_cells=cells, title=track.content["title"])
    for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.tex", "leaderboard.bib"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_every_cell_of_the_track_is_there_and_well(rows):
    expected = {tuple(config.as_dict(cell).values()) for cell in config.load("embedded").cells()}
    records = [json.loads(file.read_text()) for file in RAW]
    assert {tuple(record["cell"].values()) for record in records} == expected
    assert {record["status"] for record in records} == {"ok"}
    assert len({record["provenance"]["code"] for record in records}) == 1
    assert not any(record["provenance"]["dirty"] for record in records)
    assert (rows.seeds_ok >= 3).all()


def test_dense_beats_every_pruned_row_without_recovery(rows):
    dense = rows[rows.method == "dense"].set_index("model").fid_mean
    pruned = rows[(rows.recovery == "none") & rows.kind.isin(["layers", "widths", "weights"])]
    assert len(pruned) == 24
    worse = pruned.fid_mean > pruned.model.map(dense)
    assert worse.all(), pruned[~worse][["model", "method", "fid_mean"]]


def test_scratch_is_worse_than_pruned_and_recovered(rows):
    trained = rows[(rows.recovery == "finetune-low") & (rows.kind == "layers")]
    scratch = trained[trained.method == "scratch"].set_index("model").fid_mean
    others = trained[trained.method != "scratch"]
    assert len(others) == 9
    better = others.fid_mean < others.model.map(scratch)
    assert better.all(), others[~better][["model", "method", "fid_mean"]]


def test_recovery_helps_on_average(rows):
    pruned = rows[rows.kind.isin(["layers", "widths"]) & (rows.method != "scratch")]
    means = pruned.groupby(["model", "recovery"]).fid_mean.mean().unstack()
    assert (means["finetune-low"] < means["none"]).all()
