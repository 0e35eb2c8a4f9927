"""Everything a leaderboard publishes, above all one HTML page that works from a disk, offline."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import markupsafe
import pandas as pd

from prunebench.errors import UserError
from prunebench.leaderboard import combinations, decoders, oracle, plots, tables, writers
from prunebench.leaderboard.caption import caption, warnings
from prunebench.leaderboard.collect import (
    CELL,
    ROW,
    Source,
    aggregate,
    axes_folder,
    cell_frame,
    cell_name,
    dense_folder,
    read_sources,
    recovery_order,
    reference,
)
from prunebench.leaderboard.publish import publish
from prunebench.leaderboard.writers import Column, Document, Ending, escape_markdown
from prunebench.records import sealed
from prunebench.records.parts import placeless

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
    def together(self) -> list[combinations.Together]:
        """Changes that were measured alone and together, where the board is about them."""
        return combinations.found(self.cells) if self.compares == "combinations" else []

    @cached_property
    def added_up(self) -> Document:
        """What of `together` helps or hurts each other."""
        return combinations.document(self.together, tables.fid_label(self.rows))

    @cached_property
    def caption(self) -> dict[str, str]:
        return caption(self.sources, self.cells)

    @cached_property
    def _bibliography(self) -> tuple[dict[str, str], list[str]]:
        return writers.bibliography(self.rows.bibtex.tolist())

    @property
    def entries(self) -> dict[str, str]:
        return self._bibliography[0]

    @cached_property
    def legend(self) -> list[str]:
        return tables.legend(self.compares) + tables.assumptions(self.rows)

    @cached_property
    def warnings(self) -> list[str]:
        return warnings(self.sources, self.cells, self.rows) + self._bibliography[1]

    @cached_property
    def failed(self) -> list[dict]:
        failed = self.cells[self.cells.status == "failed"]
        failures = {source.key: source.record.failure for source in self.sources}
        keys = failed[CELL].itertuples(index=False)
        return [{"name": cell_name(key), **failures[tuple(key)].model_dump()} for key in keys]

    @cached_property
    def missing(self) -> list[str]:
        return [cell_name(cell) for cell in self.cells[self.cells.status == "missing"].itertuples()]

    @property
    def unfinished(self) -> str:
        """Where to look for the reasons: logs of this moment are no part of a leaderboard."""
        return (
            f"{len(self.missing):,} cells wait for jobs that have not run, are running or were "
            f"lost to the machine; `prunebench progress --track {self.caption['Track']} "
            "--division all` says which, why and names the logs."
        )

    def document(self, shown: list[Column]) -> Document:
        """The board as text, with tables of these columns."""
        endings = []
        if self.together:
            told = map(escape_markdown, combinations.sentences(self.together))
            endings.append(Ending(self.added_up.title, list(told), "All: combinations.md."))
        if self.failed:
            endings.append(Ending("Failed cells", [_failure(cell) for cell in self.failed]))
        if self.missing:
            names = [f"`{name}`" for name in self.missing]
            endings.append(Ending("Cells not finished", names, self.unfinished))
        return Document(
            title=self.title,
            tables=tables.tables(self.rows, shown),
            conditions=self.caption,
            legend=self.legend,
            warnings=self.warnings,
            endings=endings,
            entries=self.entries,
        )


def _failure(cell: dict) -> str:
    where = f"`{cell['name']}` failed in {escape_markdown(cell['stage'])}"
    log = escape_markdown(placeless(cell["log"] or "none"))
    return f"{where}: {escape_markdown(cell['error'])} (log: {log})"


def build(
    scores: list[Path],
    out: Path,
    *,
    expected_cells: list[dict] | None,
    title: str,
    compares: str = "selections",
    oracle_files: Iterable[Path] = (),
    decoder_files: Iterable[Path] = (),
    older: bool = False,
) -> None:
    """Write the leaderboard's tables, plots, page and raw copies; same inputs, same bytes.

    Args:
        scores: score.json of every scored or failed cell; grid.png may lie beside each.
        out: a folder; what an earlier build wrote there and no longer belongs there is removed.
        expected_cells: every planned cell (model, method, sparsity, recovery, seed); those not
            among the files are listed as not finished, a file of another is refused. None expects
            what was found.
        title: heading of the page and the tables.
        compares: what differs between ranked rows, a key of collect.COMPARISONS.
        oracle_files: records of layer masks, to place the layer selections among.
        decoder_files: records of narrow decoders, which get a table of their own.
        older: whether records of schema 1, which nothing seals, are read too.

    Raises:
        UserError: a file is unreadable, no score, a duplicate or can't be compared with another.
    """
    sources, masks = read_sources(scores, expected_cells, older), oracle.read(oracle_files, older)
    frame = oracle.attached(cell_frame(sources, expected_cells), sources, masks)
    board = Board(title, sources, frame, read_grids(sources), compares)
    fid = tables.fid_label(board.rows)
    beside = oracle.published(masks, fid) | decoders.published(decoders.read(decoder_files))
    publish(out, published(board) | beside)


def read_grids(sources: list[Source]) -> dict[tuple, bytes]:
    """The sample grid of each row's lowest seed that has one."""
    grids = {}
    for source in sources:
        file = source.path.with_name("grid.png")
        if source.record.status == "ok" and file.exists():
            content = file.read_bytes()
            if source.record.files.get(file.name) != hashlib.sha256(content).hexdigest():
                raise UserError(f"{file} is not the one of {source.path}; {sealed.AGAIN}")
            grids.setdefault(source.key[:-1], content)
    return grids


