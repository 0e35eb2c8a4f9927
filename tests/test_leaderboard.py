"""The leaderboard's arithmetic on known numbers, and its files as a pure function of the cells."""

import io
import json
import math
import statistics
from pathlib import Path

import examples
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prunebench.errors import UserError
from prunebench.leaderboard import build, collect, plots, tables, writers
from prunebench.leaderboard.measures import MEASURES
from prunebench.records import parts, schema, sealed

DENSE = {"kind": "none", "title": "Dense", "control": True}
STEPS = {"kind": "steps", "title": "Fewer steps", "control": True}
MACS = 8_000_000
LABELS = ("kind", "title", "control", "reconstruction", "guessed", "bibtex", "notes",
          "recovered_by")  # fmt: skip


def make_score(cell: dict, *, fid=10.0, ms=8.0, dense_ms=10.0, steps=10, macs=6_000_000,
               recovery_images=0, samples=2048, failed=None, alone=None, qualities=None,
               date=None, **changes) -> schema.Score | schema.Failed:  # fmt: skip
    """The score of a cell; `failed` is (stage, error), `alone` whether it was timed so.

    `changes` are labels and, else, fields of the record.
    """
    label = examples.labels(**{k: changes.pop(k) for k in LABELS if k in changes})
    made = examples.provenance(date=date or f"2026-01-0{1 + cell['seed'] % 9}")
    common = {"labels": label, "provenance": made} | changes
    if failed:
        failure = parts.Failure(stage=failed[0], error=failed[1], log="runs/some/select.log")
        identity = parts.CellIdentity(stage="score", **cell)
        return examples.failed(identity, failure=failure, **common)
    quality = examples.quality(fid, **({"psnr": "infinite"} if label.kind == "none" else {}),
                               **(qualities or {}))  # fmt: skip
    spent = parts.Spent(selection=examples.budget(),
                        recovery=examples.budget(student_forward=recovery_images))  # fmt: skip
    known = {"quality": quality, "samples": samples, "size": examples.costs(macs),
             "latency": examples.latency(ms, dense_ms, alone), "budget": spent, "stages": {},
             "trainings": {}, "sampling": examples.sampling(steps, samples)}  # fmt: skip
    return examples.score(cell, **{**known, **common})


def write_cell(folder: Path, score: schema.Sealed, grid: bytes | None = None) -> Path:
    """Write score.json, and grid.png beside it, where a cell's outputs lie."""
    names = [str(part) for part in score.identity.model_dump().values()]
    file = folder / "/".join(names) / "score.json"
    file.parent.mkdir(parents=True)
    if grid:
        file.with_name("grid.png").write_bytes(grid)
    sealed.write(file, score, [file.with_name("grid.png")] if grid else [])
    return file


