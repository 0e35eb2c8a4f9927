"""Write the embedded track's results into the README and the pages of the methods.

    python scripts/write_results.py

The numbers are those of results/embedded/**/leaderboard.csv; a test checks that they agree.
"""

import re
from pathlib import Path

import pandas as pd

from prunebench.leaderboard.collect import METRICS, indistinguishable
from prunebench.leaderboard.tables import number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "embedded"
MARKS = r"(<!-- {name}: written by scripts/write_results\.py -->\n).*?(<!-- end of {name})"
RANDOM = {"layers": "random_layers", "widths": "random_widths", "weights": "random_2_4"}


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


def recipes(rows: pd.DataFrame) -> str:
    """FID of every method under its own recipe, best first on the first model, as Markdown."""
    models = list(dict.fromkeys(rows.model))
    lines = ["| method | removes | healed by |" + "".join(f" {model} |" for model in models)]
    lines.append("|---|---|---|" + "---|" * len(models))
    pruned = rows[~rows.kind.isin(["none", "steps"])]
    keys = ["kind", "sparsity", "share", "title", "control", "reconstruction", "healing"]
    for key, group in pruned.groupby(keys, sort=False):
        kind, sparsity, share, title, control, reconstruction, healing = key
        name = f"{title}{'†' if reconstruction else ''}{' *' if control else ''}"
        target = f"{sparsity:.0%} {share}".strip()
        what = f"{_share(group, kind, sparsity)} {kind} (target {target})"
        cells = [_cell(group[group.model == model]) for model in models]
        lines.append(f"| {name} | {what} | {healing} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def healed(rows: pd.DataFrame) -> str:
    """FID of random layer masks under every recovery, with the teacher's passes, as Markdown."""
    models = list(dict.fromkeys(rows.model))
    lines = ["| recovery | teacher |" + "".join(f" {model} |" for model in models)]
    lines.append("|---|---|" + "---|" * len(models))
    pruned = rows[~rows.kind.isin(["none", "steps"])]
    for recovery, group in pruned.groupby("recovery", sort=False):
        teacher = number(METRICS["teacher_images"], group.teacher_images_mean.mean())
        by_model = group.set_index("model")
        cells = [_fid(by_model.loc[model]) for model in models]
        lines.append(f"| {recovery} | {teacher} k | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def placed(rows: pd.DataFrame) -> str:
    """Where the layer selections stand among all masks, as Markdown."""
    rows = rows[rows.oracle_beaten_mean.notna() & (rows.method != "scratch")]
    places = list(dict.fromkeys(zip(rows.model, rows.recovery, strict=True)))
    lines = ["| selection |" + "".join(f" {model}, {recovery} |" for model, recovery in places)]
    lines.append("|---|" + "---|" * len(places))
    for title, group in rows.groupby("title", sort=False):
        found = group.set_index(["model", "recovery"])
        cells = [_place(found.loc[place]) if place in found.index else "—" for place in places]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _place(row: pd.Series) -> str:
    share = number(METRICS["oracle_beaten"], row.oracle_beaten_mean)
    return f"{share} % ({row.oracle_gap_mean:+.2f})"


def compared(name: str, matched: pd.DataFrame, published: pd.DataFrame) -> str:
    """One method against the random masks of its kind: a sentence per division, and a table."""
    lines, sentences = [], []
    for division, rows in (("matched", matched), ("as published", published)):
        pairs = [(row, _control(rows, row)) for row in rows[rows.method == name].itertuples()]
        pairs = [(row, control) for row, control in pairs if control is not None]
        verdicts = [_verdict(*pair) for pair in pairs]
        lines += [_line(division, *pair, v) for pair, v in zip(pairs, verdicts, strict=True)]
        sentences.append(_sentence(division, verdicts))
    head = "| division | model | sparsity | healed by | FID | random masks | difference | FID is |"
    return "\n".join([*sentences, "", head, "|---|---|---|---|---|---|---|---|", *lines])


def _sentence(division: str, verdicts: list[str]) -> str:
    lower = sum("lower" in verdict for verdict in verdicts)
    told = [verdict for verdict in verdicts if "can't" not in verdict]
    against = "" if division == "matched" else " (fine-tuned, whatever the method's own recovery)"
    return (
        f"{division.capitalize()}: against random masks of its kind at equal sparsity and "
        f"budget{against} the mean FID is lower in {lower} of {len(verdicts)} comparisons; Welch's "
        f"test over three seeds (p < 0.05, uncorrected) tells {len(told)} of them, "
        f"{told.count('higher')} of these to the method's disadvantage."
    )


def _control(rows: pd.DataFrame, row: tuple) -> tuple | None:
    """The random masks with the same model, sparsity, pattern and budget, plainly healed."""
    names = {row.recovery, f"finetune-{row.budget}", f"published-{row.budget}"}
    same = (rows.method == RANDOM[row.kind]) & (rows.status == "ok") & rows.recovery.isin(names)
    for name in ("model", "sparsity", "budget", "share"):
        same &= rows[name] == getattr(row, name)
    return next(rows[same].itertuples(), None) if row.status == "ok" else None


def _verdict(row: tuple, control: tuple) -> str:
    lower = "lower" if row.fid_mean < control.fid_mean else "higher"
    return f"{lower}, can't be told" if indistinguishable(row, control) else lower


def _line(division: str, row: tuple, control: tuple, verdict: str) -> str:
    spread = (row.fid_sd**2 + control.fid_sd**2) ** 0.5
    difference = row.fid_mean - control.fid_mean
    share = f" ({abs(difference) / spread:.1f} × spread)" if spread else ""
    cells = [division, row.model, f"{row.sparsity:.0%} {row.share}".strip(), row.healing,
             _fid(row), _fid(control), f"{difference:+.2f}{share}", verdict]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def filled(text: str, content: str, name: str = "result") -> str:
    """`text` with `content` between the markers `name`."""
    marks = re.compile(MARKS.format(name=name), re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def board(division: str = "") -> pd.DataFrame:
    rows = pd.read_csv(RESULTS / division / "leaderboard.csv")
    return rows.assign(
        budget=rows.recovery.str.rpartition("-")[2], share=rows["share"].astype(object).fillna("")
    )


def written() -> dict[Path, str]:
    """Every page that holds results, as it should read."""
    matched, published = board(), board("published")
    readme = ROOT / "README.md"
    blocks = {
        "matched": table(matched),
        "oracle": placed(matched),
        "published": recipes(published),
        "recovery": healed(board("recovery")),
    }
    text = readme.read_text()
    for name, block in blocks.items():
        text = filled(text, block, name)
    pages = {readme: text}
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        pages[page] = filled(page.read_text(), compared(page.stem, matched, published))
    return pages


def main() -> None:
    for page, text in written().items():
        page.write_text(text)


if __name__ == "__main__":
    main()
