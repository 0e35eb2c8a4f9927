"""The leaderboard's arithmetic on known numbers, and its files as a pure function of the cells."""

import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prunebench.errors import UserError
from prunebench.leaderboard import build, collect, plots, tables

DENSE = {"kind": "none", "title": "Dense", "control": True}
STEPS = {"kind": "steps", "title": "Fewer steps", "control": True}


def make_metrics(cell: dict, *, fid=10.0, ms=8.0, dense_ms=10.0, title="A method", kind="layers",
                 control=False, reconstruction=False, steps=10, macs=6e6, parameters=450_000,
                 recovery_images=0, samples=2048, failed=None, bibtex="",
                 alone=None) -> dict:  # fmt: skip
    """A metrics.json of schema 1; `failed` is (stage, error), `alone` whether it was timed so."""
    latency = {"ms": ms, "iqr_ms": 0.1, "dense_ms": dense_ms, "ratio": ms / dense_ms}
    images = {"student_forward": 0, "student_backward": 0, "teacher_forward": 0, "wall_s": 1.5}
    size = {"parameters": parameters, "nonzero_parameters": parameters, "sparsity_reached": 0.25,
            "dense_parameters": 600_000, "macs": macs, "macs_without_attention_products": macs,
            "dense_macs": 8e6, "dense_macs_without_attention_products": 8e6}  # fmt: skip
    labels = {"family": "dit", "objective": "flow", "kind": kind, "control": control, "notes": "",
              "reconstruction": reconstruction, "title": title, "paper": "", "healing": "",
              "bibtex": bibtex}  # fmt: skip
    common = {
        "schema": 1, "status": "failed" if failed else "ok", "cell": cell, "labels": labels,
        "failure": None,
        "provenance": {
            "commit": "0123456789abcdef", "dirty": False, "code": "c0de", "config": "c0ff",
            "date": f"2026-01-0{1 + cell['seed'] % 9}", "cpu": "AMD EPYC", "cores": 2, "gpu": None,
            "os": "Linux", "python": "3.11", "packages": {"torch": "2.15.0"},
        },
    }  # fmt: skip
    if failed:
        failure = {"stage": failed[0], "error": failed[1], "log": "runs/some/select.log"}
        return common | {"failure": failure}
    quality = {"fid": fid, "fid_cleanfid": fid, "kid": fid / 1e4, "precision": 0.7, "recall": 0.5,
               "sfid": 2 * fid, "agreement": 0.9, "samples": samples,
               "reference_samples": 10_000}  # fmt: skip
    return common | {
        "quality": quality,
        "consistency": {"lpips": 0.1, "ssim": 0.8, "psnr": None if kind == "none" else 20.0},
        "size": size,
        "latency": {"forward_batch1": latency, "forward_batch": latency, "sampling": latency,
                    "batch": 64, "threads": 1, "device": "cpu", "peak_memory_mb": 300.0,
                    "load_average": 1.0, **_conditions(alone)},
        "budget": {"selection": images,
                   "recovery": images | {"student_forward": recovery_images}},
        "sampling": {"steps": steps, "sampler": "ddim", "count": samples, "batch": 128},
    }  # fmt: skip


def _conditions(alone: bool | None) -> dict:
    """What timing says of other load; nothing, like older records, where `alone` is None."""
    during = {"cpu": 0.03 if alone else 1.5}
    return {} if alone is None else {"alone": alone, "waited_s": 2.0, "others": {"during": during}}


def write_cell(folder: Path, metrics: dict, grid: bytes | None = None) -> Path:
    """Write metrics.json, and grid.png beside it, where a cell's outputs lie."""
    file = folder / "/".join(str(part) for part in metrics["cell"].values()) / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(metrics))
    if grid:
        file.with_name("grid.png").write_bytes(grid)
    return file


