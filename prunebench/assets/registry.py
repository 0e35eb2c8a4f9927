"""The registry: `registry.yaml` as typed, checked entries."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from prunebench.errors import UserError

REGISTRY = Path(__file__).with_name("registry.yaml")
HUB = "https://huggingface.co"
KINDS = ("dataset", "original", "checkpoint", "extractor", "reference")


@dataclass(frozen=True)
class File:
    """One file of an asset.

    Attributes:
        path: where it lies below the mirror folder and the cache folder.
        sources: addresses of this very file; of it gzipped where an address alone ends in ".gz".
        sha256: published hash in hexadecimal; its first digits where no more is published.
        md5: published MD5, where no SHA-256 is.
        size: bytes.
    """

    path: str
    sources: tuple[str, ...] = ()
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None

    @property
    def whole(self) -> bool:
        """Whether what is published fixes the content: a full SHA-256, not its first digits."""
        return self.sha256 is not None and len(self.sha256) == 64

    @property
    def checksum(self) -> tuple[str, str] | None:
        """(algorithm, hexadecimal digest or its first digits), None if none is published."""
        if self.sha256:
            return "sha256", self.sha256
        return ("md5", self.md5) if self.md5 else None


@dataclass(frozen=True)
class Asset:
    """Something from outside: one file, or the files of the folder `name`.

    Attributes:
        home: the page of its authors.
        by_hand: why it has to be placed by hand and how it is had; "" if it can be downloaded.
        packaged: whether it ships with the package.
        made_from: originals a data set can be made of -> name of the conversion.
        alternatives: assets that serve as well where this one is absent.
        shape, classes: (C, H, W) of a data set's images, and how many labels there are, so that
            drawing others like them needs no file. Sets with captions have no classes.
        images: how many it has for training and as reference, as published.
        captions: of a data set's classes, in their order, for models that read text.
    """

    name: str
    kind: str
    description: str
    licence: str
    home: str
    files: tuple[File, ...]
    by_hand: str = ""
    packaged: bool = False
    made_from: Mapping[str, str] | None = None
    alternatives: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    images: tuple[int, ...] | None = None
    captions: tuple[str, ...] = ()

    @property
    def size(self) -> int | None:
        """Bytes of all files, None if one of them is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(sizes)

    @property
    def downloadable(self) -> bool:
        return not self.by_hand and all(file.sources for file in self.files)


def _file(asset: str, content: Mapping | str, count: int, hub: str | None) -> File:
    entry = {"path": content} if isinstance(content, str) else dict(content)
    own = entry["path"]
    sources = entry.pop("from", [f"{hub}/{own}"] if hub else [])
    path = f"{asset}/{own}" if count > 1 else own
    return File(**{**entry, "path": path, "sources": tuple(sources)})


def _asset(name: str, content: Mapping) -> Asset:
    entry = dict(content)
    repository, revision = entry.pop("hub", None), entry.pop("revision", None)
    hub = f"{HUB}/{repository}/resolve/{revision}" if repository else None
    listed, alternatives = entry.pop("files"), tuple(entry.pop("or", ()))
    files = tuple(_file(name, file, len(listed), hub) for file in listed)
    lists = {key: tuple(entry.pop(key)) for key in ("shape", "images", "captions") if key in entry}
    return Asset(name=name, files=files, alternatives=alternatives, **lists, **entry)


def read(path: Path) -> dict[str, Asset]:
    """The entries of a registry file by name."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(path.read_text(), Loader=loader)
    return {name: _asset(name, entry) for name, entry in content.items()}


ASSETS = read(REGISTRY)


def asset(name: str) -> Asset:
    """The registry's entry `name`; UserError with the known names if there is none."""
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}; known are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def data_set(name: str) -> Asset:
    """The registry's entry of a data set; UserError if it is something else."""
    if asset(name).shape is None:
        known = ", ".join(sorted(entry.name for entry in ASSETS.values() if entry.shape))
        raise UserError(f"dataset.name: '{name}' is not a data set; known are {known}")
    return asset(name)


def pinned(wanted: Asset) -> bool:
    """Whether every file's content is fixed: by a checksum, or by the commit of a hub."""
    return all(file.checksum or _commit(file) for file in wanted.files)


def _commit(file: File) -> bool:
    return any(re.search(r"/resolve/[0-9a-f]{40}/", source) for source in file.sources)
