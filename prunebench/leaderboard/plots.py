"""Pareto plots and assembled sample grids, byte-identical for identical rows."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullFormatter
from PIL import Image, ImageChops, ImageDraw, ImageFont

from prunebench.leaderboard.collect import (
    REFERENCE_KINDS,
    ROW,
    is_reference,
    recovery_order,
    reference,
    worse_by,
)
from prunebench.leaderboard.measures import MEASURES
from prunebench.leaderboard.tables import fid_label, number, percent, title

# Okabe and Ito's palette without its yellow, which vanishes on white; black is the dense model's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
INK, MUTED = "#1a1a1a", "#8a8a8a"
STYLE = {
    "svg.hashsalt": "prunebench", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED,
    "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": "#ececec",
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
LOG_FROM = 5.0  # an axis whose values span more than this factor is logarithmic
TILE, GAP, ACROSS = 300, 20, 6  # pixels of a sample grid, between them, and how many in a line


@dataclass(frozen=True)
class Cost:
    """The horizontal axis of a Pareto plot."""

    name: str
    label: str


COSTS = (
    Cost("macs", "MACs per image, all sampling steps"),
    Cost("latency", "Measured sampling latency (ms per image)"),
)


def cost_of(rows: pd.DataFrame, cost: Cost) -> pd.Series:
    """Denoiser MACs of one image over all steps, so that fewer steps cost less; or its ms."""
    if cost.name == "macs":
        return rows.macs_mean * rows.steps.astype(float)
    # Each row was timed in turns with dense: only the ratio holds across moments of the machine.
    return rows.dense_sampling_ms_mean.mean() / rows.speedup_mean


def pareto_frontier(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Indices of the rows no other is both cheaper and of better FID than, by rising cost."""
    order = np.lexsort((worse_by("fid", quality, 0.0), cost))
    kept, best = [], math.inf
    for index in order:
        badness = worse_by("fid", quality[index], 0.0)
        if badness < best:
            kept.append(index)
            best = badness
    return np.array(kept, dtype=int)


def method_styles(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker by method, the same in every plot of a board."""
    methods = sorted(rows[~is_reference(rows)].method.unique())
    return {
        method: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, method in enumerate(methods)
    }


def pareto_plots(rows: pd.DataFrame) -> dict[str, bytes]:
    """pareto_<model>_<cost>.svg and .png by file name."""
    styles, files = method_styles(rows), {}
    finished = rows[rows.status == "ok"]
    for model, of_model in finished.groupby("base"):
        for cost in COSTS:
            drawn = of_model[cost_of(of_model, cost).notna()]
            if len(drawn):
                for form in ("svg", "png"):
                    name = f"pareto_{model}_{cost.name}.{form}"
                    files[name] = _pareto_plot(drawn, cost, styles, form)
    return files


def _pareto_plot(rows: pd.DataFrame, cost: Cost, styles: dict, form: str) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.9), layout="constrained")
        axes = figure.subplots()
        x, y = cost_of(rows, cost), rows.fid_mean
        fills = _fills(rows)
        _draw_frontier(axes, x.to_numpy(), y.to_numpy())
        _draw_methods(axes, rows, x, styles, fills)
        _draw_references(axes, rows[is_reference(rows)], x)
        _scale(axes.xaxis, x)
        _scale(axes.yaxis, y)
        axes.set(xlabel=cost.label, ylabel=f"{fid_label(rows)}, lower is better")
        axes.set_title(rows.base.iloc[0], loc="left", fontsize=11, fontweight="bold", color=INK)
        _draw_legend(figure, rows, styles, fills)
        return _saved(figure, form)


def _saved(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[form]
    figure.savefig(buffer, format=form, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _fills(rows: pd.DataFrame) -> dict[str, float]:
    """How full each recovery's marker is: hollow for the cheapest, solid for the dearest."""
    pruned = rows[~is_reference(rows)]
    order = recovery_order(pruned) if len(pruned) else []
    return {name: place / max(1, len(order) - 1) for place, name in enumerate(order)}


def _tint(colour: str, fill: float) -> tuple[float, ...]:
    return tuple(1 - fill * (1 - channel) for channel in to_rgb(colour))


def _draw_frontier(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    front = pareto_frontier(x, y)
    axes.plot(x[front], y[front], drawstyle="steps-post", color="#d2d2d2", lw=4,
              solid_capstyle="round", zorder=1)  # fmt: skip


def _draw_methods(axes: Axes, rows: pd.DataFrame, x: pd.Series, styles: dict, fills: dict) -> None:
    alike = ["method", "recovery", "cell_precision", "sampling"]
    for (method, recovery, *_), group in rows[~is_reference(rows)].groupby(alike):
        colour, marker = styles[method]
        place, sd = x[group.index].to_numpy(), group.fid_sd.fillna(0).to_numpy()
        mean = group.fid_mean.to_numpy()
        if len(group) > 1:  # several sparsities of one method
            axes.plot(place, mean, color=colour, lw=0.8, alpha=0.5, zorder=2)
        low = np.minimum(sd, 0.999 * mean)  # a log axis has no room below zero
        axes.errorbar(place, mean, yerr=[low, sd], fmt="none", ecolor=colour, elinewidth=0.8,
                      alpha=0.6, zorder=2)  # fmt: skip
        axes.plot(place, mean, marker, color=colour, ms=6, mew=1.3, alpha=0.95, zorder=3,
                  mfc=_tint(colour, fills[recovery]))  # fmt: skip


def _draw_references(axes: Axes, references: pd.DataFrame, x: pd.Series) -> None:
    found = references.assign(x=x[references.index]).sort_values("x")
    for _, line in found.groupby("cell_precision"):
        axes.errorbar(line.x, line.fid_mean, yerr=line.fid_sd.fillna(0), fmt="-o", color="black",
                      ms=3.5, lw=1.1, elinewidth=0.8, zorder=4)  # fmt: skip
    several = references.cell_precision.nunique() > 1
    for point in found.itertuples():
        label = f"{int(point.steps)}, {point.cell_precision}" if several else int(point.steps)
        axes.annotate(
            str(label), (point.x, point.fid_mean), xytext=(-7, -10), zorder=5,
            textcoords="offset points", ha="center", fontsize=7.5, color="black",
        )  # fmt: skip


def _scale(axis: matplotlib.axis.Axis, values: pd.Series) -> None:
    """Limits around the values; logarithmic when they span much."""
    low, high = values.min(), values.max()
    name = axis.axis_name
    if low > 0 and high / low > LOG_FROM:
        axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.45, high * 1.3)})
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1
        axis.axes.set(**{f"{name}lim": (low - margin, high + margin)})
    large = high >= 1e4  # MACs: 84 M reads better than 84000000
    axis.set_major_formatter(EngFormatter() if large else FormatStrFormatter("%g"))


