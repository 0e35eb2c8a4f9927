"""Write the results of the embedded track into the README, between its two markers.

    python scripts/update_readme.py

The numbers are those of results/embedded/leaderboard.csv; a test checks that they agree.
"""

from pathlib import Path

import pandas as pd

from prunebench.leaderboard.collect import METRICS
from prunebench.leaderboard.tables import number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "embedded" / "leaderboard.csv"
START, END = "<!-- results: written by scripts/update_readme.py -->", "<!-- end of results -->"


def table(rows: pd.DataFrame) -> str:
    """FID at both budgets and measured speed-up of every method on every model, as Markdown."""
    models = list(dict.fromkeys(rows.model))
    lines = ["| method | prunes |" + "".join(f" {model} |" for model in models)]
    lines.append("|---|---|" + "---|" * len(models))
    keys = ["title", "kind", "sparsity", "control", "reconstruction"]
    for (title, kind, sparsity, control, reconstruction), group in rows.groupby(keys, sort=False):
        what = "—" if kind == "none" else f"{_share(group, kind, sparsity)} {kind}"
        name = f"{title}{'†' if reconstruction else ''}{' *' if control else ''}"
        cells = [_cell(group[group.model == model]) for model in models]
        lines.append(f"| {name} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(rows: pd.DataFrame, kind: str, sparsity: float) -> str:
    """What went, as reached: an N:M pattern covers another share of each model."""
    reached = rows.sparsity_reached_mean if kind != "steps" else pd.Series([sparsity])
    low, high = reached.min(), reached.max()
    return f"{low:.0%}" if high - low < 0.05 else f"{100 * low:.0f}–{high:.0%}"


def _cell(rows: pd.DataFrame) -> str:
    """FID without recovery → with it, and the measured speed-up, of one method on one model."""
    if rows.empty:
        return "—"
    fids = {row.recovery: _fid(row) for row in rows.itertuples()}
    untrained = fids.pop("none", "")
    arrow = " → ".join([untrained, *fids.values()])
    return f"{arrow.strip()} ({number(METRICS['speedup'], rows.speedup_mean.mean())}×)"


def _fid(row: tuple) -> str:
    return row.status if row.status != "ok" else number(METRICS["fid"], row.fid_mean, row.fid_sd)


def updated(readme: str, rows: pd.DataFrame) -> str:
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(rows)}\n{END}{after}"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(), pd.read_csv(RESULTS)))


if __name__ == "__main__":
    main()
