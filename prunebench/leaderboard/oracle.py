"""Where a layer selection stands among all masks of its sparsity: the oracle's records, read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prunebench.errors import UserError
from prunebench.leaderboard.collect import CELL, Source, content_of, dense_folder
from prunebench.leaderboard.writers import (
    NOTHING,
    Column,
    Document,
    Table,
    plain_lines,
    to_csv,
    to_markdown,
)
from prunebench.records import sealed, upgrade
from prunebench.records.schema import Oracle, Score
from prunebench.tracks.cells import DEFAULT, PRECISIONS

PLACE = ("model", "dense_seed", "sparsity", "recovery")  # whose masks are compared, under one seed
KEY = (*PLACE, "seed")
FRESH = ("scratch",)  # keeps nothing of the dense model: its mask is no selection to place


@dataclass(frozen=True)
class Mask:
    """One record: a mask of the oracle and its FID (None where its training failed)."""

    content: bytes
    record: Oracle

    @property
    def key(self) -> tuple:
        return tuple(getattr(self.record.identity, name) for name in KEY)

    @property
    def fid(self) -> float | None:
        return self.record.fid.value

    @property
    def name(self) -> str:
        own = self.record.identity
        seed = dense_folder(own.dense_seed)
        return f"raw/oracle/{own.model}/{seed}{own.recovery}/seed{own.seed}/mask{own.mask}.json"


def read(files: Iterable[Path], older: bool = False) -> list[Mask]:
    """Read oracle records in the order of their masks; a UserError names a file that is none.

    Args:
        older: whether records of schema 1, which nothing seals, are read too.
    """
    masks = []
    for file in map(Path, files):
        content = content_of(file)
        record = (upgrade if older else sealed).parse(file, content)
        if not isinstance(record, Oracle):
            raise UserError(f"{file} is the record of {record.identity}, not of a mask; delete it")
        masks.append(Mask(content, record))
    return sorted(masks, key=lambda mask: (*mask.key, mask.record.identity.mask))


def _check_comparable(scores: Iterable[Score], masks: list[Mask]) -> None:
    found = {score.extractor.sha256 for score in scores}
    for mask in masks:
        if found and mask.record.extractor not in found:
            raise UserError(
                f"{mask.record.identity} was scored with another feature extractor "
                f"({mask.record.extractor[:8]}) than the cells; delete its record and run again"
            )


def attached(cells: pd.DataFrame, sources: list[Source], masks: list[Mask]) -> pd.DataFrame:
    """`cells` with how many masks each beats and how far the best is.

    Compared are masks of the cell's sparsity and recovery, under its own seed where the oracle has
    it, else under the oracle's first. What is placed is the selection: the FID of the mask that the
    cell chose, on the same noise and after the same recovery as the others. How else the cell was
    trained, in stages say, is told by its own FID, which is placed only where the oracle lacks the
    mask. The mask is never among the others.
    """
    cells, complete = cells.copy(), _complete(masks)
    known = {source.key: source.record for source in sources if isinstance(source.record, Score)}
    _check_comparable(known.values(), masks)
    used = {score.identity.precision for score in known.values()}
    drawn = (min(used, key=PRECISIONS.index, default=PRECISIONS[0]), DEFAULT)  # as masks are
    for index, cell in cells.iterrows():
        score = known.get(tuple(cell[CELL]))
        alike = score and (score.identity.precision, score.identity.sampling) == drawn
        found = _masks_for(score, complete) if alike else []
        if found:
            cells.loc[index, ["oracle_beaten", "oracle_gap"]] = placed(score, found)
    return cells


def _masks_for(score: Score, complete: dict[tuple, list[Mask]]) -> list[Mask]:
    own = score.identity
    if score.labels.kind != "layers" or score.plan.copies or own.method in FRESH:
        return []
    place = tuple(getattr(own, name) for name in PLACE)
    seeds = sorted(seed for *where, seed in complete if tuple(where) == place)
    if not seeds:
        return []
    return complete[(*place, own.seed if own.seed in seeds else seeds[0])]


def placed(score: Score, found: list[Mask]) -> tuple[float, float]:
    """The share of the other masks whose FID is worse, and the distance to the best of all."""
    masks = {tuple(sorted(mask.record.layers)): mask for mask in found}
    own, fid = masks.pop(tuple(sorted(score.plan.layers)), None), score.quality["fid"].value
    if own and own.fid is not None:
        fid = own.fid
    others = [mask.fid for mask in masks.values() if mask.fid is not None]
    best = min((mask.fid for mask in found if mask.fid is not None), default=math.nan)
    return sum(other > fid for other in others) / max(1, len(others)), fid - best


def _complete(masks: list[Mask]) -> dict[tuple, list[Mask]]:
    """The masks by key, of those places that have all that the oracle planned there."""
    groups: dict[tuple, list[Mask]] = {}
    for mask in masks:
        groups.setdefault(mask.key, []).append(mask)
    return {key: group for key, group in groups.items() if len(group) == group[0].record.masks}


def published(masks: list[Mask], fid: str) -> dict[str, bytes]:
    """oracle.csv, every mask with its FID, oracle.md, their distribution, and the raw records.

    Args:
        fid: FID and whose features it is of.
    """
    if not masks:
        return {}
    frame = table(masks)
    raw = {mask.name: mask.content for mask in masks}
    texts = {"oracle.csv": to_csv(frame), "oracle.md": to_markdown(summary(frame, fid))}
    return {name: text.encode() for name, text in texts.items()} | raw


def table(masks: list[Mask]) -> pd.DataFrame:
    """One line per mask: its cell, the layers it removes, its FID and its rank among its kind."""
    frame = pd.DataFrame(
        {
            **{name: getattr(mask.record.identity, name) for name in (*KEY, "mask")},
            "layers": " ".join(mask.record.layers),
            "masks": mask.record.masks,
            "exhaustive": mask.record.exhaustive,
            "fid": mask.fid,
        }
        for mask in masks
    ).astype({"fid": float})
    frame["rank"] = frame.groupby(list(KEY)).fid.rank(method="min").astype("Int64")
    return frame.sort_values([*KEY, "rank"])


def _kind(masks: pd.DataFrame) -> str:
    what = "all" if masks.exhaustive.all() else "random"
    if len(masks) < masks.masks.iloc[0]:
        what = f"unfinished, of {masks.masks.iloc[0]}"
    return f"{len(masks)} ({what})"


def _best(masks: pd.DataFrame) -> str:
    return masks.loc[masks.fid.idxmin(), "layers"] if masks.fid.notna().any() else NOTHING


COLUMNS = (
    Column("Model", lambda masks: masks.model.iloc[0], False),
    Column("Dense seed", lambda masks: f"{masks.dense_seed.iloc[0]}"),
    Column("Sparsity", lambda masks: f"{masks.sparsity.iloc[0]:g}"),
    Column("Recovery", lambda masks: masks.recovery.iloc[0], False),
    Column("Seed", lambda masks: f"{masks.seed.iloc[0]}"),
    Column("Masks", _kind),
    Column("Best", lambda masks: f"{masks.fid.min():.2f}"),
    Column("Median", lambda masks: f"{masks.fid.median():.2f}"),
    Column("Worst", lambda masks: f"{masks.fid.max():.2f}"),
    Column("Best mask", _best, False),
)


def summary(frame: pd.DataFrame, fid: str) -> Document:
    """The distribution of FID over masks, and how well no recovery predicts recovery."""
    groups = [group for _, group in frame.groupby(list(KEY))]
    return Document(
        title="Every layer mask",
        tables=[Table("Distribution", COLUMNS, plain_lines(COLUMNS, groups))],
        conditions={"Quality": fid},
        legend=["FID of the masks of one sparsity, each run like a cell.", *_correlations(frame)],
    )


def _correlations(frame: pd.DataFrame) -> list[str]:
    own = ["model", "dense_seed", "seed", "layers"]
    wide = frame.pivot_table(index=own, columns="recovery", values="fid")
    recovered = [name for name in wide.columns if name != "none"]
    if "none" not in wide or not recovered:
        return []
    told = [
        f"{model} {part['none'].corr(part[name], method='spearman'):.2f} ({name})"
        for model, part in wide.groupby("model")
        for name in recovered
    ]
    words = "Spearman correlation of a mask's FID without recovery and with it"
    return [f"{words}: {', '.join(told)}."]
