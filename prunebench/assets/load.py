"""Loading a data set, an npz file of uint8 images and labels.

In place of images there may be pictures that are decoded when they are asked for (`Pictures`): in
the file itself, or an index of where they lie.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prunebench.assets.registry import asset
from prunebench.assets.store import locate
from prunebench.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from prunebench.assets.pictures import Pictures


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, C, R, R] and labels int64 [N].

    The reference images are held out, unless the track compares with the training images or with a
    published reference. Such a one may bring `statistics` of its own, of more images than it has:
    mean [D] and covariance [D, D] of Inception's features.
    `flip` says whether training images are mirrored left to right with probability one half.
    Label i of an image is the i-th caption: of that image, or of its class where the registry has
    captions of classes. Without either both are empty.
    """

    train_images: "Tensor | Pictures"
    train_labels: "Tensor"
    reference_images: "Tensor | Pictures"
    reference_labels: "Tensor"
    flip: bool = False
    statistics: "tuple[Tensor, Tensor] | None" = None
    train_captions: tuple[str, ...] = ()
    reference_captions: tuple[str, ...] = ()


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
        reference: what generated images are compared with: "held_out"; "train", the training
            images, as in the published FIDs of CIFAR-10 and CelebA; or an asset of kind
            "reference", a batch in ADM's format.
        flip: handed on; the images that are returned are not mirrored.

    Raises:
        UserError: as `locate`; not a data set; or a limit that the data set cannot give.
    """
    from prunebench.assets.npz import read_npz

    arrays = read_npz(name, locate(name, mirror))
    train, statistics = _split(arrays, "train", limit_train), None
    split = {"held_out": "reference", "train": "train"}.get(reference)
    if split is None:
        seen, statistics = _published(reference, locate(reference, mirror), limit_reference)
    elif {f"{split}_images", f"{split}_pictures"} & set(arrays) or (
        split == "reference" and "reference_files" in arrays
    ):
        seen = _split(arrays, split, limit_reference, "reference")
    else:
        raise UserError(f"dataset.reference: {name} has no '{reference}' images; name an asset")
    told = _captions(arrays, "train", train[0]), _captions(arrays, split, seen[0])
    if of_classes := asset(name).captions:
        told = of_classes, of_classes
    return Dataset(*train, *seen, flip, statistics, *told)


def _split(
    arrays: dict, split: str, limit: int | None, key: str | None = None
) -> "tuple[Tensor | Pictures, Tensor]":
    """Images and labels of "train" or "reference"; `key` is what the limit is called."""
    from prunebench.assets.pictures import Pictures

    labels = _tensor(arrays[f"{split}_labels"]).long()
    if f"{split}_images" in arrays:
        images = _images(arrays[f"{split}_images"], limit, key or split)
    else:
        images = Pictures(arrays, _count(len(labels), limit, key or split), split)
    return images, labels[: len(images)]


def _captions(arrays: dict, split: str | None, images: "Tensor | Pictures") -> tuple[str, ...]:
    texts = arrays.get(f"{split}_captions", ())[: len(images)]
    return tuple(text.decode() for text in texts)


def _published(name: str, path: Path, limit: int | None) -> "tuple[tuple, tuple]":
    """Images, labels and whole statistics of a reference batch of ADM, which has images NHWC."""
    import numpy as np

    from prunebench.assets.npz import read_npz

    arrays = read_npz(name, path)
    if asset(name).kind != "reference" or "arr_0" not in arrays:
        raise UserError(f"dataset.reference: '{name}' is no reference batch in ADM's format")
    images = _images(arrays["arr_0"].transpose(0, 3, 1, 2), limit, "reference")
    labels = arrays["arr_1"] if "arr_1" in arrays else np.zeros(len(images), np.int64)
    if not {"mu", "sigma"} <= set(arrays):  # FID with the batch's few images would be another
        raise UserError(f"dataset.reference: '{name}' lacks the statistics 'mu' and 'sigma'")
    whole = tuple(_tensor(arrays[key]).double() for key in ("mu", "sigma"))
    return (images, _tensor(labels)[: len(images)].long()), whole


def _tensor(array: "np.ndarray") -> "Tensor":
    import torch

    return torch.from_numpy(array)


def _images(array: "np.ndarray", limit: int | None, key: str) -> "Tensor":
    images = _tensor(array)
    if images.ndim == 3:  # grey images are stored without their channel
        images = images[:, None]
    count = _count(len(images), limit, key)
    return images if count == len(images) else images[:count].clone()


def _count(most: int, limit: int | None, key: str) -> int:
    count = most if limit is None else limit
    if not 1 <= count <= most:
        raise UserError(f"limit_{key} is {count}, but the data set has 1 to {most} images")
    return count
