"""COCO: annotations, training and validation pictures, three archives of one year."""

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prunebench.assets.datasets import CAPTIONED, REFERENCE_SIDE, captioned

YEARS = ("2014", "2017")


def read(files: Sequence[Path]) -> dict[str, np.ndarray]:
    annotations, *archives = files
    (year,) = [year for year in YEARS if year in annotations.name]
    names, arrays = [path.name for path in archives], {}
    with zipfile.ZipFile(annotations) as archive:
        told = {
            split: json.loads(archive.read(f"annotations/captions_{split}{year}.json"))
            for split in ("train", "val")
        }
    for split, theirs in (("train", "train"), ("reference", "val")):
        captions = _first_captions(told[theirs])
        path = archives[theirs == "val"]
        places = _stored(path)
        pictures = [f"{theirs}{year}/{name}" for name in captions]
        found = [places[name] for name in pictures]
        arrays |= captioned(split, [path.name], [(0, *place) for place in found], captions)
    if len({path.parent for path in archives}) > 1:
        raise ValueError(f"{' and '.join(names)} lie in different folders")
    root = np.array(str(archives[0].parent.resolve()))
    return {"root": root, "side": np.array(CAPTIONED), "reference_side": np.array(REFERENCE_SIDE),
            **arrays}  # fmt: skip


def _first_captions(content: Mapping) -> dict[str, str]:
    """File name -> the caption of lowest id, in the order of the pictures' ids."""
    first: dict[int, str] = {}
    for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
        first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
    pictures = sorted(content["images"], key=lambda entry: entry["id"])
    return {entry["file_name"]: first[entry["id"]] for entry in pictures if entry["id"] in first}


def _stored(path: Path) -> dict[str, tuple[int, int]]:
    """Member -> (offset, size) of an archive whose members are stored as they are."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as handle:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed; unpack and store it again")
            handle.seek(member.header_offset + 26)  # lengths of name and extra field; then these
            lengths = sum(struct.unpack("<HH", handle.read(4)))
            places[member.filename] = (member.header_offset + 30 + lengths, member.file_size)
    return places
