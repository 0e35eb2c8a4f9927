"""Documents of tables as csv, Markdown, LaTeX, BibTeX and HTML: the one writer of every board.

Texts may come from strangers' methods, so all of them are cleaned and escaped here.
"""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from prunebench.records.parts import tidy

NOTHING = "—"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


@dataclass(frozen=True)
class Column:
    """One column of printed tables; what its functions take is a line of its board."""

    label: str
    text: Callable[[Any], str]  # what it shows, in plain Unicode
    numeric: bool = True
    name: str = ""
    help: str = ""
    value: Callable[[Any], float | str] | None = None  # what it sorts by
    key: bool = False  # part of the readable subset


@dataclass(frozen=True)
class Cell:
    """A text in a table, perhaps in bold or with a citation's key beside it."""

    text: str
    bold: bool = False
    cite: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a table; where the group changes, LaTeX says so."""

    cells: Sequence[Cell]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A heading, a line of text (or none) and lines of cells under columns."""

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    note: str = ""
    label: str = ""  # of LaTeX


@dataclass(frozen=True)
class Ending:
    """A list after the tables: what failed or is not there."""

    title: str
    items: Sequence[str]  # Markdown
    note: str = ""


@dataclass(frozen=True)
class Document:
    """What every format of a board is made of."""

    title: str
    tables: Sequence[Table]
    conditions: Mapping[str, str]
    legend: Sequence[str]
    warnings: Sequence[str] = ()
    endings: Sequence[Ending] = ()
    wide: bool = False  # LaTeX shrinks its tables to the width of the text
    entries: Mapping[str, str] = field(default_factory=dict)  # BibTeX by key


def plain_lines(columns: Sequence[Column], content: Sequence[Any]) -> list[Line]:
    """Lines that are nothing but the columns' texts."""
    return [Line([Cell(column.text(entry)) for column in columns]) for entry in content]


def one_line(text: object) -> str:
    """Without line breaks and what no text should hold; non-breaking spaces stay."""
    return re.sub(r"[ \t\r\n]+", " ", tidy(str(text))).strip(" ")


# csv


def to_csv(frame: pd.DataFrame) -> str:
    """Every row at full precision; absent numbers are empty, and no text is a formula."""
    texts = frame.select_dtypes(include=["object", "string"]).columns
    safe = frame.assign(**{name: frame[name].map(_no_formula) for name in texts})
    return safe.to_csv(index=False, lineterminator="\n")


def _no_formula(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = tidy(value)
    return f"'{text}" if text.startswith(FORMULA) else text


# Markdown


def escape_markdown(text: str) -> str:
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def to_markdown(document: Document) -> str:
    blocks = [f"# {escape_markdown(document.title)}"]
    blocks += [f"> **Warning:** {escape_markdown(text)}" for text in document.warnings]
    blocks.append(_list(f"**{k}:** {escape_markdown(v)}" for k, v in document.conditions.items()))
    for table in document.tables:
        blocks += [f"## {escape_markdown(table.title)}", escape_markdown(table.note)]
        blocks.append("\n".join(_markdown_table(table)))
    blocks += ["## Legend", _list(map(escape_markdown, document.legend))]
    for ending in document.endings:
        blocks += [f"## {ending.title}", ending.note, _list(ending.items)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _list(items) -> str:
    return "\n".join(f"- {item}" for item in items)


def _markdown_table(table: Table) -> list[str]:
    lines = [[escape_markdown(column.label) for column in table.columns]]
    lines.append(["---:" if column.numeric else ":---" for column in table.columns])
    lines += [[_markdown_cell(cell) for cell in line.cells] for line in table.lines]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _markdown_cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    return f"**{text}**" if cell.bold else text


# LaTeX and BibTeX

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&",
    "#": r"\#", "$": r"\$", "~": r"\textasciitilde{}", "\u00a0": "~", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "—": "---", "±": r"$\pm$",
    "×": r"$\times$", "†": r"$^\dagger$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$",
    "≈": r"$\approx$", "≥": r"$\ge$", "∞": r"$\infty$", "⁻": "$^-$", "³": "$^3$", "“": "``",
    "”": "''", "*": r"$^*$", "é": r"\'e",
}  # fmt: skip
KEY = re.compile(r"\s*@\w+\s*\{\s*([A-Za-z0-9:._/+-]+)\s*,")  # of a BibTeX entry, safe in \cite


def escape_latex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in one_line(text))