def _draw_legend(figure: Figure, rows: pd.DataFrame, styles: dict, fills: dict) -> None:
    titles = rows.drop_duplicates("method").set_index("method").title
    handles = [
        Line2D([], [], color="black", marker="o", ms=3.5, lw=1.1, label="Dense, by steps"),
        Line2D([], [], color="#d2d2d2", lw=4, label="Pareto frontier"),
    ]
    for recovery, fill in fills.items():
        label = "No recovery" if recovery == "none" else recovery
        handles.append(Line2D([], [], ls="", marker="o", color=MUTED, mew=1.3, label=label,
                              mfc=_tint(MUTED, fill)))  # fmt: skip
    for method in sorted(set(rows.method) & set(styles)):
        colour, marker = styles[method]
        handles.append(Line2D([], [], ls="", marker=marker, color=colour, label=_plain(
            titles[method])))  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", labelspacing=0.55)


def _plain(text: str) -> str:
    """A legend label: cut short, and never read as mathematics."""
    text = text if len(text) <= 30 else text[:29] + "…"
    return text.replace("$", r"\$")


# Sample grids


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, size)


def sample_grids(rows: pd.DataFrame, grids: dict[tuple, bytes]) -> dict[str, bytes]:
    """samples_<model>.png by file name, from the grid of each row's lowest finished seed."""
    files = {}
    for model, of_model in rows[rows.status == "ok"].groupby("base"):
        sections = _sections(of_model, grids)
        if sections:
            files[f"samples_{model}.png"] = _assemble(sections)
    return files


def _sections(rows: pd.DataFrame, grids: dict[tuple, bytes]) -> list[tuple[str, list]]:
    """(heading, tiles) for the references and then each recovery; a tile is (row, image)."""
    sections: dict[str, list] = {}
    for _, row in rows.iterrows():
        grid = grids.get(tuple(row[ROW]))
        name = "No recovery" if row.recovery == "none" else row.recovery
        name = "Dense" if reference(row) else name
        if grid:
            sections.setdefault(name, []).append((row, grid))
    return list(sections.items())


def _tile(grid: bytes) -> Image.Image:
    """About TILE wide; tiny images grow by a whole factor so that their pixels stay square."""
    image = Image.open(io.BytesIO(grid)).convert("RGB")
    factor = round(TILE / max(image.size))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return image


def _assemble(sections: list[tuple[str, list]]) -> bytes:
    sections = [(name, [(row, _tile(grid)) for row, grid in tiles]) for name, tiles in sections]
    images = [image for _, tiles in sections for _, image in tiles]
    width, height = max(i.width for i in images), max(i.height for i in images)
    across = min(ACROSS, max(len(tiles) for _, tiles in sections))
    head, line = 44, height + 44 + GAP
    lines = sum(-(-len(tiles) // across) for _, tiles in sections)
    size = (GAP + across * (width + GAP), len(sections) * head + lines * line + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for heading, tiles in sections:
        draw.text((GAP, top), heading, INK, _font(18, bold=True))
        top += head
        for place, (row, image) in enumerate(tiles):
            corner = (GAP + place % across * (width + GAP), top + place // across * line)
            _draw_label(draw, corner, row, width)
            sheet.paste(image, (corner[0], corner[1] + 40))
        top += -(-len(tiles) // across) * line
    buffer = io.BytesIO()
    _grey_if_possible(sheet).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _grey_if_possible(image: Image.Image) -> Image.Image:
    """The same picture in one channel, a third of the bytes, when it holds no colour."""
    grey = image.convert("L")
    return image if ImageChops.difference(image, grey.convert("RGB")).getbbox() else grey


def _draw_label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], row: pd.Series,
                width: int) -> None:  # fmt: skip
    left, top = corner
    fid = f"FID {number(MEASURES['fid'], row.fid_mean)}"
    unpruned = row.kind in REFERENCE_KINDS
    what = f"{int(row.steps)} steps" if unpruned else percent(row.sparsity)
    what = f"{row.combination}, {what}" if row.combination else what
    bold = _font(14, bold=True)
    draw.text((left, top), _fitted(title(row), bold, width), INK, bold)
    draw.text((left, top + 19), f"{what} · {fid}", "#555555", _font(13))


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
