"""Metrics: what is computed of a cell's images, one module each.

A metric's module offers `METRIC`, its entry (the words and rules by which tables print it and
tracks are checked), and `compute(evidence)`, which returns a number, or `Missing` with the reason
why there is none. The module's name is the metric's name in records and tables. Importing an entry
is light, because tracks and leaderboards are read without torch: what computes is imported inside
`compute`.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from prunebench.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

PAIRS = 64  # pairs of images that are held as floats at a time


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number: what it means, how it is printed, and what it needs.

    Attributes:
        label: heading of its column.
        help: one sentence for readers.
        better: "lower", "higher", or "" where neither is better.
        unit: of the printed number.
        scale: printed number = recorded number x scale.
        format: a format specification, or "sig" for three significant digits.
        spread: print the standard deviation beside the mean.
        optional: left out of tables in which no row has it.
        null: how a row without a value reads.
        order: place among the metrics' columns, ascending; equal ones go by name.
        least_images: generated and reference images without which it can't be computed.
        weights: the name of the asset that it reads, of a track's `evaluation` settings; None for
            none.
        refusal: why it can't be computed with `evaluation` settings on images of a number of
            pixels a side; None where it can.
    """

    label: str
    help: str
    better: str = ""
    unit: str = ""
    scale: float = 1.0
    format: str = ".3f"
    spread: bool = False
    optional: bool = False
    null: str = "—"
    order: int = 1000
    least_images: int = 1
    weights: Callable[[Mapping], str | None] = lambda evaluation: None
    refusal: Callable[[Mapping, int], str | None] = lambda evaluation, side: None


@dataclass(frozen=True)
class Missing:
    """In a number's place: the reason why there is none."""

    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What is known of N generated images, and what they are compared with.

    Attributes:
        generated: "features" [N, D] and, where the extractor has them, "spatial" [N, S], "logits"
            [N, classes] of the data set and "imagenet_logits" [N, 1008], as `Extractor.extract`
            returns them.
        reference: "features" and "spatial" of M real images; "mu" and "sigma" where statistics of
            more images were published.
        images: uint8 [N, C, H, W].
        dense_images: the dense model's of the same noise, uint8 [N, C, H, W].
        labels: int64 [N], the class that each image was asked for; None for unconditional models.
        prompts: the N texts, where the model reads any.
        settings: the track's `evaluation`: "batch", "lpips", and "clip" where it names one.
        extractor: file of the feature extractor's weights.
        weights: by metric, the place of the asset that its entry's `weights` names.
        device: where networks run.
    """

    generated: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    images: Tensor | None = None
    dense_images: Tensor | None = None
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    settings: Mapping = field(default_factory=dict)
    extractor: Path | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    _found: dict = field(default_factory=dict, init=False, repr=False)

    def once(self, function: Callable[[Evidence], object]) -> object:
        """What `function` returns of this evidence; several metrics may share its work."""
        if function not in self._found:
            self._found[function] = function(self)
        return self._found[function]

    @functools.cached_property
    def gaussians(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D] of the generated and of the reference features."""
        from prunebench.evaluation.frechet import reference_statistics, statistics

        return *statistics(self.generated["features"]), *reference_statistics(self.reference)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and the dense model's of the same noise, uint8 [<= PAIRS, C, H, W] each.

        Raises:
            ValueError: there are not as many of one as of the other, or of another size.
        """
        ours, dense = self.images, self.dense_images
        if ours.shape != dense.shape:
            raise ValueError(f"unpaired images: {list(ours.shape)} and {list(dense.shape)}")
        return zip(ours.split(PAIRS), dense.split(PAIRS), strict=True)


def metric_names() -> list[str]:
    """The names of all metrics, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def metrics() -> dict[str, Metric]:
    """All entries by name, in the order of their columns."""
    entries = {name: _module(name).METRIC for name in metric_names()}
    return dict(sorted(entries.items(), key=lambda item: item[1].order))


def metric(name: str) -> Metric:
    """One entry; a name that no metric has is a UserError that says the nearest."""
    if name not in metric_names():
        near = get_close_matches(name, metric_names(), 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(metric_names())}"
        raise UserError(f"unknown metric '{name}'; {hint}")
    return _module(name).METRIC


def evaluate(evidence: Evidence) -> dict[str, float | Missing]:
    """Every metric of this evidence, in the order of columns: a finite number, or why not."""
    return {name: compute(name, evidence) for name in metrics()}


def compute(name: str, evidence: Evidence) -> float | Missing:
    """One metric of this evidence: a finite number, or why not."""
    return _finite(_module(name).compute(evidence))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _finite(value: float | Missing) -> float | Missing:
    if isinstance(value, Missing) or math.isfinite(value):
        return value
    return Missing(f"the computation gives {value}, which is not a finite number")