def raw_name(cell) -> str:
    """Where the copy of a cell's score.json lies, relative to the page."""
    seed = dense_folder(cell.dense_seed)
    axes = axes_folder(cell.precision, cell.sampling)
    return (f"raw/{cell.model}/{seed}{cell.method}/{cell.sparsity:g}/{cell.recovery}/{axes}"
            f"seed{cell.seed}.json")  # fmt: skip


def published(board: Board) -> dict[str, bytes]:
    """Every file of the leaderboard by its path inside the output folder."""
    rows = board.rows
    images = plots.pareto_plots(rows) | plots.sample_grids(rows, board.grids)
    texts = writers.formats(
        board.document(tables.readable(rows)),
        board.document(tables.printed(rows)),
        to_html(board, images),
        tables.numbers(rows),
    )
    raw = {raw_name(source.cell): source.content for source in board.sources}
    added_up = combinations.published(board.together, tables.fid_label(rows))
    return {name: text.encode() for name, text in texts.items()} | images | raw | added_up


def to_html(board: Board, images: Mapping[str, bytes]) -> str:
    """One self-contained page: style, script and images are inside, and all text is escaped."""
    bases = list(board.rows.base.unique())
    return writers.to_html(
        "leaderboard.html.j2",
        board=board,
        columns=tables.columns(board.rows),
        legend=board.legend,
        models=bases,
        recoveries=recovery_order(board.rows),
        rows=_table(board),
        plots=[_figure(images, name) for name in images if name.endswith(".svg")],
        samples=[_figure(images, f"samples_{base}.png") for base in bases
                 if f"samples_{base}.png" in images],
        bibliography=markupsafe.escape(writers.to_bibtex(board.entries).strip()),
    )  # fmt: skip


def _figure(images: Mapping[str, bytes], name: str) -> dict:
    kind, _, what = Path(name).stem.partition("_")
    model, cost = what.rsplit("_", 1) if kind == "pareto" else (what, "")
    data = base64.b64encode(images[name]).decode()
    axis = {"macs": "multiply-accumulates", "latency": "measured latency"}.get(cost, "")
    return {
        "name": name,
        "model": model,
        # Markup, because texts are cut at a length that no picture keeps to.
        "uri": markupsafe.Markup(f"data:{MIME[Path(name).suffix]};base64,{data}"),
        "text": f"{model}: FID against {axis}" if axis else f"{model}: samples of every row",
    }


def _table(board: Board) -> list[dict]:
    links: dict[tuple, list] = {}
    for source in board.sources:
        links.setdefault(source.key[:-1], []).append((source.cell.seed, raw_name(source.cell)))
    previous, table, shown = None, [], tables.columns(board.rows)
    for _, row in board.rows.iterrows():
        dense = reference(row)
        group = (
            row.base,
            dense or (row.section, row.sparsity, row["share"], row.guessed != ""),
        )
        table.append({
            "row": row,
            "title": tables.title(row),
            "marks": tables.marks(row),
            "first": group != previous,
            "reference": dense,
            "best": tables.is_best(row),
            "cells": [_cell(column, row) for column in shown],
            "raw": links.get(tuple(row[ROW]), []),
        })  # fmt: skip
        previous = group
    return table


def _cell(column: Column, row: pd.Series) -> dict:
    value = column.value(row)
    empty = pd.isna(value) or (column.numeric and row.status != "ok" and column.name != "sparsity")
    text, _, sd = column.text(row).partition(" ± ")
    return {"column": column, "text": text, "sd": sd, "sort": None if empty else value}