def a_grid(shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((146, 146), shade, np.uint8)
    pixels[::18] = 255
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def a_cell(method: str, seed: int = 0, recovery: str = "none", sparsity: float = 0.25) -> dict:
    return examples.CELL | {"method": method, "sparsity": sparsity, "recovery": recovery,
                            "seed": seed}  # fmt: skip


def seeds(method: str, fids: list[float], recovery: str = "none", **changes) -> list[schema.Sealed]:
    sparsity = 0.0 if changes.get("kind") in ("none", "steps") else 0.25
    return [
        make_score(a_cell(method, k, recovery, sparsity), fid=fid, **changes)
        for k, fid in enumerate(fids)
    ]


def small_board(folder: Path) -> tuple[list[Path], list[dict]]:
    """Two controls, two methods, dense with all and fewer steps; one failure, one absent cell."""
    entry = "@article{good2025,\n  title={Good 100\\% pruning}\n}"
    cells = [
        *seeds("dense", [2.0, 2.1, 1.9], ms=10.0, macs=MACS, **DENSE),
        *seeds("steps-5", [4.0, 4.2, 3.8], ms=5.0, steps=5, macs=MACS, **STEPS),
        *seeds("good", [3.0, 3.1, 2.9], title="Good <b>50%_of</b> it", bibtex=entry),
        *seeds("good", [2.5, 2.6, 2.4], "finetune-low", title="Good <b>50%_of</b> it",
               bibtex=entry, recovery_images=12_800),
        *seeds("random", [9.0, 12.0, 30.0], title="Random", control=True),
        *seeds("mask", [5.0, 5.5], title="Mask", kind="weights", macs=MACS, reconstruction=True),
        *seeds("broken", [0, 0, 0], title="Broken", failed=("select", "loss <NaN> at 50%_step")),
    ]  # fmt: skip
    files = [write_cell(folder, score, a_grid()) for score in cells]
    planned = [score.identity.model_dump(exclude={"stage"}) for score in cells]
    return files, [*planned, a_cell("mask", 2), a_cell("absent", 0)]


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> tuple[Path, list[Path], list[dict]]:
    folder = tmp_path_factory.mktemp("runs")
    files, expected = small_board(folder)
    out = tmp_path_factory.mktemp("board")
    build(files, out, expected_cells=expected, title="Embedded <i>track</i>, 100%_real")
    return out, files, expected


def rows_of(*groups: list, expected=None) -> pd.DataFrame:
    scores = [score for group in groups for score in group]
    sources = [collect.Source(Path("score.json"), b"", one) for one in scores]
    return collect.aggregate(collect.cell_frame(sources, expected)).set_index("method")


def text_of(row: pd.Series, name: str) -> str:
    return next(column for column in tables.COLUMNS if column.name == name).text(row)


def test_mean_and_sample_standard_deviation():
    row = rows_of(seeds("a", [10.0, 13.0, 19.0])).loc["a"]
    assert row.fid_mean == 14.0
    assert row.fid_sd == pytest.approx(math.sqrt((16 + 1 + 25) / 2), rel=1e-15)
    assert row.speedup_mean == pytest.approx(1.25)
    assert text_of(row, "fid") == "14.00 ± 4.58"


def test_budget_sums_selection_and_recovery():
    spent = parts.Spent(selection=examples.budget(student_forward=200),
                        recovery=examples.budget(student_forward=12_800))  # fmt: skip
    score = make_score(a_cell("a"), budget=spent)
    assert rows_of([score]).loc["a"].student_images_mean == 13_000


def test_rank_counts_the_rows_that_are_not_significantly_different():
    # a against b: t = -1/sqrt(2/3) on 4 degrees of freedom, p = 0.29; c lies 20 away from both
    rows = rows_of(
        seeds("a", [1.0, 2.0, 3.0]), seeds("b", [2.0, 3.0, 4.0]), seeds("c", [22.0, 23.0, 24.0])
    )
    assert rows["rank"].tolist() == [1, 2, 3]
    assert rows.ties.tolist() == [1, 1, 0]
    assert [text_of(row, "rank") for _, row in rows.iterrows()] == ["1 (=1)", "2 (=1)", "3"]


@pytest.mark.parametrize(
    "fids, other, told",
    [
        # the critical t on 4 degrees of freedom is 2.776: a gap of 2.27 at these spreads
        ([1.0, 2.0, 3.0], [3.2, 4.2, 5.2], False),
        ([1.0, 2.0, 3.0], [3.3, 4.3, 5.3], True),
        # t = 3.45: Student's 4 degrees of freedom give p = 0.03, Welch's 2.04 give 0.07
        ([-0.1, 0.0, 0.1], [1.0, 2.0, 3.0], False),
    ],
)
def test_welch_on_either_side_of_the_critical_value(fids, other, told):
    rows = rows_of(seeds("a", fids), seeds("b", other))
    assert collect.indistinguishable(rows.loc["a"], rows.loc["b"]) is not told


def test_one_seed_differs_from_none_and_zero_spread_is_exact():
    rows = rows_of(seeds("a", [1.0]), seeds("b", [5.0, 5.0]), seeds("c", [6.0, 6.0]))
    assert rows.ties.to_dict() == {"a": 2, "b": 1, "c": 1}


def test_ranks_stay_inside_model_sparsity_and_recovery():
    other = [make_score(a_cell("d", 0, "none", 0.5), fid=9.0)]
    rows = rows_of(seeds("a", [1.0]), seeds("b", [5.0]), seeds("c", [7.0], "finetune-low"), other)
    assert rows["rank"].dropna().to_dict() == {"a": 1, "b": 2}  # c and d are alone in theirs


def test_controls_are_ranked_and_references_are_not():
    rows = rows_of(seeds("dense", [1.0], **DENSE), seeds("r", [3.0], control=True),
                   seeds("a", [2.0]))  # fmt: skip
    assert rows.index.tolist() == ["dense", "a", "r"]
    assert rows["rank"].isna().tolist() == [True, False, False]
    assert text_of(rows.loc["dense"], "rank") == "ref"
    assert text_of(rows.loc["dense"], "title") == "Dense"
    assert text_of(rows.loc["r"], "title") == "A method (control)"


@pytest.mark.parametrize(
    "ms, fid, steps, reached",
    [(10.0, 2.0, 10, True), (9.7, 3.0, 8, True), (5.0, 4.0, 5, True), (4.8, 4.0, 5, False)],
)
def test_dense_at_equal_latency_has_the_most_steps_that_fit(ms, fid, steps, reached):
    rows = rows_of(
        seeds("dense", [2.0, 2.0], ms=10.0, **DENSE),
        seeds("s8", [3.0, 3.0], ms=8.0, steps=8, **STEPS),
        seeds("s5", [4.0, 4.0], ms=5.0, steps=5, **STEPS),
        seeds("a", [2.5, 2.5], ms=ms),
    )
    row = rows.loc["a"]
    found = (row.equal_latency_fid, row.equal_latency_steps, row.equal_latency_reached)
    assert found == (fid, steps, reached)
    assert row.equal_latency_verdict == ("worse" if fid == 2.0 else "better")
    assert ("*" in text_of(row, "equal_latency")) is not reached


def test_pareto_frontier_of_three_points():
    cost, fid = np.array([3.0, 1.0, 2.0]), np.array([5.0, 7.0, 8.0])
    assert plots.pareto_frontier(cost, fid).tolist() == [1, 0]  # (2, 8) is beaten by (1, 7)


def test_masks_stand_at_the_dense_macs_and_fewer_steps_cost_less():
    rows = rows_of(seeds("dense", [2.0], macs=MACS, **DENSE), seeds("m", [3.0], macs=MACS),
                   seeds("s", [4.0], macs=MACS, steps=5, **STEPS))  # fmt: skip
    cost = plots.cost_of(rows, plots.COSTS[0])
    assert cost.to_dict() == pytest.approx({"dense": 8e7, "m": 8e7, "s": 4e7})


def test_failed_and_missing_rows_are_last_show_dashes_and_are_listed(board):
    out, *_ = board
    rows = pd.read_csv(out / "leaderboard.csv")
    group = rows[(rows.recovery == "none") & ~rows.kind.isin(["none", "steps"])]
    assert group.method.tolist() == ["good", "mask", "random", "broken", "absent"]
    assert group["rank"].isna().tolist() == [False, False, False, True, True]
    assert rows[rows.method == "broken"].fid_mean.isna().all()
    text = (out / "leaderboard.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| — | Broken"))
    assert "nan" not in line.lower() and "Broken (failed) | layers | 25% | — | — |" in line
    assert "`sit/broken/0.25/none/seed2` failed in select: loss &lt;NaN> at 50%\\_step" in text
    assert "- `sit/mask/0.25/none/seed2`" in text and "- `sit/absent/0.25/none/seed0`" in text
    assert "17 of 22 cells finished, 3 failed, 2 not finished" in text
    assert "2 cells wait for jobs" in text
    assert "`prunebench progress --track embedded --division all` says which" in text


