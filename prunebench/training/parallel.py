"""Data-parallel training under torchrun: every process takes its share of every batch.

Free of effect where there is one process. The shares' gradients are summed, so the effective batch,
the schedule and the images drawn are those of one process; only the order of sums differs.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunebench.errors import UserError, short_of_memory


def world() -> int:
    """How many processes train together; torchrun says so."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start() -> None:
    """Meet the other processes; does nothing where there are none."""
    if world() == 1 or dist.is_initialized():
        return
    own = device()
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")


def share(batch: int) -> range:
    """The rows of a batch that this process computes.

    Raises:
        UserError: the batch can't be shared evenly.
    """
    if batch % world():
        raise UserError(
            f"a batch of {batch} can't be shared by {world()} processes; change `batch` of the "
            "model's training or recovery, or the rule's `needs.gpu`, so that it divides"
        )
    size = batch // world()
    return range(rank() * size, (rank() + 1) * size)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients."""
    if world() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with _together():
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if world() == 1:
        return value
    number: Tensor = torch.tensor(value, dtype=torch.float64, device=device())
    with _together():
        dist.all_reduce(number)
    return number.item()


def agreed(value: float) -> bool:
    """Whether a number is the same in all processes, which all get the same answer."""
    if world() == 1:
        return True
    ends = torch.tensor([value, -value], dtype=torch.float64, device=device())
    with _together():
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


@contextmanager
def _together() -> Iterator[None]:
    """A process that is gone is the machine's fault; the RuntimeError would be the cell's."""
    try:
        yield
    except RuntimeError as error:
        if short_of_memory(error):
            raise
        raise UserError(
            f"another process of this training is gone: {error}; its own error is above, if it "
            "had one; the same command goes on from what was saved"
        ) from error