def a_grid(shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((146, 146), shade, np.uint8)
    pixels[::18] = 255
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def a_cell(method: str, seed: int = 0, recovery: str = "none", sparsity: float = 0.25) -> dict:
    return {"track": "embedded", "model": "sit", "method": method, "sparsity": sparsity,
            "recovery": recovery, "seed": seed}  # fmt: skip


def seeds(method: str, fids: list[float], recovery: str = "none", **changes) -> list[dict]:
    sparsity = 0.0 if changes.get("kind") in ("none", "steps") else 0.25
    return [
        make_metrics(a_cell(method, k, recovery, sparsity), fid=fid, **changes)
        for k, fid in enumerate(fids)
    ]


def small_board(folder: Path) -> tuple[list[Path], list[dict]]:
    """Two controls, two methods, dense with all and fewer steps; one failure, one absent cell."""
    entry = "@article{good2025,\n  title={Good 100\\% pruning}\n}"
    cells = [
        *seeds("dense", [2.0, 2.1, 1.9], ms=10.0, macs=8e6, **DENSE),
        *seeds("steps-5", [4.0, 4.2, 3.8], ms=5.0, steps=5, macs=8e6, **STEPS),
        *seeds("good", [3.0, 3.1, 2.9], title="Good <b>50%_of</b> it", bibtex=entry),
        *seeds("good", [2.5, 2.6, 2.4], "finetune-low", title="Good <b>50%_of</b> it",
               bibtex=entry, recovery_images=12_800),
        *seeds("random", [9.0, 12.0, 30.0], title="Random", control=True),
        *seeds("mask", [5.0, 5.5], title="Mask", kind="weights", macs=8e6, reconstruction=True),
        *seeds("broken", [0, 0, 0], title="Broken", failed=("select", "loss <NaN> at 50%_step")),
    ]  # fmt: skip
    files = [write_cell(folder, metrics, a_grid()) for metrics in cells]
    return files, [metrics["cell"] for metrics in cells] + [a_cell("mask", 2), a_cell("absent", 0)]


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> tuple[Path, list[Path], list[dict]]:
    folder = tmp_path_factory.mktemp("runs")
    files, expected = small_board(folder)
    out = tmp_path_factory.mktemp("board")
    build(files, out, expected_cells=expected, title="Embedded <i>track</i>, 100%_real")
    return out, files, expected


def rows_of(*groups: list[dict], expected=None) -> pd.DataFrame:
    metrics = [cell for group in groups for cell in group]
    sources = [collect.Source(Path("metrics.json"), b"", one) for one in metrics]
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
    metrics = make_metrics(a_cell("a"), recovery_images=12_800)
    metrics["budget"]["selection"] |= {"student_forward": 200}
    assert rows_of([metrics]).loc["a"].student_images_mean == 13_000


def test_rank_counts_the_rows_welch_cannot_tell_apart():
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


def test_one_seed_cannot_be_told_from_any_and_zero_spread_is_exact():
    rows = rows_of(seeds("a", [1.0]), seeds("b", [5.0, 5.0]), seeds("c", [6.0, 6.0]))
    assert rows.ties.to_dict() == {"a": 2, "b": 1, "c": 1}


def test_ranks_stay_inside_model_sparsity_and_recovery():
    other = [make_metrics(a_cell("d", 0, "none", 0.5), fid=9.0)]
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
    rows = rows_of(seeds("dense", [2.0], macs=8e6, **DENSE), seeds("m", [3.0], macs=8e6),
                   seeds("s", [4.0], macs=8e6, steps=5, **STEPS))  # fmt: skip
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


def test_csv_keeps_full_precision(tmp_path):
    fids = [1 / 3, 2 / 7, math.pi]
    files = [write_cell(tmp_path, metrics) for metrics in seeds("a", fids)]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    row = pd.read_csv(tmp_path / "out/leaderboard.csv", float_precision="round_trip").iloc[0]
    assert (row.fid_mean, row.fid_sd) == (statistics.mean(fids), statistics.stdev(fids))
    assert (row.agreement_mean, row.agreement_sd) == (0.9, 0.0)
    assert (row.parameters_mean, row.steps) == (450_000, 10)


def test_rebuilding_gives_the_same_bytes_whatever_the_order(board, tmp_path):
    out, files, expected = board
    stale = tmp_path / "raw/sit/gone/0.25/none/seed0.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    title = "Embedded <i>track</i>, 100%_real"
    build(files[::-1], tmp_path, expected_cells=expected[::-1], title=title)
    first, second = ({f.relative_to(folder): f.read_bytes() for f in folder.rglob("*")
                      if f.is_file()} for folder in (out, tmp_path))  # fmt: skip
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
                 "AMD EPYC, 2 cores, no GPU", "2,048 images", "sit: ddim, 10 steps"):  # fmt: skip
        assert fact in text
    assert "Warning" not in text


