"""The oracle: which masks there are, what one job records, and how selections are placed."""

import itertools

import examples
import pandas as pd
import pytest
import tiny
from test_leaderboard import a_cell, make_score, write_cell

from prunebench import tracks
from prunebench.errors import UserError
from prunebench.leaderboard import build
from prunebench.leaderboard import oracle as board
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import parts, sealed
from prunebench.stages import oracle


def _masks(name: str, sparsity: float, count: int):
    return oracle.masks(tiny.dense(name), tiny.INSTANCES[name].module, sparsity, count)


def test_all_masks_of_equal_layers():
    found, exhaustive = _masks("dit", 0.5, 6)
    names = [f"blocks.{i}" for i in range(4)]
    assert found == list(itertools.combinations(names, 2)) and exhaustive


def test_too_many_masks_are_drawn_at_random_and_differ():
    found, exhaustive = _masks("dit", 0.5, 4)
    assert len(set(found)) == len(found) == 4 and not exhaustive
    assert found == _masks("dit", 0.5, 4)[0]
    assert all(len(mask) == 2 for mask in found)


def test_masks_of_unequal_layers_meet_the_target():
    found, exhaustive = _masks("unet", 0.25, 3)
    assert len(set(found)) == 3 and not exhaustive
    whole, family = tiny.dense("unet"), tiny.INSTANCES["unet"].module
    before = sum(p.numel() for p in whole.parameters())
    largest = max(layer.parameters for layer in family.layers(whole, "block"))
    for mask in found:
        pruned = surgery.apply(tiny.dense("unet"), Plan(layers=mask), family)
        gone = before - sum(p.numel() for p in pruned.parameters())
        assert abs(gone - 0.25 * before) <= largest


@pytest.fixture
def written(tmp_path):
    files = []
    for mask, fid in enumerate([9.0, 3.0, 5.0, None, 7.0]):
        files.append(tmp_path / f"mask{mask}.json")
        sealed.write(files[-1], examples.oracle(mask, fid))
    return files


def test_a_selection_is_placed_among_the_other_masks(written, tmp_path):
    chosen = {"a": "blocks.2", "b": "blocks.0", "t": "blocks.0", "w": ""}
    plans = {name: examples.PLAN.model_copy(update={"layers": (layer,)})
             for name, layer in chosen.items()}  # fmt: skip
    trained = parts.Spent(selection=examples.budget(student_backward=7),
                          recovery=examples.budget())  # fmt: skip
    cells = [make_score(a_cell("a"), fid=5.0, plan=plans["a"]),
             make_score(a_cell("w"), fid=5.0, plan=plans["w"], kind="widths"),
             make_score(a_cell("b", seed=1), fid=6.0, plan=plans["b"]),
             make_score(a_cell("t"), fid=6.0, plan=plans["t"], budget=trained)]  # fmt: skip
    files = [write_cell(tmp_path, score) for score in cells]
    out = tmp_path / "out"
    build(files, out, expected_cells=None, title="t", oracle_files=written)
    rows = pd.read_csv(out / "leaderboard.csv").set_index("method")
    # a is the mask with FID 5: of the three others 7 and 9 are worse
    assert rows.loc["a", ["oracle_beaten_mean", "oracle_gap_mean"]].tolist() == [2 / 3, 2.0]
    # b is the mask with FID 9, whatever its own seed's noise made of it
    assert rows.loc["b", ["oracle_beaten_mean", "oracle_gap_mean"]].tolist() == [0.0, 6.0]
    # t chose the same mask and trained in another way, which says nothing of the choice
    assert rows.loc["t", ["oracle_beaten_mean", "oracle_gap_mean"]].tolist() == [0.0, 6.0]
    assert rows.loc["w", ["oracle_beaten_mean", "oracle_gap_mean"]].isna().all()
    assert "Masks beaten" in (out / "leaderboard.md").read_text()
    masks = pd.read_csv(out / "oracle.csv").set_index("mask")
    assert masks["rank"].sort_index().tolist()[:3] == [4, 1, 2]
    assert (
        "| sit | 0 | 0.25 | none | 0 | 5 (all) | 3.00 | 6.00 | 9.00 | blocks.1 |"
        in (out / "oracle.md").read_text()
    )
    assert (out / "raw/oracle/sit/none/seed0/mask4.json").read_bytes() == written[4].read_bytes()


def test_masks_of_another_feature_extractor_are_refused(written, tmp_path):
    score = make_score(a_cell("a"), extractor=examples.extractor("1" * 64))
    file = write_cell(tmp_path, score)
    with pytest.raises(UserError, match="another feature extractor"):
        build([file], tmp_path / "out", expected_cells=None, title="t", oracle_files=written)


def test_without_an_oracle_the_tables_do_not_speak_of_it(tmp_path):
    file = write_cell(tmp_path, make_score(a_cell("a")))
    build([file], tmp_path / "out", expected_cells=None, title="t")
    for name in ("leaderboard.md", "leaderboard.tex", "leaderboard.html"):
        assert "Masks beaten" not in (tmp_path / "out" / name).read_text()
    assert not (tmp_path / "out/oracle.csv").exists()


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json has no checksum"):
        board.read([tmp_path / "x.json"])
    sealed.write(tmp_path / "x.json", examples.score())
    with pytest.raises(UserError, match=r"x\.json is the record of score .*, not of a mask"):
        board.read([tmp_path / "x.json"])


def test_a_mask_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    track = tracks.load("smoke")
    job = tiny.job("oracle", track, tmp_path, model="dit", recovery="none", seed=0, mask=99)
    model = job.family.build(job.settings.config)
    dense = tiny.job("dense", track, tmp_path, model="dit")
    files = surgery.save(dense.record.parent, model, Plan(), "dit", job.settings.config)
    examples.write(dense, files)
    count = len(oracle.masks(model, job.family, 0.25, 4)[0])
    with pytest.raises(UserError, match=f"model 'dit' has only {count} masks"):
        oracle.oracle(job)
