"""The committed results follow from the raw records, and the records keep the suite's contracts.

What they find (dense beats this, scratch loses that) is no test: the README says it, computed
by scripts/write_results.py.
"""

from pathlib import Path

import pandas as pd
import pytest

from prunebench import leaderboard, tracks
from prunebench.leaderboard.collect import cell_key, key_of
from prunebench.records import upgrade
from prunebench.records.schema import Score

RESULTS = Path(__file__).parents[1] / "results" / "embedded"
DIVISIONS = {
    "matched": RESULTS,
    "as_published": RESULTS / "as_published",
    "recovery": RESULTS / "recovery",
}
TABLES = ("leaderboard.csv", "leaderboard.md", "leaderboard.tex", "leaderboard.bib")
ORACLE = ("oracle.csv", "oracle.md")


def raw(division: str) -> list[Path]:
    return sorted(f for f in (DIVISIONS[division] / "raw").rglob("seed*.json"))


def masks() -> list[Path]:
    return sorted((RESULTS / "raw" / "oracle").rglob("mask*.json"))


def scores(division: str) -> list[Score]:
    return [upgrade.parse(file, file.read_bytes()) for file in raw(division)]


def board(division: str = "matched") -> pd.DataFrame:
    return pd.read_csv(DIVISIONS[division] / "leaderboard.csv")


def planned(division: str) -> list[dict]:
    """The track's cells of the methods that the records have: whoever adds one has run nothing."""
    known = {score.identity.method for score in scores(division)}
    cells = tracks.load("embedded").cells(division)
    return [tracks.as_dict(cell) for cell in cells if cell.method in known]


def test_these_are_the_divisions_of_the_track():
    assert list(tracks.load("embedded").divisions) == list(DIVISIONS)


@pytest.mark.parametrize("division", DIVISIONS)
def test_the_tables_follow_from_the_raw_records(tmp_path, division):
    track = tracks.load("embedded")
    leaderboard.build(
        raw(division),
        tmp_path,
        expected_cells=planned(division),
        title=f"{track.settings.title}: {division}",
        compares=track.divisions[division].compares,
        oracle_files=masks() if division == "matched" else (),
        older=True,
    )
    for name in (*TABLES, *(ORACLE if division == "matched" else ())):
        assert (tmp_path / name).read_text() == (DIVISIONS[division] / name).read_text()


@pytest.mark.parametrize("division", DIVISIONS)
def test_every_cell_is_there_and_well(division):
    found = scores(division)
    assert {key_of(score.identity) for score in found} == set(map(cell_key, planned(division)))
    assert {score.status for score in found} == {"ok"}
    assert (board(division).seeds_ok == board(division).seeds_expected).all()


@pytest.mark.parametrize("division", DIVISIONS)
def test_records_come_from_a_clean_tree_and_what_is_mixed_is_told(division):
    found = scores(division)
    assert not any(score.provenance.dirty for score in found)
    text = (DIVISIONS[division] / "leaderboard.md").read_text()
    codes = {stage.code for score in found for stage in score.stages.values()}
    codes |= {score.provenance.code for score in found}
    assert ("different versions of the code" in text) == (len(codes) > 1)
    machines = {tuple(score.stages["cost"].machine.model_dump().values()) for score in found}
    assert ("different hardware" in text) == (len(machines) > 1)


@pytest.mark.parametrize("division", DIVISIONS)
def test_the_budget_is_kept(division):
    """No pruned cell trains on more images than its budget, in selection and recovery together."""
    budgets, found = tracks.load("embedded").settings.budgets, scores(division)
    for score in found:
        limit = budgets.get(score.identity.recovery.rpartition("-")[2], 0)
        assert score.budget.recovery.student_forward <= limit, score.identity
        assert score.trained.selection + score.trained.recovery <= limit, score.identity


def test_the_oracle_holds_every_mask_once():
    found = pd.read_csv(RESULTS / "oracle.csv")
    for _, group in found.groupby(["model", "recovery", "seed"]):
        assert len(group) == group.layers.nunique() == group.masks.iloc[0]
    rows = board()
    placed = rows[rows.oracle_beaten_mean.notna()]
    assert (placed.kind == "layers").all() and placed.oracle_beaten_mean.between(0, 1).all()


def test_without_recovery_a_selection_is_one_of_the_masks():
    """Same seed, same mask: the oracle and the cell drew the same images, to the last bit."""
    found = pd.read_csv(RESULTS / "oracle.csv", float_precision="round_trip")
    found, checked = found[found.recovery == "none"], 0
    for score in scores("matched"):
        cell = score.identity
        same = found[(found.model == cell.model) & (found.seed == cell.seed)]
        same = same[same.layers == " ".join(score.plan.layers)]
        for fid in same.fid if cell.recovery == "none" else ():
            assert fid == score.quality["fid"].value, cell
            checked += 1
    assert checked
