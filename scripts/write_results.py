"""Write the embedded track's results into the README and the pages of the methods.

    python scripts/write_results.py

The numbers are those of results/embedded/**/leaderboard.csv; a test checks that they agree.
"""

import re
from pathlib import Path

import pandas as pd

from prunebench.leaderboard.collect import SIGNIFICANCE, indistinguishable, p_value
from prunebench.leaderboard.measures import MEASURES
from prunebench.leaderboard.tables import fid_label, number
from prunebench.records import upgrade

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
    """What went, as reached: layers are whole, and a pattern covers another share of each model."""
    reached = rows.sparsity_reached_mean if kind != "steps" else pd.Series([sparsity])
    low, high = (f"{100 * value:.0f}" for value in (reached.min(), reached.max()))
    return f"{low}%" if low == high else f"{low}–{high}%"


def _cell(rows: pd.DataFrame) -> str:
    """FID without recovery → with it, and the measured speed-up, of one method on one model."""
    if rows.empty:
        return "—"
    fids = {row.recovery: _fid(row) for row in rows.itertuples()}
    untrained = fids.pop("none", "")
    arrow = " → ".join([untrained, *fids.values()])
    return f"{arrow.strip()} ({number(MEASURES['speedup'], rows.speedup_mean.mean())}×)"


def _fid(row: tuple) -> str:
    return row.status if row.status != "ok" else number(MEASURES["fid"], row.fid_mean, row.fid_sd)


