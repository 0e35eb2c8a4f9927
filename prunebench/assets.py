"""Everything the suite needs from outside: where it comes from, its hash, its licence.

A file is looked for in the mirror folder (air-gapped machines), then in the cache, then among the
files shipped with the package, and is never used before its SHA-256 has been verified.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from prunebench.artefacts import sha256
from prunebench.errors import UserError

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Asset:
    """One file from outside.

    `file` is its name in the mirror folder, in the cache and in the package; `sources` are the
    public addresses of the original, which may be compressed, while `sha256` is of `file` itself.
    `shape` (C, H, W) and `classes` are of a data set's images, so that drawing others like them
    needs no file.
    """

    name: str
    description: str
    file: str
    sha256: str
    licence: str
    sources: tuple[str, ...]
    needed_by: str
    packaged: bool = False
    shape: tuple[int, int, int] | None = None
    classes: int | None = None


def _fashion_mnist(file: str, sha256: str) -> Asset:
    return Asset(
        name=f"fashion_mnist/{file}",
        description="original Fashion-MNIST file, decompressed",
        file=file,
        sha256=sha256,
        licence="MIT (Zalando Research)",
        sources=(
            f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{file}.gz",
            f"https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{file}.gz",
        ),
        needed_by="scripts/build_fashion_mnist_16.py",
    )


_REGISTRY = (
    Asset(
        name="fashion_mnist_16",
        description="Fashion-MNIST, area-averaged to 16x16: 20,000 training, 10,000 test images",
        file="fashion_mnist_16.npz",
        sha256="7992ba25e7dd12cf7da7c78acfa6fdd21727fae4eac975c29ca725b4a76aaa39",
        licence="MIT (Zalando Research)",
        sources=("https://github.com/zalandoresearch/fashion-mnist",),
        needed_by="track embedded",
        packaged=True,
        shape=(1, 16, 16),
        classes=10,
    ),
    _fashion_mnist(
        "train-images-idx3-ubyte",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    _fashion_mnist(
        "train-labels-idx1-ubyte",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    _fashion_mnist(
        "t10k-images-idx3-ubyte",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    _fashion_mnist(
        "t10k-labels-idx1-ubyte",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    Asset(
        name="inception_pool3",
        description="FID Inception (2015-12-05) up to pool3, in torch-fidelity's layout; no logits",
        file="weights-inception-2015-12-05-pool3-only.pth",
        sha256="1e331cc8ca5035d08672fc191e0942925f4f9e20e45b44e1ebf6f84a5c89444a",
        licence="Apache-2.0",
        sources=("https://github.com/toshas/torch-fidelity/releases (with logits)",),
        needed_by="extractor inception-v3-compat",
    ),
    Asset(
        name="lpips-alex",
        description="AlexNet convolutions in torchvision's layout, the backbone of LPIPS (alex)",
        file="alexnet-features.pth",
        sha256="32f45cf71e6147af08382a6a04e5f8255c3da364697454151048598d3031dc08",
        licence="BSD-3-Clause",
        sources=("https://github.com/pytorch/vision (AlexNet_Weights.IMAGENET1K_V1)",),
        needed_by="evaluation.lpips alex",
    ),
    Asset(
        name="lpips-vgg",
        description="VGG-16 convolutions in torchvision's layout, the backbone of LPIPS (vgg)",
        file="vgg16-features.pth",
        sha256="4e3df3e0774d91f6bb067efcd39c17f1c57314f84370963b86bae02b2d187dc6",
        licence="CC BY 4.0 (VGG, University of Oxford)",
        sources=("https://github.com/pytorch/vision (VGG16_Weights.IMAGENET1K_V1)",),
        needed_by="evaluation.lpips vgg",
    ),
)
ASSETS = {asset.name: asset for asset in _REGISTRY}


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, C, R, R] and labels int64 [N]; the reference images are held out."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    reference_images: torch.Tensor
    reference_labels: torch.Tensor


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


def locate(name: str, mirror: Path | None = None) -> Path:
    """Path of the verified file of asset `name`.

    Args:
        name: a key of ASSETS.
        mirror: folder searched first; default the environment variable PRUNEBENCH_MIRROR.

    Raises:
        UserError: unknown asset, no file, or the first file found has another hash. A wrong file is
            never passed over in silence: whoever put it there believes that it is in use.
    """
    wanted = asset(name)
    places = _places(wanted, mirror)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"asset {name} was not found. {_by_hand(wanted, places)}")
    status = path.stat()
    found = _verified_once(path, status.st_mtime_ns, status.st_size)
    if found != wanted.sha256:
        raise UserError(
            f"asset {name}: {path} is not the expected file, its sha256 is {found}; "
            f"delete it. {_by_hand(wanted, places)}"
        )
    return path


def _places(wanted: Asset, mirror: Path | None) -> list[Path]:
    mirror = mirror or os.environ.get("PRUNEBENCH_MIRROR")
    cache_folder = os.environ.get("PRUNEBENCH_CACHE") or Path.home() / ".cache" / "prunebench"
    folders = [mirror, cache_folder, DATA if wanted.packaged else None]
    return [Path(folder) / wanted.file for folder in folders if folder]


def _by_hand(wanted: Asset, places: list[Path]) -> str:
    return (
        f"It is needed by {wanted.needed_by}: {wanted.description}, licence {wanted.licence}, from "
        f"{' or '.join(wanted.sources)}. Put the file with sha256 {wanted.sha256} at "
        f"{' or '.join(map(str, places))}, or name the folder that holds it in PRUNEBENCH_MIRROR."
    )


@cache
def _verified_once(path: Path, mtime_ns: int, size: int) -> str:
    """Hash of `path`, computed again only when the file changes (the other two arguments)."""
    return sha256(path)


def load_dataset(
    name: str,
    limit_train: int | None = None,
    limit_reference: int | None = None,
    mirror: Path | None = None,
) -> Dataset:
    """Load an image data set; the limits keep the first so many images (smoke tracks, tests).

    Raises:
        UserError: as `locate`; not a data set; or a limit that the data set cannot give.
    """
    path = locate(name, mirror)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    except (ValueError, BadZipFile) as error:
        raise UserError(f"asset {name} ({path}) is not a data set: {error}") from error
    return Dataset(
        *_prefix(arrays, "train", limit_train), *_prefix(arrays, "reference", limit_reference)
    )


def _prefix(arrays: dict, split: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    count = len(images) if limit is None else limit
    if not 1 <= count <= len(images):
        raise UserError(f"limit_{split} is {count}, but the data set has 1 to {len(images)} images")
    if images.ndim == 3:  # grey images are stored without their channel
        images = images[:, None]
    return images[:count].clone(), labels[:count].long()
