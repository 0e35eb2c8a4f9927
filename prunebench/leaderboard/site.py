"""Everything a leaderboard publishes, above all one HTML page that works from a disk, offline."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import pandas as pd

from prunebench.leaderboard import oracle, plots, tables
from prunebench.leaderboard.collect import (
    Source,
    aggregate,
    caption,
    cell_frame,
    cell_name,
    read_sources,
    recovery_order,
    warnings,
)
from prunebench.records.artefacts import write_atomically

OWNED = ("pareto_*.svg", "pareto_*.png", "samples_*.png", "raw/**/*.json", "oracle.*")
MIME = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Board:
    """What every output is made of."""

    title: str
    sources: list[Source]
    cells: pd.DataFrame
    grids: dict[tuple, bytes]
    compares: str = "selections"

    @cached_property
    def rows(self) -> pd.DataFrame:
        return aggregate(self.cells, self.compares)

    @cached_property
    def caption(self) -> dict[str, str]:
        return caption(self.sources, self.cells)

    @cached_property
    def entries(self) -> dict[str, str]:
        return tables.bibliography(self.rows)[0]

    @cached_property
    def warnings(self) -> list[str]:
        return warnings(self.sources, self.cells, self.rows) + tables.bibliography(self.rows)[1]

    @cached_property
    def failed(self) -> list[dict]:
        failed = self.cells[self.cells.status == "failed"]
        failures = {source.key: source.metrics["failure"] for source in self.sources}
        keys = failed[["model", "method", "sparsity", "recovery", "seed"]].itertuples(index=False)
        return [{"name": cell_name(key), **failures[tuple(key)]} for key in keys]

    @cached_property
    def missing(self) -> list[str]:
        return [cell_name(cell) for cell in self.cells[self.cells.status == "missing"].itertuples()]


def build(
    metrics_files: list[Path],
    out: Path,
    *,
    expected_cells: list[dict] | None,
    title: str,
    compares: str = "selections",
    oracle_files: Iterable[Path] = (),
) -> None:
    """Write the leaderboard's tables, plots, page and raw copies; same inputs, same bytes.

    Args:
        metrics_files: metrics.json of every scored or failed cell; grid.png may lie beside each.
        out: a folder; files of an earlier build that no longer belong there are removed.
        expected_cells: every planned cell (model, method, sparsity, recovery, seed); those not
            among the files are listed as not finished. None expects what was found.
        title: heading of the page and the tables.
        compares: what differs between ranked rows, a key of collect.COMPARISONS.
        oracle_files: records of layer masks, to place the layer selections among.

    Raises:
        UserError: a file is unreadable, not a metrics.json, a duplicate or of another track.
    """
    sources, masks = read_sources(metrics_files), oracle.read(oracle_files)
    oracle.attach(sources, masks)
    frame = cell_frame(sources, expected_cells)
    board = Board(title, sources, frame, read_grids(sources), compares)
    files = published(board) | oracle.published(masks)
    for pattern in OWNED:
        for file in sorted(Path(out).glob(pattern)):
            if file.relative_to(out).as_posix() not in files:
                file.unlink()
                _remove_empty(file.parent, out)
    for name, content in files.items():
        write_atomically(Path(out) / name, lambda path, content=content: path.write_bytes(content))


def _remove_empty(folder: Path, out: Path) -> None:
    """Remove the folders that a deleted method's records leave empty."""
    while folder != Path(out) and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def read_grids(sources: list[Source]) -> dict[tuple, bytes]:
    """The sample grid of each row's lowest seed that has one."""
    grids = {}
    for source in sources:
        file = source.path.with_name("grid.png")
        if source.metrics["status"] == "ok" and file.exists():
            grids.setdefault(source.key[:-1], file.read_bytes())
    return grids


def raw_name(key: tuple) -> str:
    """Where the copy of a cell's metrics.json lies, relative to the page."""
    model, method, sparsity, recovery, seed = key
    return f"raw/{model}/{method}/{sparsity:g}/{recovery}/seed{seed}.json"


def published(board: Board) -> dict[str, bytes]:
    """Every file of the leaderboard by its path inside the output folder."""
    rows, told = board.rows, (board.caption, board.warnings)
    images = plots.pareto_plots(rows) | plots.sample_grids(rows, board.grids)
    markdown = tables.to_markdown(board.title, rows, *told, board.failed, board.missing,
                                  board.compares)  # fmt: skip
    texts = {
        "leaderboard.csv": tables.to_csv(rows),
        "leaderboard.md": markdown,
        "leaderboard.tex": tables.to_latex(board.title, rows, *told, board.compares),
        "leaderboard.bib": tables.to_bibtex(board.entries),
        "leaderboard.html": to_html(board, images),
    }
    raw = {raw_name(source.key): source.content for source in board.sources}
    return {name: text.encode() for name, text in texts.items()} | images | raw


def to_html(board: Board, images: Mapping[str, bytes]) -> str:
    """One self-contained page: style, script and images are inside, and all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    models = list(board.rows.model.unique())
    return environment.get_template("leaderboard.html.j2").render(
        board=board,
        columns=tables.present(tables.COLUMNS, board.rows),
        legend=tables.legend(board.compares),
        models=models,
        recoveries=recovery_order(board.rows),
        rows=_table(board),
        plots=[_figure(images, name) for name in images if name.endswith(".svg")],
        samples=[_figure(images, f"samples_{m}.png") for m in models
                 if f"samples_{m}.png" in images],
        bibliography=tables.to_bibtex(board.entries).strip(),
        unfinished=tables.unfinished(len(board.missing), board.caption["Track"]),
    )  # fmt: skip


def _figure(images: Mapping[str, bytes], name: str) -> dict:
    kind, _, what = Path(name).stem.partition("_")
    model, cost = what.rsplit("_", 1) if kind == "pareto" else (what, "")
    data = base64.b64encode(images[name]).decode()
    axis = {"macs": "multiply-accumulates", "latency": "measured latency"}.get(cost, "")
    return {
        "name": name,
        "model": model,
        "uri": f"data:{MIME[Path(name).suffix]};base64,{data}",
        "text": f"{model}: FID against {axis}" if axis else f"{model}: samples of every row",
    }


def _table(board: Board) -> list[dict]:
    links: dict[tuple, list] = {}
    for source in board.sources:
        links.setdefault(source.key[:-1], []).append((source.key[-1], raw_name(source.key)))
    previous, table = None, []
    for _, row in board.rows.iterrows():
        reference = row.kind in tables.REFERENCE_KINDS
        group = (row.model, reference or (row.section, row.sparsity, row["share"]))
        table.append({
            "row": row,
            "title": tables.title(row),
            "marks": tables.marks(row),
            "first": group != previous,
            "reference": reference,
            "best": tables.is_best(row),
            "cells": [_cell(column, row) for column in tables.present(tables.COLUMNS, board.rows)],
            "raw": links.get((row.model, row.method, row.sparsity, row.recovery), []),
        })  # fmt: skip
        previous = group
    return table


def _cell(column: tables.Column, row: pd.Series) -> dict:
    value = column.value(row)
    empty = pd.isna(value) or (column.numeric and row.status != "ok" and column.name != "sparsity")
    text, _, sd = column.text(row).partition(" ± ")
    return {"column": column, "text": text, "sd": sd, "sort": None if empty else value}
