"""The budget meter: counts what passes through a model, whoever calls it."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunebench.errors import CellError

KEYS = ("student_forward", "student_backward", "teacher_forward", "teacher_backward")


class BudgetMeter:
    """Counts images by hooks on the models themselves, so no pass can go round it.

    The hooks are functions, which `copy.deepcopy` shares: copies of a metered model are metered by
    the same meter. Counts are images (batch rows) through one denoiser.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wall_s = 0.0
        self._depth = 0  # of calls of watched models

    def watch(
        self, model: nn.Module, role: str = "student", parts: Iterable[nn.Module] = ()
    ) -> nn.Module:
        """Count every forward of `model` from now on, and every backward.

        Args:
            parts: modules of `model` that would do its work unseen if they were called alone. That,
                and `model.forward(...)`, is refused from now on (CellError).
        """

        def count(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            rows = len(inputs[0])
            self.counts[f"{role}_forward"] += rows
            if output.requires_grad:
                output.register_hook(lambda _: self._backward(role, rows))

        def alone(part: nn.Module, _: tuple) -> None:
            self._refuse(f"a {type(part).__name__} of the model")

        alone.meters = True
        model.register_forward_hook(count)
        for part in parts:
            part.register_forward_pre_hook(alone)
        model.__class__ = self._watched(type(model))
        return model

    def _watched(self, kind: type[nn.Module]) -> type[nn.Module]:
        """The class of a watched model: an instance's own `forward` would not survive copies."""
        meter = self

        class Watched(kind):
            unwatched = kind

            def __call__(self, *inputs: object, **named: object) -> object:
                meter._depth += 1
                try:
                    return super().__call__(*inputs, **named)
                finally:
                    meter._depth -= 1

            def forward(self, *inputs: object, **named: object) -> object:
                meter._refuse("the model's forward")
                return super().forward(*inputs, **named)

        Watched.__name__, Watched.__qualname__ = kind.__name__, kind.__qualname__
        Watched.__module__, Watched.__doc__ = kind.__module__, kind.__doc__
        return Watched

    def _refuse(self, what: str) -> None:
        # Checkpointed blocks run again inside the backward pass of a call that was counted.
        if not self._depth and torch._C._current_graph_task_id() == -1:
            raise CellError(f"{what} was called past the meter: call the model itself")

    def _backward(self, role: str, rows: int) -> None:
        self.counts[f"{role}_backward"] += rows

    @contextmanager
    def clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wall_s += time.perf_counter() - start

    def report(self) -> dict:
        return {**{key: self.counts[key] for key in KEYS}, "wall_s": self.wall_s}


def unwatched(model: nn.Module) -> nn.Module:
    """`model` itself, without what a meter put there."""
    model.__class__ = getattr(type(model), "unwatched", type(model))
    model._forward_hooks.clear()
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hasattr(hook, "meters")]:
            del hooks[key]
    return model


def unspent() -> dict:
    """The report of a stage that did nothing."""
    return BudgetMeter().report()
