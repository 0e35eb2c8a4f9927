"""The budget meter: counts what passes through a model, whoever calls it."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

KEYS = ("student_forward", "student_backward", "teacher_forward")


class BudgetMeter:
    """Counts images by hooks on the models themselves, so no pass can go round it.

    The hooks are functions, which `copy.deepcopy` shares: copies of a metered model are metered by
    the same meter. Counts are images (batch rows) through one denoiser.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wall_s = 0.0

    def watch(self, model: nn.Module, role: str = "student") -> nn.Module:
        """Count every forward of `model` from now on and, for the student, every backward."""

        def count(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            rows = len(inputs[0])
            self.counts[f"{role}_forward"] += rows
            if role == "student" and output.requires_grad:
                output.register_hook(lambda _: self._backward(rows))

        model.register_forward_hook(count)
        return model

    def _backward(self, rows: int) -> None:
        self.counts["student_backward"] += rows

    @contextmanager
    def clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wall_s += time.perf_counter() - start

    def report(self) -> dict:
        return {**{key: self.counts[key] for key in KEYS}, "wall_s": self.wall_s}


def unspent() -> dict:
    """The report of a stage that did nothing."""
    return BudgetMeter().report()
