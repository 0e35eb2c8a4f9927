"""Whether gains add up: what several changes do together, beside what independence predicts.

Changes that know nothing of each other should add up in FID and multiply in time. FID is a squared
distance between distributions of features, and squares of displacements in unrelated directions add
up (Pythagoras); its bias at a number of images, the same in every cell, cancels in the interaction.

Interaction of FID: joint - sum of singles + (k - 1) * origin, of k changes; of times the same in
logarithms. Cells with one seed share noise and calibration data, so it is taken seed by seed, and
its interval is Student's over seeds; over means of dense trainings where there are several.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from prunebench.leaderboard.collect import ROW, first_precision
from prunebench.leaderboard.measures import MEASURES
from prunebench.leaderboard.tables import number, percent
from prunebench.leaderboard.writers import (
    NOTHING,
    Column,
    Document,
    Table,
    plain_lines,
    to_csv,
    to_markdown,
)
from prunebench.tracks.cells import DEFAULT, PRECISIONS, RECIPE

CONFIDENCE = 0.95
ROUNDING = 1e-9  # relative: an interaction of less is that of the last bits
PLAIN = "finetune"  # the recovery without a teacher, which a distillation replaces
KEY = [name for name in ROW if name not in ("model", "dense_seed")]
UNIT = ["dense_seed", "seed"]
Key = tuple[str, float, str, str, str]


@dataclass(frozen=True)
class Interaction:
    """A measured number beside the prediction, and by how much it is off, with an interval.

    Attributes:
        value: measured minus predicted, or over it.
        low, high: of the interval; NaN with one seed.
        neutral: what `value` is where the changes are independent: 0, or 1 of a ratio.
        units: seeds, or dense trainings, that the interval is over.
    """

    measured: float
    predicted: float
    value: float
    low: float
    high: float
    neutral: float
    units: int

    @property
    def told(self) -> bool:
        """Whether the interval excludes independence."""
        size = ROUNDING * max(abs(self.measured), abs(self.predicted))
        outside = self.low > self.neutral or self.high < self.neutral
        return outside and abs(self.value - self.neutral) > size


@dataclass(frozen=True)
class Together:
    """Changes of one model that were measured alone and together.

    Attributes:
        changes: in words, pruning or distillation instead of fine-tuning before the others.
        time: of sampling, over the dense model's; None where no change can be one of it.
    """

    model: str
    changes: tuple[str, ...]
    fid: Interaction
    time: Interaction | None

    @property
    def name(self) -> str:
        return " + ".join(self.changes)


def found(cells: pd.DataFrame) -> list[Together]:
    """Every combination of a board's cells whose parts were measured too, on common seeds."""
    ok = cells[(cells.status == "ok") & (cells.kind != "steps")]
    made = []
    for model, own in ok.groupby("model", sort=False):
        values = {key: part.set_index(UNIT) for key, part in own.groupby(KEY)}
        titles = own.drop_duplicates("method").set_index("method")
        dense = [name for name in titles.index if titles.kind[name] == "none"]
        if dense:
            base = (dense[0], 0.0, "none", first_precision(cells), DEFAULT)
            keys = sorted(values, key=lambda key: (key[:3] != base[:3], *key[:3], _order(key)))
            asked = _asked(keys, base, titles.title)
            made += [_together(model, values, *parts) for parts in asked]
    return [one for one in made if one is not None]


# ---- which cells belong together


def _order(key: Key) -> tuple[str, int]:
    """Single changes first: by sampling, then by precision."""
    return "" if key[4] == DEFAULT else key[4], PRECISIONS.index(key[3])


def _asked(
    keys: Sequence[Key], base: Key, titles: Mapping[str, str]
) -> Iterator[tuple[Key, dict[str, Key], Key]]:
    """(origin, single changes by their words, all of them together); distillations last."""
    changed = [key for key in keys if key[3:] != base[3:]]
    words = {key: f"{titles[key[0]]} {percent(key[1])}, {key[2]}" for key in changed}
    for key in changed:
        pruned = {} if key[:3] == base[:3] else {words[key]: (*key[:3], *base[3:])}
        if len(singles := pruned | _others(base[:3], key, base)) > 1:
            yield base, singles, key
    for key in changed:
        if (plain := _plain(key[:3])) in {known[:3] for known in keys}:
            distilled = {f"{words[key]} instead of {plain[2]}": (*key[:3], *base[3:])}
            yield (*plain, *base[3:]), distilled | _others(plain, key, base), key


