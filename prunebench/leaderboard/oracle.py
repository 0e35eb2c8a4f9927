"""Where a layer selection stands among all masks of its sparsity: the oracle's records, read."""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prunebench.errors import UserError
from prunebench.leaderboard.collect import Source, lookup

SCHEMA = 1
KEY = ("model", "sparsity", "recovery", "seed")
FIELDS = ("status", "cell", "layers", "masks", "exhaustive", "fid", "budget", "provenance")
FRESH = ("scratch",)  # keeps nothing of the dense model: its mask is no selection to place


@dataclass(frozen=True)
class Mask:
    """One record: a mask of the oracle and its FID (None where its training failed)."""

    content: bytes
    record: dict

    @property
    def key(self) -> tuple:
        return tuple(self.record["cell"][name] for name in KEY)

    @property
    def spent(self) -> int:
        """Images its recovery trained on; its forwards include those of sampling."""
        return self.record["budget"]["student_backward"]

    @property
    def name(self) -> str:
        model, _, recovery, seed = self.key
        return f"raw/oracle/{model}/{recovery}/seed{seed}/mask{self.record['cell']['mask']}.json"


def read(files: Iterable[Path]) -> list[Mask]:
    """Read oracle records in the order of their masks; a UserError names a file that is none."""
    masks = []
    for file in map(Path, files):
        try:
            content = file.read_bytes()
            record = json.loads(content)
            for field in FIELDS:
                lookup(record, field)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} is not a record of the oracle: {error}; delete it") from error
        masks.append(Mask(content, record))
    return sorted(masks, key=lambda mask: (*mask.key, mask.record["cell"]["mask"]))


def attach(sources: list[Source], masks: list[Mask]) -> None:
    """Say of every cell that removed layers how many masks it beats and how far the best is.

    Compared are masks of the cell's sparsity and recovery, under its own seed where the oracle has
    it, else under the oracle's first. A cell whose whole budget went into recovery is its mask: the
    mask's own FID is placed, on the same noise as the others. A method that trained while selecting
    is placed with its own FID. The mask that it chose is never among the others.
    """
    complete = _complete(masks)
    for source in sources:
        cell, metrics = source.metrics["cell"], source.metrics
        known = metrics["status"] == "ok" and metrics["labels"]["kind"] == "layers"
        if not known or cell["method"] in FRESH:
            continue
        seeds = sorted(s for *place, s in complete if place == [cell[name] for name in KEY[:3]])
        if seeds:
            seed = cell["seed"] if cell["seed"] in seeds else seeds[0]
            found = complete[(*(cell[name] for name in KEY[:3]), seed)]
            metrics["oracle"] = placed(metrics, found)


def placed(metrics: Mapping, found: list[Mask]) -> dict:
    """The share of the other masks whose FID is worse, and the distance to the best of all."""
    chosen = sorted(metrics["plan"]["layers"])
    fids = {tuple(sorted(mask.record["layers"])): mask for mask in found}
    own, fid = fids.pop(tuple(chosen), None), metrics["quality"]["fid"]
    if own and own.spent == metrics["budget"]["recovery"]["student_backward"]:
        fid = own.record["fid"]
    others = [mask.record["fid"] for mask in fids.values() if mask.record["fid"] is not None]
    best = min(mask.record["fid"] for mask in found if mask.record["fid"] is not None)
    return {"beaten": sum(o > fid for o in others) / max(1, len(others)), "gap": fid - best}


def _complete(masks: list[Mask]) -> dict[tuple, list[Mask]]:
    """The masks by key, of those places that have all that the oracle planned there."""
    groups: dict[tuple, list[Mask]] = {}
    for mask in masks:
        groups.setdefault(mask.key, []).append(mask)
    return {key: group for key, group in groups.items() if len(group) == group[0].record["masks"]}


def published(masks: list[Mask]) -> dict[str, bytes]:
    """oracle.csv, every mask with its FID, oracle.md, their distribution, and the raw records."""
    if not masks:
        return {}
    frame = table(masks)
    raw = {mask.name: mask.content for mask in masks}
    csv = frame.to_csv(index=False, lineterminator="\n").encode()
    return {"oracle.csv": csv, "oracle.md": summary(frame).encode()} | raw


def table(masks: list[Mask]) -> pd.DataFrame:
    """One line per mask: its cell, the layers it removes, its FID and its rank among its kind."""
    frame = pd.DataFrame(
        {
            **{name: mask.record["cell"][name] for name in (*KEY, "mask")},
            "layers": " ".join(mask.record["layers"]),
            "masks": mask.record["masks"],
            "exhaustive": mask.record["exhaustive"],
            "fid": mask.record["fid"],
        }
        for mask in masks
    )
    frame["rank"] = frame.groupby(list(KEY)).fid.rank(method="min").astype("Int64")
    return frame.sort_values([*KEY, "rank"])


def summary(frame: pd.DataFrame) -> str:
    """The distribution of FID over masks, and how well no recovery predicts recovery."""
    buffer = io.StringIO()
    buffer.write(
        "# Every layer mask\n\nFID of the masks of one sparsity, each run like a cell.\n\n"
        "| Model | Sparsity | Recovery | Seed | Masks | Best | Median | Worst | Best mask |\n"
        "|:---|---:|:---|---:|---:|---:|---:|---:|:---|\n"
    )
    for (model, sparsity, recovery, seed), group in frame.groupby(list(KEY)):
        fid, what = group.fid, "all" if group.exhaustive.all() else "random"
        if len(group) < group.masks.iloc[0]:
            what = f"unfinished, of {group.masks.iloc[0]}"
        best = group.loc[fid.idxmin(), "layers"] if fid.notna().any() else "—"
        buffer.write(
            f"| {model} | {sparsity:g} | {recovery} | {seed} | {len(group)} ({what}) "
            f"| {fid.min():.2f} | {fid.median():.2f} | {fid.max():.2f} | {best} |\n"
        )
    wide = frame.pivot_table(index=["model", "seed", "layers"], columns="recovery", values="fid")
    healed = [name for name in wide.columns if name != "none"]
    if "none" in wide and healed:
        buffer.write("\nSpearman correlation of a mask's FID without recovery and with it: ")
        told = [
            f"{model} {part['none'].corr(part[name], method='spearman'):.2f} ({name})"
            for model, part in wide.groupby("model")
            for name in healed
        ]
        buffer.write(", ".join(told) + ".\n")
    return buffer.getvalue()