def test_rows_timed_beside_other_load_are_marked(tmp_path):
    cells = [*seeds("loud", [1.0, 2.0], title="Loud", alone=False),
             *seeds("quiet", [2.0, 3.0], title="Quiet", alone=True),
             make_metrics(a_cell("mixed", 0), title="Mixed", alone=True),
             make_metrics(a_cell("mixed", 1), title="Mixed", alone=False),
             make_metrics(a_cell("mixed", 2), title="Mixed"),
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
    fast, failed = make_metrics(a_cell("fast")), make_metrics(a_cell("failed"))
    timing = {"ratio": 0.5, "images_per_s": 4000.0}
    fast["latency"]["variants"] = {
        "bf16": {"forward_batch1": timing, "forward_batch": timing, "alone": True},
        "compiled": {"failure": "no compiler"},
    }
    failed["latency"]["variants"] = {"bf16": {"failure": "too large"}}
    files = [write_cell(tmp_path, metrics) for metrics in (fast, failed)]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    rows = pd.read_csv(tmp_path / "out/leaderboard.csv").set_index("method")
    assert rows.loc["fast", "throughput_bf16_mean"] == 4000
    assert rows.loc["fast", "forward_batch1_ratio_bf16_mean"] == 0.5
    assert math.isnan(rows.loc["failed", "throughput_bf16_mean"])
    assert not [name for name in rows.columns if "compiled" in name]


def test_records_from_before_conditions_were_kept_are_read(board):
    assert "- **Timing:** 17 not recorded" in (board[0] / "leaderboard.md").read_text()
    assert "not recorded</td>" in (board[0] / "leaderboard.html").read_text().replace("\n", "")
    assert "others_cpu_mean" not in pd.read_csv(board[0] / "leaderboard.csv").columns


def test_warnings_for_mixed_code_hardware_and_disagreeing_fid(tmp_path):
    cells = seeds("a", [1.0, 2.0])
    cells[1]["provenance"] |= {"code": "other", "cpu": "Intel", "dirty": True}
    cells[0]["quality"]["fid_cleanfid"] = 1.0011
    cells[1]["quality"]["fid_cleanfid"] = 2.0019
    files = [write_cell(tmp_path, metrics) for metrics in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert text.count("**Warning:**") == 3
    assert "2 different versions of the code" in text and "different hardware" in text
    assert "clean-fid disagrees with FID on sit/a/0.25/none/seed0: 1.0011 against 1.0000" in text
    assert "0123456789, 0123456789-dirty" in text


def test_hardware_is_that_of_the_measurement(tmp_path):
    """Scores may be computed anywhere: the machine that timed a cell is what its row is about."""
    cells = seeds("a", [1.0, 2.0])
    timed = {"cpu": "EPYC", "cores": 8, "gpu": "H200"}
    for metrics, scored_on in zip(cells, ("Intel", "AMD"), strict=True):
        metrics["provenance"] |= {"cpu": scored_on}
        metrics["stages"] = {"cost": {"wall_s": 1.0, "date": "", "code": "c", "machine": timed}}
    files = [write_cell(tmp_path, metrics) for metrics in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "EPYC, 8 cores, H200" in text
    assert "different hardware" not in text and "Intel" not in text


def test_an_inception_score_that_is_not_available_is_said_never_shown(tmp_path):
    cells = seeds("a", [1.0, 2.0])
    reason = {"inception_score": "the extractor's weights have no logits layer"}
    for metrics in cells:
        metrics["quality"] |= {"inception_score": None, "unavailable": reason}
    build(
        [write_cell(tmp_path, m) for m in cells], tmp_path / "out", expected_cells=None, title="t"
    )
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "IS: the extractor's weights have no logits layer" in text
    assert "inception_score" not in (tmp_path / "out/leaderboard.csv").read_text()
    cells[0]["quality"] |= {"inception_score": 8.9, "unavailable": {}}
    build(
        [write_cell(tmp_path / "b", m) for m in cells],
        tmp_path / "out",
        expected_cells=None,
        title="t",
    )
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
    params = collect.METRICS["parameters"]
    assert tables.number(params, 675e6) == "675" and tables.number(params, 11.9e9) == "11,900"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.update(schema=2), "its schema is 2"),
        (lambda m: m["quality"].pop("kid"), "quality.kid is missing"),
        (lambda m: m["quality"].update(fid=None), "quality.fid is None"),
        (lambda m: m["quality"].update(recall=math.nan), "quality.recall is nan"),
        (lambda m: m["cell"].update(method="../x"), "cannot name a file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, reason):
    metrics = make_metrics(a_cell("a"))
    change(metrics)
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=reason) as error:
        collect.read_sources([file])
    assert str(file) in str(error.value)


def test_unreadable_duplicate_and_mixed_track_files_are_named(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": 1,')
    with pytest.raises(UserError, match=r"half\.json"):
        collect.read_sources([tmp_path / "half.json"])
    with pytest.raises(UserError, match=r"cannot read .*absent\.json"):
        collect.read_sources([tmp_path / "absent.json"])
    file = write_cell(tmp_path, make_metrics(a_cell("a")))
    with pytest.raises(UserError, match="same cell"):
        collect.read_sources([file, file])
    other = write_cell(tmp_path, make_metrics(a_cell("b") | {"track": "cifar"}))
    with pytest.raises(UserError, match="one track"):
        collect.read_sources([file, other])


def test_methods_sharing_a_bibtex_key_with_different_entries_are_told():
    entries = [seeds(name, [1.0], bibtex=f"@misc{{key, note={{{name}}}}}") for name in "ab"]
    found, problems = tables.bibliography(rows_of(*entries))
    assert list(found) == ["key"] and problems == [
        "Two methods give the BibTeX key key different entries."
    ]


# Divisions: what differs between the rows that are ranked together.


def _ranked(compares: str, *groups: list[dict]) -> dict:
    sources = [collect.Source(Path("m.json"), b"", one) for group in groups for one in group]
    rows = collect.aggregate(collect.cell_frame(sources), compares)
    named = rows[rows["rank"].notna()]
    return dict(zip(zip(named.method, named.recovery, strict=True), named["rank"], strict=True))


def test_methods_are_ranked_across_recoveries_of_one_budget():
    ranked = _ranked("methods", seeds("own", [2.0], "published-low"),
                     seeds("control", [3.0], "finetune-low"), seeds("c", [1.0], "none"),
                     seeds("d", [1.5], "none"))  # fmt: skip
    assert ranked == {
        ("own", "published-low"): 1, ("control", "finetune-low"): 2, ("c", "none"): 1,
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
    uniform = [seeds(name, [fid], kind="widths") for name, fid in (("u", 1.0), ("v", 2.0))]
    for group in uniform:
        group[0]["plan"] = {"pattern": "uniform", "notes": {}}
    plain = [seeds(name, [fid], kind="widths") for name, fid in (("p", 3.0), ("q", 4.0))]
    ranked = _ranked(compares, *uniform, *plain)
    alone = compares == "recoveries"  # every method is a group of its own there
    assert ranked == {} if alone else set(ranked.values()) == {1, 2}
    assert alone or ranked["u", "none"] == ranked["p", "none"] == 1


def test_a_board_says_what_it_ranks_and_how_rows_were_healed(tmp_path):
    own = seeds("own", [2.0, 2.1], "published-low", title="Own")
    for metrics in own:
        metrics["labels"]["healing"] = "normalised_kd"
        metrics["plan"] = {"pattern": "uniform", "notes": {"summary": "joint/sum = 0.9"}}
    cells = own + seeds("control", [3.0, 3.1], "finetune-low", title="Control")
    files = [write_cell(tmp_path, metrics) for metrics in cells]
    build(files, tmp_path / "out", expected_cells=None, title="t", compares="methods")
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "## sit, low" in text and "inside one model, sparsity and budget" in text
    assert "Own (normalised\\_kd)" in text and "25% uniform" in text
    assert "joint/sum = 0.9" in (tmp_path / "out/leaderboard.html").read_text()
    assert "sparsity 25\\% uniform" in (tmp_path / "out/leaderboard.tex").read_text()


def test_training_that_was_cut_into_parts_is_said_on_the_row(tmp_path):
    metrics = make_metrics(a_cell("entpruner", recovery="finetune-low"))
    plain = {"micro_batch": 64, "processes": 1, "resumed": 0}
    metrics["settings"] = {"model": {"recovery": {"batch": 64}}}
    for training, words in (
        ({"select": plain | {"micro_batch": None}, "recover": plain}, ""),
        ({"recover": plain | {"micro_batch": 16}}, "micro-batches of 16 for a batch of 64"),
        ({"recover": plain | {"micro_batch": 32, "processes": 2}}, "trained on 2 GPUs"),
    ):
        metrics["training"] = training
        file = tmp_path / "metrics.json"
        file.write_text(json.dumps(metrics))
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
        metrics = make_metrics(cell, fid=fid, **label)
        expected = {"fid": 4.5, "tolerance": 0.15, "source": "the paper"}
        metrics["settings"] = {"model": {"reference": expected, "recovery": {"batch": 8}}}
        files.append(write_cell(tmp_path / "runs", metrics))
    out = tmp_path / "out"
    build(files, out, expected_cells=[], title="Gate")
    rows = pd.read_csv(out / "leaderboard.csv", keep_default_na=False).set_index("method")
    table = (out / "leaderboard.md").read_text()
    assert [rows["rank"][name] for name in ("a", "b")] == (["", ""] if reason else ["1", "2"])
    assert (reason in rows.unpublished["a"]) if reason else rows.unpublished["a"] == ""
    assert (reason in table and "(unpublished)" in table) == bool(reason)
    assert "Not gated" not in table


@pytest.mark.parametrize(
    ("settings", "gated"),
    [
        ({"weights": {"asset": "sd15"}}, False),
        ({"weights": {"asset": "a"}, "training": {"images": 8}}, True),  # nobody published it
        ({"training": {"images": 8}}, True),
        ({"weights": {"asset": "a"}, "reference": {"fid": 2, "tolerance": 9, "source": "s"}}, True),
    ],
)
def test_a_released_model_without_a_published_fid_is_said_to_be_ungated(tmp_path, settings, gated):
    cells = [
        make_metrics(a_cell("dense") | {"sparsity": 0.0}, fid=4.5, **DENSE),
        make_metrics(a_cell("a")),
    ]
    for metrics in cells:
        metrics["settings"] = {"model": {**settings, "recovery": {"batch": 8}}}
    files = [write_cell(tmp_path / "runs", metrics) for metrics in cells]
    build(files, tmp_path / "out", expected_cells=[], title="Gate")
    for name in ("leaderboard.md", "leaderboard.html", "leaderboard.tex"):
        text = (tmp_path / "out" / name).read_text()
        assert ("sit: ranked without a published FID to reach first" in text) != gated