def test_incomplete_smoke_and_reconstruction_are_marked():
    cells = seeds("a", [1.0, 2.0], reconstruction=True, samples=512)
    row = rows_of(cells, expected=[a_cell("a", 2)]).loc["a"]
    assert text_of(row, "title") == "A method† (smoke, 2/3 seeds)"
    assert text_of(row, "seeds") == "2/3"


def test_a_row_whose_criterion_is_a_guess_stands_apart_without_a_rank(tmp_path):
    entry = "@article{good2025,\n  title={Good}\n}"
    cells = [
        *seeds("guess", [1.0, 1.1], title="Guess", guessed="the slope's sign", notes="Slow."),
        *seeds("good", [3.0, 3.1], title="Good", bibtex=entry),
        *seeds("bad", [4.0, 4.1], title="Bad"),
    ]
    rows = rows_of(cells)
    assert list(rows.index) == ["good", "bad", "guess"]  # behind the ranked, though it is better
    assert rows["rank"].tolist()[:2] == [1, 2] and text_of(rows.loc["guess"], "rank") == "—"
    assert rows.loc["guess"].notes == "criterion assumed: the slope's sign. Slow."
    assert text_of(rows.loc["guess"], "title") == "Guess (criterion assumed)"
    files = [write_cell(tmp_path, score) for score in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    texts = {kind: (tmp_path / f"out/leaderboard.{kind}").read_text() for kind in ("md", "tex")}
    assert "Guess assumes: the slope's sign." in texts["md"]
    assert r"\emph{sparsity 25\%, criterion assumed}" in texts["tex"]
    assert tables.assumptions(rows_of(seeds("good", [3.0]))) == []


def test_csv_keeps_full_precision(tmp_path):
    fids = [1 / 3, 2 / 7, math.pi]
    files = [write_cell(tmp_path, score) for score in seeds("a", fids)]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    row = pd.read_csv(tmp_path / "out/leaderboard.csv", float_precision="round_trip").iloc[0]
    assert (row.fid_mean, row.fid_sd) == (statistics.mean(fids), statistics.stdev(fids))
    assert (row.agreement_mean, row.agreement_sd) == (0.9, 0.0)
    assert (row.parameters_mean, row.steps) == (450_000, 10)


def test_rebuilding_gives_the_same_bytes_whatever_the_order(board, tmp_path):
    out, files, expected = board
    title = "Embedded <i>track</i>, 100%_real"
    gone = write_cell(tmp_path / "runs", make_score(a_cell("gone")))
    build([gone], tmp_path / "out", expected_cells=None, title=title)
    assert (tmp_path / "out/raw/sit/gone/0.25/none/seed0.json").exists()
    build(files[::-1], tmp_path / "out", expected_cells=expected[::-1], title=title)
    first, second = ({f.relative_to(folder): f.read_bytes() for f in folder.rglob("*")
                      if f.is_file()} for folder in (out, tmp_path / "out"))  # fmt: skip
    assert first == second
    names = {str(name) for name in first}
    assert {"leaderboard.html", "leaderboard.bib", "samples_sit.png", "pareto_sit_macs.svg",
            "pareto_sit_latency.png", "raw/sit/good/0.25/finetune-low/seed2.json",
            } <= names  # fmt: skip


def test_text_from_methods_is_escaped(board):
    out, *_ = board
    page, tex = (out / "leaderboard.html").read_text(), (out / "leaderboard.tex").read_text()
    assert "<b>" not in page and "&lt;b&gt;50%_of&lt;/b&gt;" in page
    assert "<i>track" not in page and "loss &lt;NaN&gt;" in page
    assert (
        r"Good \textless{}b\textgreater{}50\%\_of\textless{}/b\textgreater{} it~\cite{good2025}"
        in tex
    )
    assert "&lt;b>50%\\_of&lt;/b>" in (out / "leaderboard.md").read_text()


def test_caption_names_code_date_hardware_and_sampling(board):
    text = (board[0] / "leaderboard.md").read_text()
    for fact in ("- **Date:** 2026-01-03", "- **Commit:** 0123456789", "torch 2.15.0",
                 "AMD EPYC, 2 cores, no GPU", "2,048 images", "sit: ddim, 10 steps",
                 "**Features:** domain classifier e3b0c442"):  # fmt: skip
        assert fact in text
    assert "Warning" not in text


def test_rows_timed_beside_other_load_are_marked(tmp_path):
    cells = [*seeds("loud", [1.0, 2.0], title="Loud", alone=False),
             *seeds("quiet", [2.0, 3.0], title="Quiet", alone=True),
             make_score(a_cell("mixed", 0), title="Mixed", alone=True),
             make_score(a_cell("mixed", 1), title="Mixed", alone=False),
             make_score(a_cell("mixed", 2), title="Mixed"),
             *seeds("old", [4.0], title="Old")]  # fmt: skip
    rows = rows_of(cells)
    told = {name: text_of(rows.loc[name], "alone") for name in rows.index}
    assert told == {"loud": "no", "quiet": "yes", "mixed": "1/3 yes", "old": "not recorded"}
    marks = {name: tables.marks(rows.loc[name]) for name in rows.index}
    assert marks == {"loud": ["not alone"], "quiet": [], "mixed": ["1/3 not alone"], "old": []}
    assert (rows.loc["loud"].others_cpu_mean, rows.loc["loud"].waited_s_mean) == (1.5, 2.0)

    build([write_cell(tmp_path, c) for c in cells], tmp_path, expected_cells=None, title="t")
    text, tex, page = ((tmp_path / f"leaderboard.{k}").read_text() for k in ("md", "tex", "html"))
    timing = "3 alone, 3 beside other load, 2 not recorded"
    assert timing in text and timing in tex and timing in page
    assert "Loud (not alone)" in text and "Loud (not alone)" in tex and ">not alone<" in page
    assert all("not alone: timed while other processes" in kind for kind in (text, tex, page))
    table = pd.read_csv(tmp_path / "leaderboard.csv").set_index("method")
    assert table.loc["mixed", ["timed_alone", "timed_beside", "seeds_ok"]].tolist() == [1, 1, 3]
    assert table.loc["quiet", "others_cpu_mean"] == 0.03


def test_variants_of_timing_have_columns_where_a_row_has_them(tmp_path):
    timing = examples.timing(5.0, 10.0).model_copy(update={"images_per_s": 4000.0})
    told = parts.Variant(forward_batch1=timing, forward_batch=timing, alone=True)
    ran = {"bf16": told, "compiled": parts.Variant(failure="no compiler")}
    broke = {"bf16": parts.Variant(failure="too large")}
    fast, failed = (
        make_score(a_cell(name), latency=examples.latency().model_copy(update={"variants": found}))
        for name, found in (("fast", ran), ("failed", broke))
    )
    files = [write_cell(tmp_path, score) for score in (fast, failed)]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    rows = pd.read_csv(tmp_path / "out/leaderboard.csv").set_index("method")
    assert rows.loc["fast", "throughput_bf16_mean"] == 4000
    assert rows.loc["fast", "forward_batch1_ratio_bf16_mean"] == 0.5
    assert math.isnan(rows.loc["failed", "throughput_bf16_mean"])
    assert not [name for name in rows.columns if "compiled" in name]


def test_how_a_row_was_timed_may_not_be_known(board):
    assert "- **Timing:** 17 not recorded" in (board[0] / "leaderboard.md").read_text()
    assert "not recorded</td>" in (board[0] / "leaderboard.html").read_text().replace("\n", "")
    assert "others_cpu_mean" not in pd.read_csv(board[0] / "leaderboard.csv").columns


def test_warnings_for_mixed_code_hardware_and_disagreeing_fid(tmp_path):
    packages = examples.PACKAGES | {"torch": "2.9.0"}
    other = examples.provenance(code="other", cpu="Intel", dirty=True, packages=packages)
    settings = {"latency": {"rounds": 7}}
    cells = [
        make_score(a_cell("a", 0), fid=1.0, qualities={"fid_cleanfid": 1.0011}),
        make_score(a_cell("a", 1), fid=2.0, qualities={"fid_cleanfid": 2.0019}, provenance=other),
        make_score(a_cell("a", 2), fid=2.0, settings=settings),
        make_score(a_cell("a", 3), fid=2.0, settings={"latency": {"rounds": 9}}),
    ]
    files = [write_cell(tmp_path, score) for score in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert text.count("**Warning:**") == 5
    assert "2 different versions of the code" in text and "different hardware" in text
    assert "different versions: torch 2.15.0, torch 2.9.0" in text
    assert "Cells of sit were made with different settings: latency" in text
    assert "clean-fid disagrees with FID on sit/a/0.25/none/seed0: 1.0011 against 1.0000" in text
    assert "0123456789, 0123456789-dirty" in text


def test_hardware_is_that_of_the_measurement(tmp_path):
    """Scores may be computed anywhere: the machine that timed a cell is what its row is about."""
    timed = examples.machine(cpu="EPYC", cores=8, gpu="H200")
    stages = {"cost": parts.Stage(wall_s=1.0, date="", code="c0de", machine=timed)}
    cells = [
        make_score(a_cell("a", k), stages=stages, provenance=examples.provenance(cpu=scored_on))
        for k, scored_on in enumerate(("Intel", "AMD"))
    ]
    files = [write_cell(tmp_path, score) for score in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "EPYC, 8 cores, H200" in text
    assert "different hardware" not in text and "Intel" not in text


def test_an_inception_score_that_is_not_available_is_said_never_shown(tmp_path):
    reason = {"inception_score": "the extractor's weights have no logits layer"}
    files = [write_cell(tmp_path, score) for score in seeds("a", [1.0, 2.0], qualities=reason)]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "IS: the extractor's weights have no logits layer" in text
    assert "inception_score" not in (tmp_path / "out/leaderboard.csv").read_text()
    known = make_score(a_cell("b"), qualities={"inception_score": 8.9})
    files.append(write_cell(tmp_path, known))
    build(files, tmp_path / "out", expected_cells=None, title="t")
    assert "8.9" in (tmp_path / "out/leaderboard.csv").read_text()


def test_a_board_of_failures_alone_is_still_a_board(tmp_path):
    file = write_cell(tmp_path, seeds("a", [0], failed=("recover", "loss is NaN"))[0])
    build([file], tmp_path / "out", expected_cells=None, title="t")
    assert "0 of 1 cells finished, 1 failed" in (tmp_path / "out/leaderboard.html").read_text()


def test_infinite_psnr_and_units():
    rows = rows_of(seeds("dense", [1.0], **DENSE))
    assert text_of(rows.loc["dense"], "psnr") == "∞"
    assert text_of(rows.loc["dense"], "parameters") == "0.450"
    assert text_of(rows.loc["dense"], "macs") == "6.00"
    params = MEASURES["parameters"]
    assert tables.number(params, 675e6) == "675" and tables.number(params, 11.9e9) == "11,900"


def without(name: str) -> dict:
    return {key: value for key, value in examples.quality().items() if key != name}


NO_FID = {**examples.quality(), "fid": parts.Quality(reason="no images")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quality": without("kid")}, "quality.kid is missing"),
        ({"quality": NO_FID}, "quality.fid has no value .no images"),
        ({"quality": examples.quality(recal=0.5)}, "quality.recal is of no metric; did you mean "
         "'recall'"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, changes, reason):
    file = write_cell(tmp_path, make_score(a_cell("a"), **changes))
    with pytest.raises(UserError, match=reason) as error:
        collect.read_sources([file])
    assert str(file) in str(error.value)


def test_unreadable_duplicate_and_mixed_track_files_are_named(tmp_path):
    (tmp_path / "half.json").write_text('{"version": 2,')
    with pytest.raises(UserError, match=r"half\.json"):
        collect.read_sources([tmp_path / "half.json"])
    with pytest.raises(UserError, match=r"cannot read .*absent\.json"):
        collect.read_sources([tmp_path / "absent.json"])
    file = write_cell(tmp_path, make_score(a_cell("a")))
    with pytest.raises(UserError, match="same cell"):
        collect.read_sources([file, file])
    other = write_cell(tmp_path, make_score(a_cell("b") | {"track": "cifar"}))
    with pytest.raises(UserError, match="their track differs"):
        collect.read_sources([file, other])
    sample = tmp_path / "sample.json"
    sealed.write(sample, examples.every()["sample"])
    with pytest.raises(UserError, match=r"sample\.json is the record of sample"):
        collect.read_sources([sample])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"extractor": examples.extractor("1" * 64)}, "feature extractor"),
        ({"samples": 1024}, "count of images"),
        ({"reference_samples": 1000}, "count of reference images"),
        ({"inputs": {"dense/model.safetensors": "1"}}, "dense model"),
        ({"settings": {"model": {"recovery": {"batch": 8}}}}, "recovery settings"),
    ],
)
def test_rows_that_can_not_be_compared_are_refused(tmp_path, changes, what):
    cells = [make_score(a_cell("a")), make_score(a_cell("b"), **changes)]
    files = [write_cell(tmp_path, score) for score in cells]
    with pytest.raises(UserError, match=rf"/a/.* and .*/b/.*: their {what} differs"):
        collect.read_sources(files)