def _others(row: tuple, key: Key, base: Key) -> dict[str, Key]:
    """Precision and sampling of a key that are not the base's, each alone on a row."""
    changed = {}
    for place in (3, 4):
        if key[place] != base[place]:
            alone = [*row, *base[3:]]
            alone[place] = key[place]
            changed[key[place]] = tuple(alone)
    return changed


def _plain(row: tuple) -> tuple | None:
    """The same row fine-tuned on the budget of its distillation."""
    module, _, budget = row[2].rpartition("-")
    return None if module in ("", PLAIN, RECIPE) else (*row[:2], f"{PLAIN}-{budget}")


# ---- arithmetic


def _together(
    model: str, values: Mapping[Key, pd.DataFrame], origin: Key, singles: dict[str, Key], joint: Key
) -> Together | None:
    """None where a part was not measured on any common seed."""
    parts = [joint, *singles.values(), origin]
    if any(key not in values for key in parts):
        return None

    def table(name: str) -> pd.DataFrame:
        columns = {str(place): values[key][name] for place, key in enumerate(parts)}
        return pd.DataFrame(columns).dropna()

    fid, times = table("fid"), 1 / table("speedup")
    if fid.empty:
        return None
    changed = times.iloc[:, 1].ne(times.iloc[:, -1]).any()  # not by a recovery, but for its steps
    time = interaction(times, ratio=True) if changed else None
    return Together(model, tuple(singles), interaction(fid), time)


def interaction(parts: pd.DataFrame, ratio: bool = False) -> Interaction:
    """Of a table of seeds by cells: the joint one, the single changes, and their origin last.

    Args:
        ratio: changes multiply instead of adding up; values are positive.
    """
    content = np.log(parts) if ratio else parts
    joint, singles, origin = content.iloc[:, 0], content.iloc[:, 1:-1], content.iloc[:, -1]
    expected = singles.sum(axis=1) - (singles.shape[1] - 1) * origin
    trainings = content.index.get_level_values("dense_seed")
    level = ["dense_seed"] if trainings.nunique() > 1 else UNIT
    joint, expected = (part.groupby(level=level).mean() for part in (joint, expected))
    gaps, back = joint - expected, math.exp if ratio else float
    middle, half = gaps.mean(), _half_width(gaps.to_numpy())
    return Interaction(
        measured=back(joint.mean()),
        predicted=back(expected.mean()),
        value=back(middle),
        low=back(middle - half),
        high=back(middle + half),
        neutral=back(0.0),
        units=len(gaps),
    )


def _half_width(values: np.ndarray) -> float:
    """Half of Student's interval of a mean; NaN of a single value."""
    count = len(values)
    if count < 2:
        return math.nan
    quantile = student.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(quantile * values.std(ddof=1) / math.sqrt(count))


# ---- in words


def sentences(all_: Sequence[Together]) -> list[str]:
    """Which pairs help or hurt each other, and how many of how many intervals say so.

    More than two changes together have the interactions of their pairs, and are only tabulated.
    """
    pairs = [one for one in all_ if len(one.changes) == 2]
    told = [text for one in pairs for text in (_of_fid(one), _of_time(one)) if text]
    count = sum(math.isfinite(i.low) for one in pairs for i in (one.fid, one.time) if i)
    chance = (1 - CONFIDENCE) * count
    if not count:
        return ["No pair has an interval: that takes two seeds."]
    summary = (
        f"{len(told)} of {count} intervals of pairs exclude independence; of independent changes "
        f"about {chance:.1f} would by chance."
    )
    return [summary, *told]


