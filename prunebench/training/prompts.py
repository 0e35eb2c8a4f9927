"""Prompts, encoded once by a model's own text encoders: no other stage holds a text encoder.

Row 0 is the empty prompt; then come the captions of the training images and those of the reference
images, which are what samples are asked for. Stored in half precision, read in single.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunebench.errors import UserError
from prunebench.models.conditions import Condition, each
from prunebench.training import rows

if TYPE_CHECKING:  # it takes seconds to import, and only `encode` needs it
    from prunebench.diffusion.text_encoder import TextEncoder

PART = 1024  # prompts of one file: 121 MB of Stable Diffusion's, 4.3 GB of FLUX's
STEM = "prompts"


def encode(
    folder: Path,
    training: Sequence[str],
    asked: Sequence[str],
    encoder: "TextEncoder",
    identity: dict,
    part: int = PART,
) -> Path:
    """Write the conditions of all prompts; see `rows.write`.

    Args:
        training: captions of the training images.
        asked: what is sampled.
        identity: what the conditions depend on.

    Returns:
        the index.

    Raises:
        UserError: the encoder's output is not finite in half precision, or the disk is full.
    """
    texts = ["", *training, *asked]
    part = max(part // encoder.batch, 1) * encoder.batch

    def encoded(chosen: range) -> dict[str, Tensor]:
        starts = range(chosen.start, chosen.stop, encoder.batch)
        found = [_encoded(texts[s : min(s + encoder.batch, chosen.stop)], encoder) for s in starts]
        return {name: torch.cat([some[name] for some in found]) for name in found[0]}

    def source(chosen: range) -> list[bytes]:
        return [text.encode() for text in texts[chosen.start : chosen.stop]]

    counts = torch.tensor([len(training), len(asked)])
    return rows.write(folder, STEM, len(texts), part, encoded, source, identity, counts=counts)


def _encoded(texts: Sequence[str], encoder: "TextEncoder") -> dict[str, Tensor]:
    found = {name: value.half() for name, value in encoder.encode(texts).items()}
    if not all(value.isfinite().all() for value in found.values()):
        raise UserError(f"{encoder.place}: what it makes of {texts[0]!r} ... is not finite")
    return found


class Prompts:
    """Encoded prompts of a folder that `encode` wrote; label i is the i-th of its kind.

    Args:
        training: whether labels count captions of training images, else those that are sampled.
    """

    def __init__(self, folder: Path, training: bool):
        self._rows = rows.Rows(folder, STEM)
        trained, asked = self._rows.index["counts"].tolist()
        self._start, self._count = (1, trained) if training else (1 + trained, asked)
        self._empty: dict[torch.device, dict[str, Tensor]] = {}  # the empty prompt

    def __len__(self) -> int:
        return self._count

    def of(self, labels: Tensor) -> dict[str, Tensor]:
        found = [self._rows[self._start + label] for label in labels.tolist()]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def nothing(self, asked: Condition, model: nn.Module) -> Condition:
        device = next(iter(asked.values())).device
        if device not in self._empty:  # guidance asks at every step, also while that is timed
            self._empty[device] = each(lambda value: value.to(device), self._rows[0])
        return each(lambda like, row: row.to(like).expand_as(like), asked, self._empty[device])