def test_a_copied_cell_and_a_changed_picture_are_refused(tmp_path):
    file = write_cell(tmp_path, make_score(a_cell("a")), a_grid())
    with pytest.raises(UserError, match=r"score of embedded/sit/0/a/.*, which is none of the"):
        build([file], tmp_path / "out", expected_cells=[a_cell("b")], title="t")
    file.with_name("grid.png").write_bytes(a_grid(91))
    with pytest.raises(UserError, match=r"grid\.png is not the one of .*score\.json"):
        build([file], tmp_path / "out", expected_cells=[a_cell("a")], title="t")
    assert not (tmp_path / "out").exists()


def test_records_that_nothing_seals_are_read_only_where_that_is_asked_for():
    folder = Path(__file__).parents[1] / "results/embedded/raw/dit/dense"
    file = next(folder.rglob("seed0.json"))
    assert len(collect.read_sources([file], older=True)) == 1
    if "schema" in json.loads(file.read_text()):
        with pytest.raises(UserError, match="not a record of version 2"):
            collect.read_sources([file])


def test_other_dense_trainings_are_rows_of_their_own(tmp_path):
    """Each is compared with its own dense model, and the board says so."""
    cells = [
        make_score(a_cell(method, k) | {"dense_seed": dense}, fid=fid + dense,
                   inputs={"dense/model.safetensors": f"{dense}"}, **label)
        for dense in (0, 1) for k in (0, 1)
        for method, fid, label in (("dense", 1.0, DENSE), ("a", 2.0, {}), ("b", 3.0, {}))
    ]  # fmt: skip
    files = [write_cell(tmp_path / "runs", score, a_grid()) for score in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    rows = pd.read_csv(tmp_path / "out/leaderboard.csv")
    found = rows[rows.method != "dense"].set_index(["dense_seed", "method"])
    assert found["rank"].to_dict() == {(0, "a"): 1, (0, "b"): 2, (1, "a"): 1, (1, "b"): 2}
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "## sit-dense1, no recovery" in text and "sit: 2 trainings" in text
    assert (tmp_path / "out/pareto_sit-dense1_macs.svg").exists()
    assert (tmp_path / "out/raw/sit/dense1/a/0.25/none/seed1.json").exists()


# What a build leaves alone


def test_a_build_removes_only_what_an_earlier_one_wrote(tmp_path):
    own = {
        name: tmp_path / "out" / name
        for name in ("raw/mine.json", "oracle.py", "samples_me.png", "raw/sit/a/notes")
    }
    for file in own.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    first, second = (write_cell(tmp_path / "runs", make_score(a_cell(n)), a_grid()) for n in "ab")
    build([first], tmp_path / "out", expected_cells=None, title="t")
    build([second], tmp_path / "out", expected_cells=None, title="t")
    assert all(file.read_text() == "mine" for file in own.values())
    assert not list((tmp_path / "out").rglob("raw/sit/a/0.25"))
    assert (tmp_path / "out/raw/sit/b/0.25/none/seed0.json").exists()


def test_a_build_that_fails_leaves_the_old_board(tmp_path, monkeypatch):
    file = write_cell(tmp_path / "runs", make_score(a_cell("a")), a_grid())
    build([file], tmp_path / "out", expected_cells=None, title="t")
    before = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        build([file], tmp_path / "out", expected_cells=None, title="other")
    assert before == {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}


@pytest.mark.parametrize("text", ["{}", "[", '{"files": ["../../a", "/etc/x", "", 1]}', "null"])
def test_a_manifest_that_is_not_sound_removes_nothing(tmp_path, text):
    (tmp_path / "a").write_text("mine")
    out = tmp_path / "x/y"
    out.mkdir(parents=True)
    (out / "manifest.json").write_text(text)
    file = write_cell(tmp_path / "runs", make_score(a_cell("a")))
    build([file], out, expected_cells=None, title="t")
    assert (tmp_path / "a").read_text() == "mine"


# Texts of strangers


def test_no_text_is_a_formula_a_command_or_unseen(tmp_path):
    """A method's title, notes and BibTeX, and a failure's text, in every format."""
    entry = "@misc{a\\input{secret}, title={x}}"
    cells = [
        make_score(
            a_cell("a"), title="=HYPERLINK(1)", notes="+1\x00\x1b[31m\u202egnp", bibtex=entry
        ),
        make_score(a_cell("b"), title="@b" + "x" * 100_000),
        make_score(a_cell("c"), failed=("select", "no /home/me/secret/data.npz here\x1b[2J")),
    ]
    files = [write_cell(tmp_path / "runs", score) for score in cells]
    out = tmp_path / "out"
    build(files, out, expected_cells=None, title="t")
    for file in out.rglob("*.*"):
        if file.suffix in (".csv", ".md", ".tex", ".bib", ".html", ".json"):
            text = file.read_text()
            assert not set("\x00\x1b\u202e") & set(text), file
            assert "/home/me" not in text and "x" * 5000 not in text, file
    table = (out / "leaderboard.csv").read_text()
    assert "'=HYPERLINK" in table and "'@bx" in table and ",'+1" in table
    assert "…/data.npz" in (out / "leaderboard.md").read_text()
    assert "input" not in (out / "leaderboard.bib").read_text()
    tex = (out / "leaderboard.tex").read_text()
    assert "\\cite" not in tex and "its key is none" in tex


def test_methods_sharing_a_bibtex_key_with_different_entries_are_told():
    entries = [seeds(name, [1.0], bibtex=f"@misc{{key, note={{{name}}}}}") for name in "ab"]
    found, problems = writers.bibliography(rows_of(*entries).bibtex.tolist())
    assert list(found) == ["key"] and problems == [
        "Two methods give the BibTeX key key different entries."
    ]


# Divisions: what differs between the rows that are ranked together.


def _ranked(compares: str, *groups: list) -> dict:
    sources = [collect.Source(Path("score.json"), b"", one) for group in groups for one in group]
    rows = collect.aggregate(collect.cell_frame(sources), compares)
    named = rows[rows["rank"].notna()]
    return dict(zip(zip(named.method, named.recovery, strict=True), named["rank"], strict=True))


def test_methods_are_ranked_across_recoveries_of_one_budget():
    ranked = _ranked("methods", seeds("own", [2.0], "recipe-low"),
                     seeds("control", [3.0], "finetune-low"), seeds("c", [1.0], "none"),
                     seeds("d", [1.5], "none"))  # fmt: skip
    assert ranked == {
        ("own", "recipe-low"): 1, ("control", "finetune-low"): 2, ("c", "none"): 1,
        ("d", "none"): 2,
    }  # fmt: skip


def test_recoveries_are_ranked_inside_one_selection():
    ranked = _ranked("recoveries", seeds("a", [2.0], "finetune-low"),
                     seeds("a", [1.0], "output_kd-low"), seeds("b", [3.0], "finetune-low"),
                     seeds("b", [4.0], "output_kd-low"))  # fmt: skip
    assert ranked == {
        ("a", "output_kd-low"): 1, ("a", "finetune-low"): 2, ("b", "finetune-low"): 1,
        ("b", "output_kd-low"): 2,
    }  # fmt: skip


@pytest.mark.parametrize("compares", collect.COMPARISONS)
def test_plans_that_fix_their_own_share_are_ranked_apart(compares):
    plan = examples.PLAN.model_copy(update={"pattern": "uniform"})
    uniform = [
        seeds(name, [fid], kind="widths", plan=plan) for name, fid in (("u", 1.0), ("v", 2.0))
    ]
    plain = [seeds(name, [fid], kind="widths") for name, fid in (("p", 3.0), ("q", 4.0))]
    ranked = _ranked(compares, *uniform, *plain)
    alone = compares == "recoveries"  # every method is a group of its own there
    assert ranked == {} if alone else set(ranked.values()) == {1, 2}
    assert alone or ranked["u", "none"] == ranked["p", "none"] == 1


def test_a_board_says_what_it_ranks_and_how_rows_were_recovered(tmp_path):
    notes = {"summary": "joint/sum = 0.9"}
    plan = examples.PLAN.model_copy(update={"pattern": "uniform", "notes": notes})
    own = seeds("own", [2.0, 2.1], "recipe-low", title="Own", plan=plan,
                recovered_by="normalised_kd")  # fmt: skip
    cells = own + seeds("control", [3.0, 3.1], "finetune-low", title="Control")
    files = [write_cell(tmp_path, score) for score in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t", compares="methods")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "## sit, low" in text and "inside one model, sparsity and budget" in text
    assert "Own (normalised\\_kd)" in text and "25% uniform" in text
    assert "joint/sum = 0.9" in (tmp_path / "out/leaderboard.html").read_text()
    assert "sparsity 25\\% uniform" in (tmp_path / "out/leaderboard.tex").read_text()


def test_training_that_was_cut_into_parts_is_said_on_the_row(tmp_path):
    plain = examples.TRAINING
    for number, (trainings, words) in enumerate((
        ({"select": plain.model_copy(update={"micro_batch": None}), "recover": plain}, ""),
        ({"recover": plain.model_copy(update={"micro_batch": 16})},
         "micro-batches of 16 for a batch of 64"),
        ({"recover": plain.model_copy(update={"micro_batch": 32, "processes": 2})},
         "trained on 2 GPUs"),
    )):  # fmt: skip
        score = make_score(a_cell("entpruner", recovery="finetune-low"), trainings=trainings)
        file = write_cell(tmp_path / f"{number}", score)
        (details,) = collect.cell_frame(collect.read_sources([file]))["details"]
        assert details == words


@pytest.mark.parametrize(
    ("dense_fid", "reason"),
    [
        (4.6, ""),
        (4.66, "the dense model's FID is 4.66, not 4.5 ± 0.15 (the paper)"),
        (4.34, "the dense model's FID is 4.34, not 4.5 ± 0.15 (the paper)"),
        (None, "the dense model's FID is not known, not 4.5 ± 0.15 (the paper)"),
    ],
)
def test_nothing_is_ranked_until_the_dense_model_is_as_published(tmp_path, dense_fid, reason):
    files = []
    for method, fid, label in (("dense", dense_fid, DENSE), ("a", 7.0, {}), ("b", 8.0, {})):
        if fid is None:
            continue
        cell = a_cell(method) | ({"sparsity": 0.0} if label else {})
        expected = parts.Expected(fid=4.5, tolerance=0.15, source="the paper")
        score = make_score(cell, fid=fid, expected=expected, released=True, **label)
        files.append(write_cell(tmp_path / "runs", score))
    out = tmp_path / "out"
    build(files, out, expected_cells=None, title="Gate")
    rows = pd.read_csv(out / "leaderboard.csv", keep_default_na=False).set_index("method")
    table = (out / "leaderboard.md").read_text()
    assert [rows["rank"][name] for name in ("a", "b")] == (["", ""] if reason else ["1", "2"])
    assert (reason in rows.unpublished["a"]) if reason else rows.unpublished["a"] == ""
    assert (reason in table and "(unpublished)" in table) == bool(reason)
    assert "Not gated" not in table


@pytest.mark.parametrize(("released", "published"), [(True, False), (True, True), (False, False)])
def test_a_released_model_without_a_published_fid_is_said_to_be_ungated(
    tmp_path, released, published
):
    expected = parts.Expected(fid=2.0, tolerance=9.0, source="s") if published else None
    gate = {"released": released, "expected": expected}
    cells = [
        make_score(a_cell("dense") | {"sparsity": 0.0}, fid=4.5, **DENSE, **gate),
        make_score(a_cell("a"), **gate),
    ]
    files = [write_cell(tmp_path / "runs", score) for score in cells]
    build(files, tmp_path / "out", expected_cells=None, title="Gate")
    told = released and not published
    for name in ("leaderboard.md", "leaderboard.html", "leaderboard.tex"):
        text = (tmp_path / "out" / name).read_text()
        assert ("sit: ranked without a published FID to reach first" in text) == told