def recipes(rows: pd.DataFrame) -> str:
    """FID of every method under its own recipe, best first on the first model, as Markdown."""
    models = list(dict.fromkeys(rows.model))
    lines = ["| method | removes | recovered by |" + "".join(f" {model} |" for model in models)]
    lines.append("|---|---|---|" + "---|" * len(models))
    pruned = rows[~rows.kind.isin(["none", "steps"])]
    keys = ["kind", "sparsity", "share", "title", "control", "reconstruction", "recovered_by"]
    for key, group in pruned.groupby(keys, sort=False):
        kind, sparsity, share, title, control, reconstruction, recovered_by = key
        name = f"{title}{'†' if reconstruction else ''}{' *' if control else ''}"
        target = f"{sparsity:.0%} {share}".strip()
        what = f"{_share(group, kind, sparsity)} {kind} (target {target})"
        cells = [_cell(group[group.model == model]) for model in models]
        lines.append(f"| {name} | {what} | {recovered_by} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recoveries(rows: pd.DataFrame) -> str:
    """FID of random layer masks under every recovery, with the teacher's passes, as Markdown."""
    models = list(dict.fromkeys(rows.model))
    lines = ["| recovery | teacher |" + "".join(f" {model} |" for model in models)]
    lines.append("|---|---|" + "---|" * len(models))
    pruned = rows[~rows.kind.isin(["none", "steps"])]
    for recovery, group in pruned.groupby("recovery", sort=False):
        teacher = number(MEASURES["teacher_images"], group.teacher_images_mean.mean())
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
    share = number(MEASURES["oracle_beaten"], row.oracle_beaten_mean)
    return f"{share} % ({row.oracle_gap_mean:+.2f})"


def compared(name: str, matched: pd.DataFrame, as_published: pd.DataFrame) -> str:
    """One method against the random masks of its kind: a sentence per division, and a table."""
    lines, sentences = [], []
    for division, rows in (("matched", matched), ("as published", as_published)):
        pairs = [(row, _control(rows, row)) for row in rows[rows.method == name].itertuples()]
        pairs = [(row, control) for row, control in pairs if control is not None]
        verdicts = [_verdict(*pair) for pair in pairs]
        lines += [_line(division, *pair, v) for pair, v in zip(pairs, verdicts, strict=True)]
        sentences.append(_sentence(division, verdicts))
    head = (
        "| division | model | sparsity | recovered by | FID | random masks | difference | FID is |"
    )
    return "\n".join([*sentences, "", head, "|---|---|---|---|---|---|---|---|", *lines])


def _sentence(division: str, verdicts: list[str]) -> str:
    lower = sum("lower" in verdict for verdict in verdicts)
    told = [verdict for verdict in verdicts if "not" not in verdict]
    against = "" if division == "matched" else " (fine-tuned, whatever the method's own recovery)"
    return (
        f"{division.capitalize()}: against random masks of its kind at equal sparsity and "
        f"budget{against} the mean FID is lower in {lower} of {len(verdicts)} comparisons; Welch's "
        f"test over three seeds (p < {SIGNIFICANCE}, uncorrected) finds {len(told)} of them "
        f"significant, {told.count('higher')} of these to the method's disadvantage."
    )


def _control(rows: pd.DataFrame, row: tuple) -> tuple | None:
    """The random masks with the same model, sparsity, pattern and budget, plainly fine-tuned."""
    names = {row.recovery, f"finetune-{row.budget}", f"recipe-{row.budget}"}
    same = (rows.method == RANDOM.get(row.kind)) & (rows.status == "ok") & rows.recovery.isin(names)
    for name in ("model", "sparsity", "budget", "share"):
        same &= rows[name] == getattr(row, name)
    return next(rows[same].itertuples(), None) if row.status == "ok" else None


def _verdict(row: tuple, control: tuple) -> str:
    lower = "lower" if row.fid_mean < control.fid_mean else "higher"
    return f"{lower}, not significantly" if indistinguishable(row, control) else lower


def _line(division: str, row: tuple, control: tuple, verdict: str) -> str:
    spread = (row.fid_sd**2 + control.fid_sd**2) ** 0.5
    difference = row.fid_mean - control.fid_mean
    share = f" ({abs(difference) / spread:.1f} × spread)" if spread else ""
    cells = [division, row.model, f"{row.sparsity:.0%} {row.share}".strip(), row.recovered_by,
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


# What the README says of the numbers: every sentence is computed.


def findings(matched: pd.DataFrame, as_published: pd.DataFrame) -> str:
    """What a reader may take from the matched division, as Markdown."""
    pruned = matched[~matched.kind.isin(["none", "steps"])]
    verdicts = pruned.equal_latency_verdict.value_counts()
    lines = [
        "At the same measured speed the *dense* model with fewer steps is better than the pruned "
        f"one in {verdicts['worse']} of {verdicts.sum()} comparisons, worse in "
        f"{verdicts['better']}, and not significantly different in {verdicts['same']}.",
        f"Diff-Pruning's FID against that of {_against(matched, 'diff_pruning', 'random_widths')}; "
        f"of {_against(matched, 'diff_pruning', 'taylor')} (another score, and no gate; on `sit` "
        "Diff-Pruning's gate never closes, so that the score alone differs there); of "
        f"{_against(matched, 'diff_pruning', 'magnitude_widths')}.",
        _layers(matched, as_published),
        f"{_one_shot()} Its staged vote removes them late, at a budget of 40 steps.",
        "The reconstruction of gradient flow against "
        f"{_against(matched, 'gradient_flow', 'random_widths')}.",
        f"SparseDM against {_against(matched, 'sparsedm', 'random_2_4')}; against "
        f"{_against(matched, 'sparsedm', 'magnitude_2_4')}.",
        *_checks(matched),
    ]  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def _pairs(rows: pd.DataFrame, method: str, other: str) -> list[tuple[pd.Series, pd.Series]]:
    """Both rows of every model and recovery that both methods have."""
    found = []
    for row in rows[(rows.method == method) & (rows.status == "ok")].itertuples():
        same = rows[(rows.method == other) & (rows.status == "ok") & (rows.model == row.model)]
        same = same[same.recovery == row.recovery]
        found += [(row, one) for one in same.itertuples()]
    return found


def _against(rows: pd.DataFrame, method: str, other: str) -> str:
    """How often one method's mean FID is lower than another's, in words."""
    pairs = _pairs(rows, method, other)
    lower = [pair for pair in pairs if pair[0].fid_mean < pair[1].fid_mean]
    told = [pair for pair in pairs if not indistinguishable(*pair)]
    better = sum(pair in lower for pair in told)
    worse = f", significantly higher in {len(told) - better}" if len(told) > better else ""
    title = rows[rows.method == other].title.iloc[0]
    return (
        f"{title}: lower in {len(lower)} of {len(pairs)} comparisons, significantly in {better}"
        f"{worse}"
    )


def _layers(matched: pd.DataFrame, as_published: pd.DataFrame) -> str:
    """Which layer selections differ from random layer masks, in words."""
    found, better, worse = 0, [], []
    for division, rows in (("", matched), (", as published", as_published)):
        own = rows[(rows.kind == "layers") & ~rows.method.isin([RANDOM["layers"], "scratch"])]
        for row in own.itertuples():
            control = _control(rows, row)
            if control is None:
                continue
            found += 1
            p, how = p_value(row, control), "no recovery" if row.recovery == "none" else row.budget
            told = f"{row.title} on `{row.model}` ({how}{division}, p = {p:.3f})"
            if p < SIGNIFICANCE:
                (better if row.fid_mean < control.fid_mean else worse).append(told)
    return (
        f"Three random layer masks scatter much. Of {found} comparisons of a layer selection with "
        f"them, {len(better)} are significant in its favour: {'; '.join(better)}; and "
        f"{len(worse)} to its disadvantage. With so many comparisons one or two are to be expected "
        "by chance. The oracle below is sharper."
    )


def _one_shot() -> str:
    """Where the mask stands that EntPruner's ranking alone picks, in words."""
    masks, places, same = pd.read_csv(RESULTS / "oracle.csv"), [], []
    for model in masks.model.unique():
        chosen = _layers_of(model, "entpruner")
        found = masks[(masks.model == model) & (masks.recovery != "none")]
        found = found[found.layers.map(lambda names: set(names.split())) == chosen].iloc[0]
        places.append(f"{found['rank']}th of {found.masks} on `{model}`")
        if chosen == _layers_of(model, "laptop_diff"):
            same.append(f"`{model}`")
    return (
        f"The mask that EntPruner's ranking picks at once is {' and '.join(places)} after "
        f"fine-tuning (on {', '.join(same)} the one that LAPTOP-Diff picks)."
    )


def _layers_of(model: str, method: str) -> set[str]:
    """What a method removes of a model without recovery, at the first seed."""
    file = RESULTS / "raw" / model / method / "0.25" / "none" / "seed0.json"
    return set(upgrade.parse(file, file.read_bytes()).plan.layers)


def _checks(rows: pd.DataFrame) -> list[str]:
    """What one would expect of any such benchmark, and how often it holds."""
    dense = rows[rows.kind == "none"].set_index("model").fid_mean
    bare = rows[(rows.recovery == "none") & ~rows.kind.isin(["none", "steps"])]
    above = (bare.fid_mean > bare.model.map(dense)).sum()
    trained = rows[(rows.recovery != "none") & (rows.kind == "layers")]
    scratch = trained[trained.method == "scratch"].set_index("model").fid_mean
    others = trained[trained.method != "scratch"]
    below = (others.fid_mean < others.model.map(scratch)).sum()
    both = rows[~rows.kind.isin(["none", "steps"])].pivot_table(
        index=["model", "method"], columns=rows.recovery == "none", values="fid_mean"
    ).dropna()  # fmt: skip
    helped = (both[False] < both[True]).sum()
    return [
        f"Without recovery {above} of {len(bare)} rows have a higher FID than dense; fine-tuning "
        f"lowers the FID of {helped} of {len(both)}.",
        f"Training the pruned shape from scratch on the recovery's images is behind {below} of "
        f"{len(others)} fine-tuned layer selections; the dense model's own budget was not given.",
    ]


def features(rows: pd.DataFrame) -> str:
    """Whose features the FIDs are of, as a sentence."""
    return f"{fid_label(rows)}: images are compared by the features of the track's own classifier."


def written() -> dict[Path, str]:
    """Every page that holds results, as it should read."""
    matched, as_published = board(), board("as_published")
    readme = ROOT / "README.md"
    blocks = {
        "features": features(matched),
        "matched": table(matched),
        "findings": findings(matched, as_published),
        "oracle": f"{placed(matched)}\n\n{_one_shot()}",
        "as_published": recipes(as_published),
        "recovery": recoveries(board("recovery")),
    }
    text = readme.read_text()
    for name, block in blocks.items():
        text = filled(text, block, name)
    pages = {readme: text}
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        pages[page] = filled(page.read_text(), compared(page.stem, matched, as_published))
    return pages


def main() -> None:
    for page, text in written().items():
        page.write_text(text)


if __name__ == "__main__":
    main()