def _of_fid(one: Together) -> str:
    """Whether images are better or worse than predicted; "" where the interval does not say."""
    if not one.fid.told:
        return ""
    verb = "help" if one.fid.value < 0 else "hurt"
    measured, predicted = _fid(one.fid.measured), _fid(one.fid.predicted)
    return (
        f"{one.model}: {_listed(one.changes)} {verb} each other: FID {measured} where independence "
        f"predicts {predicted} ({_interval(one.fid, '+.2f')})."
    )


def _of_time(one: Together) -> str:
    if one.time is None or not one.time.told:
        return ""
    verb = "less" if one.time.value < 1 else "more"
    return (
        f"{one.model}: {_listed(one.changes)} take {verb} time together than independence "
        f"predicts: {one.time.measured:.2f} of dense, not {one.time.predicted:.2f} "
        f"(ratio {_interval(one.time, '.2f')})."
    )


def _listed(words: Sequence[str]) -> str:
    *first, last = (f"“{word}”" if "," in word else word for word in words)
    return f"{', '.join(first)} and {last}"


def _fid(value: float) -> str:
    return number(MEASURES["fid"], value)


def _interval(of: Interaction, form: str) -> str:
    if math.isnan(of.low):
        return f"{of.value:{form}}"
    return f"{of.value:{form}} [{of.low:{form}}, {of.high:{form}}]"


def _timed(read: Callable[[Interaction], str]) -> Callable[[Together], str]:
    return lambda one: NOTHING if one.time is None else read(one.time)


COLUMNS = (
    Column("Model", lambda one: one.model, False),
    Column("Together", lambda one: one.name, False),
    Column("FID", lambda one: _fid(one.fid.measured)),
    Column("predicted", lambda one: _fid(one.fid.predicted)),
    Column("difference [95 %]", lambda one: _interval(one.fid, "+.2f")),
    Column("Time (× dense)", _timed(lambda time: f"{time.measured:.2f}")),
    Column("predicted", _timed(lambda time: f"{time.predicted:.2f}")),
    Column("ratio [95 %]", _timed(lambda time: _interval(time, ".2f"))),
    Column("Seeds", lambda one: f"{one.fid.units}"),
)
LEGEND = (
    "FID: of the combination, beside the sum of what its parts change alone; below 0 they help "
    "each other, above 0 they hurt. Help is no advice: what is spoilt can't get much worse.",
    "Time: of sampling one image, over the dense model's in the track's first precision and with "
    "the model's own sampling, beside the product of the parts' ratios.",
    "Intervals: 95 %, Student's over seeds (over means of dense trainings where there are "
    "several), not corrected for their number. Three changes have the interactions of their pairs.",
    "Distillation is compared with fine-tuning on the same budget, on the pruned model: the dense "
    "model is never trained again. It changes times only where it leaves fewer steps.",
)


def document(all_: Sequence[Together], fid: str) -> Document:
    """The table with its sentences; `fid` says whose features quality is of."""
    return Document(
        title="Do the gains add up?",
        tables=[Table("Measured and predicted", COLUMNS, plain_lines(COLUMNS, all_))],
        conditions={"Quality": fid},
        legend=[*sentences(all_), *LEGEND],
    )


def frame(all_: Sequence[Together]) -> pd.DataFrame:
    """One line per combination at full precision."""
    parts = ("measured", "predicted", "value", "low", "high")
    lines = []
    for one in all_:
        line: dict[str, object] = {"model": one.model, "together": one.name}
        for name, of in (("fid", one.fid), ("time", one.time)):
            line |= {f"{name}_{part}": getattr(of, part, math.nan) for part in parts}
        lines.append(line | {"units": one.fid.units})
    return pd.DataFrame(lines)


def published(all_: Sequence[Together], fid: str) -> dict[str, bytes]:
    """combinations.csv and combinations.md; nothing where nothing was combined."""
    if not all_:
        return {}
    texts = {
        "combinations.csv": to_csv(frame(all_)),
        "combinations.md": to_markdown(document(all_, fid)),
    }
    return {name: text.encode() for name, text in texts.items()}