def bibtex_key(entry: str) -> str:
    """The citation key of a BibTeX entry; "" where it has none that is a mere name to LaTeX."""
    found = KEY.match(entry)
    return found.group(1) if found else ""


def bibliography(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Entries by key, and a warning for each that can't be cited or is given in two ways."""
    entries, problems = {}, []
    for entry in sorted({tidy(text).strip() for text in texts if text.strip()}):
        key = bibtex_key(entry)
        if not key:
            problems.append(f"A BibTeX entry is left out, its key is none: {one_line(entry)[:60]}")
            continue
        if key in entries:
            problems.append(f"Two methods give the BibTeX key {key} different entries.")
        entries.setdefault(key, entry)
    return dict(sorted(entries.items())), problems


def to_bibtex(entries: Mapping[str, str]) -> str:
    return "".join(f"{entry}\n\n" for entry in entries.values())


def to_latex(document: Document) -> str:
    """Tables to \\input; the document needs booktabs (and graphicx) and leaderboard.bib.

    The first caption carries the legend and the conditions of measurement.
    """
    conditions = " ".join(f"{label}: {text}." for label, text in document.conditions.items())
    notes = " ".join([conditions, *document.warnings, *document.legend])
    packages = "booktabs,graphicx" if document.wide else "booktabs"
    blocks = [f"% \\usepackage{{{packages}}}; entries in leaderboard.bib"]
    for number, table in enumerate(document.tables):
        told = [f"{document.title}: {table.title}.", table.note, "" if number else notes]
        blocks.append(_latex_table(table, " ".join(filter(None, told)), document.wide))
    return "\n\n".join(blocks) + "\n"


def _latex_table(table: Table, caption: str, wide: bool) -> str:
    form = "".join("r" if column.numeric else "l" for column in table.columns)
    head = " & ".join(_latex_head(column.label) for column in table.columns) + r" \\"
    fit = [r"\resizebox{\textwidth}{!}{%"] if wide else []
    return "\n".join([
        r"\begin{table*}[t]", r"\centering", rf"\caption{{{escape_latex(caption)}}}",
        rf"\label{{tab:prunebench:{escape_latex(table.label or table.title)}}}",
        r"\smallskip\scriptsize", r"\setlength{\tabcolsep}{3pt}", *fit,
        rf"\begin{{tabular}}{{@{{}}{form}@{{}}}}", r"\toprule", head, r"\midrule",
        *_latex_lines(table), r"\bottomrule", r"\end{tabular}" + "}" * wide, r"\end{table*}",
    ])  # fmt: skip


def _latex_head(label: str) -> str:
    lines = textwrap.wrap(label, 9, break_long_words=False, break_on_hyphens=False)
    return r"\shortstack[r]{" + r" \\ ".join(map(escape_latex, lines)) + "}"


def _latex_lines(table: Table) -> list[str]:
    lines, previous = [], ""
    for line in table.lines:
        if line.group != previous:
            group = rf"\multicolumn{{{len(table.columns)}}}{{@{{}}l}}"
            lines += [r"\midrule", rf"{group}{{\emph{{{escape_latex(line.group)}}}}} \\"]
        previous = line.group
        lines.append(" & ".join(map(_latex_cell, line.cells)) + r" \\")
    return lines


def _latex_cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.bold else text
    return rf"{text}~\cite{{{cell.cite}}}" if cell.cite else text


# HTML


def to_html(template: str, **content) -> str:
    """One self-contained page of a template beside this file; all text is cleaned and escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_cleaned,
    )  # fmt: skip
    return environment.get_template(template).render(**content)


def _cleaned(value: object) -> object:
    return tidy(value) if type(value) is str else value


def formats(document: Document, latex: Document, page: str, frame: pd.DataFrame) -> dict[str, str]:
    """The texts of a board by file name.

    Args:
        latex: the document whose tables fit a paper.
        page: the board as HTML.
        frame: the board as numbers.
    """
    return {
        "leaderboard.csv": to_csv(frame),
        "leaderboard.md": to_markdown(document),
        "leaderboard.tex": to_latex(latex),
        "leaderboard.bib": to_bibtex(document.entries),
        "leaderboard.html": page,
    }
