"""Data sets in the suite's layout: an npz file of uint8 images and labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from prunebench.assets.store import locate
from prunebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, C, R, R] and labels int64 [N].

    The reference images are held out, unless the track judges against the training images. `flip`
    says whether training images are mirrored left to right with probability one half.
    """

    train_images: "Tensor"
    train_labels: "Tensor"
    reference_images: "Tensor"
    reference_labels: "Tensor"
    flip: bool = False


def load_dataset(
    name: str,
    limit_train: int | None = None,
    limit_reference: int | None = None,
    reference: str = "held_out",
    mirror: Path | None = None,
    flip: bool = False,
) -> Dataset:
    """Load an image data set.

    Args:
        name: an asset of kind "dataset".
        limit_train, limit_reference: keep the first so many images (smoke tracks, tests).
        reference: "held_out", or "train": the images that generated ones are compared with are the
            training images, as in the published FIDs of CIFAR-10 and CelebA.
        flip: handed on; the images that are returned are not mirrored.

    Raises:
        UserError: as `locate`; not a data set; or a limit that the data set cannot give.
    """
    arrays = _arrays(name, locate(name, mirror))
    judged = {"held_out": "reference", "train": "train"}[reference]
    return Dataset(
        *_prefix(arrays, "train", "train", limit_train),
        *_prefix(arrays, "reference", judged, limit_reference),
        flip,
    )


def _arrays(name: str, path: Path) -> "dict[str, Tensor]":
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}
    except (ValueError, BadZipFile) as error:
        raise UserError(f"asset {name} ({path}) is not a data set: {error}") from error


def _prefix(arrays: dict, key: str, split: str, limit: int | None) -> "tuple[Tensor, Tensor]":
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    count = len(images) if limit is None else limit
    if not 1 <= count <= len(images):
        raise UserError(f"limit_{key} is {count}, but the data set has 1 to {len(images)} images")
    if images.ndim == 3:  # grey images are stored without their channel
        images = images[:, None]
    return images[:count].clone(), labels[:count].long()
