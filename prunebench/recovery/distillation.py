"""Distillation from the dense model: what the recoveries with a teacher share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from prunebench.recovery import Teaching
from prunebench.training.loop import Batch, Loss, loss_of, outputs, predict, prediction_of

Distance = Callable[[Tensor, Tensor], Tensor]  # (teacher's feature, student's feature) -> []


def distilled(teaching: Teaching, distance: Distance | None = None, weight: float = 1.0) -> Loss:
    """Task loss + weight * output loss + sum over feature points of `distance`.

    The structure and weights of 1 are BK-SDM's (Kim et al., ECCV 2024, arXiv 2305.15798; in
    Nota-NetsPresso/BK-SDM, src/kd_train_text_to_image.py). Without a
    `distance` no features are compared.
    """
    points = teaching.kept if distance else {}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), captured(teaching.teacher, points) as taught:
            lesson = predict(teaching.teacher, batch)
        with captured(model, points) as learnt:
            output = outputs(model, batch)
        value = loss_of(output, batch) + weight * mse_loss(prediction_of(output, batch), lesson)
        return with_features(value, points, taught, learnt, distance)

    return loss


def with_features(
    value: Tensor,
    points: Mapping[str, Tensor | None],
    taught: Mapping[str, Tensor],
    learnt: Mapping[str, Tensor],
    distance: Distance,
) -> Tensor:
    """`value` and, for every feature point, the distance between both models' features.

    Args:
        points: by name, the channels of the teacher's feature that the student still has.
        taught, learnt: what `captured` found in teacher and student.
    """
    apart = (distance(surviving(taught[n], kept), learnt[n]) for n, kept in points.items())
    return sum(apart, value)


@contextmanager
def captured(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules put out in the forward pass inside the block, by name.

    Of a module that returns a tuple it is the first element: the hidden state of UNet blocks.
    """
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(n).register_forward_hook(hook_for(n)) for n in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def surviving(feature: Tensor, kept: Tensor | None) -> Tensor:
    """The channels (axis 1) of a teacher's feature that the student still has."""
    return feature if kept is None else feature.index_select(1, kept.to(feature.device))
