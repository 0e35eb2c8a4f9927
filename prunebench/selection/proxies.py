"""Training-free proxies of how well a network will train (NTK, ZiCo), and a vote on them.

Both need gradients at the present weights only. Formulas, choice of parameters and vote are
those of AutoProg-Zero's released search (prog/helpers.py, train_apz.py), on which EntPruner builds.
ZiCo: G. Li et al., ICLR 2023, arXiv 2301.11300.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from prunebench.selection.scores import matrices
from prunebench.training.loop import Batch

Function = Callable[[nn.Module, Batch], Tensor]


def ntk_condition(model: nn.Module, batches: Sequence[Batch], predict: Function) -> float:
    """Geometric mean over the batches of the tangent kernel's condition number; lower is better.

    From batch to batch the number varies by factors (its logarithm has a deviation of about 1), so
    that an arithmetic mean is its largest batch's.

    A sample's gradient is that of the sum of `predict` (a Context's, [N, ...]) over its outputs, to
    every parameter whose name contains "weight". All samples' gradients of a batch are in memory.
    """
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    kernels = (
        tangent_kernel((predict(model, one).sum() for one in _singles(batch)), weights)
        for batch in batches
    )
    return math.exp(sum(math.log(condition_number(kernel)) for kernel in kernels) / len(batches))


def tangent_kernel(outputs: Iterable[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Inner products of the gradients of every sample's output (one scalar each), float64 [B, B].

    From a generator only one sample's graph is alive at a time. A parameter that an output does not
    depend on counts as zero.
    """
    rows = [torch.autograd.grad(output, parameters, materialize_grads=True) for output in outputs]
    flat = (torch.stack(column).flatten(1).double() for column in zip(*rows, strict=True))
    return sum(gradients @ gradients.T for gradients in flat)


def condition_number(kernel: Tensor) -> float:
    """Largest over smallest eigenvalue of a kernel [B, B].

    Always finite: a smallest eigenvalue below rounding error (duplicate samples, dead networks)
    counts as B times machine epsilon of the largest, which gives the worst value there is.
    """
    values = torch.linalg.eigvalsh(kernel)
    share = (values[0] / values[-1]).item() if values[-1] > 0 else 0.0
    return 1 / max(share, len(values) * torch.finfo(values.dtype).eps)


def zico(model: nn.Module, batches: Sequence[Batch], loss: Function) -> float:
    """ZiCo of the linear layers and convolutions over at least two batches; higher is better."""
    layers = list(matrices(model).values())
    return inverse_variation(
        torch.autograd.grad(loss(model, batch), layers, materialize_grads=True) for batch in batches
    )


def inverse_variation(gradients: Iterable[Sequence[Tensor]]) -> float:
    """Sum over layers of log sum over weights of mean |g| / std g (population) over batches.

    Args:
        gradients: for each batch, one gradient per layer.

    Weights whose gradient does not vary have no ratio and are left out, and so are layers of them.
    """
    total = 0.0
    for layer in zip(*gradients, strict=True):
        values = torch.stack(layer).double()
        spread = values.std(0, correction=0)
        ratios = (values.abs().mean(0) / spread)[spread > 0]
        total += ratios.sum().log().item() if len(ratios) else 0.0
    return total


def vote(
    kappa: Sequence[float], zico: Sequence[float], size: Sequence[int] = ()
) -> tuple[int, dict[str, list]]:
    """Which candidate has the smallest rank, NTK and ZiCo at equal weight, and how it came about.

    With `size` (or any cost) its rank counts as much as both. Candidates come in falling order of
    size; on a tie the last, smallest one wins, as the cheaper one does in AutoProg-Zero.
    """
    by = {"kappa": ranks(kappa), "zico": ranks([-score for score in zico])}
    total = [(a + b) / 2 for a, b in zip(*by.values(), strict=True)]
    if size:
        by["size"] = ranks(size)
        total = [both + rank for both, rank in zip(total, by["size"], strict=True)]
    winner = min(reversed(range(len(total))), key=total.__getitem__)
    return winner, {"kappa": list(kappa), "zico": list(zico), "ranks": by, "total": total}


def ranks(values: Sequence[float], tolerance: float = 1e-6) -> list[int]:
    """Rank of each value, 1 for the lowest; those within `tolerance` of a rank's first share it."""
    given, first, rank = {}, -math.inf, 1
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__), start=1):
        if values[index] - first > tolerance:
            first, rank = values[index], place
        given[index] = rank
    return [given[index] for index in range(len(values))]


def _singles(batch: Batch) -> Iterator[Batch]:
    """The batch's samples as batches of one, which keeps counting of passes honest."""
    for n in range(len(batch.x0)):
        yield batch.rows(range(n, n + 1))
