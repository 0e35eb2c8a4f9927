"""Where a layer selection stands among all masks of its sparsity: the oracle's records, read."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prunebench.errors import UserError
from prunebench.leaderboard.collect import Source, lookup

SCHEMA = 1
KEY = ("model", "sparsity", "recovery", "seed")
FIELDS = ("status", "cell", "layers", "masks", "exhaustive", "fid", "provenance")


@dataclass(frozen=True)
class Mask:
    """One record: a mask of the oracle and its FID (None where its training failed)."""

    content: bytes
    record: dict

    @property
    def key(self) -> tuple:
        return tuple(self.record["cell"][name] for name in KEY)

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

    A cell is compared with masks healed in the same way on the same sampling noise: those of its
    own seed, where the oracle has it, else of the oracle's first. Its own mask does not count.
    """
    fids = _by_key(masks)
    for source in sources:
        cell, metrics = source.metrics["cell"], source.metrics
        if metrics["status"] != "ok" or metrics["labels"]["kind"] != "layers":
            continue
        seeds = sorted(s for *place, s in fids if place == [cell[name] for name in KEY[:3]])
        if seeds:
            seed = cell["seed"] if cell["seed"] in seeds else seeds[0]
            others = fids[(*(cell[name] for name in KEY[:3]), seed)]
            metrics["oracle"] = placed(metrics["quality"]["fid"], others)


def placed(fid: float, others: list[float]) -> dict:
    """The share of the masks with another FID that are worse, and the distance to the best."""
    different = [other for other in others if other != fid]
    worse = sum(other > fid for other in different)
    return {"beaten": worse / max(1, len(different)), "gap": fid - min(others)}


def _by_key(masks: list[Mask]) -> dict[tuple, list[float]]:
    fids: dict[tuple, list[float]] = {}
    for mask in masks:
        if mask.record["fid"] is not None:
            fids.setdefault(mask.key, []).append(mask.record["fid"])
    return fids


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
