"""One thread per test process: two xdist workers on two cores, and results not depending on it."""

from collections import Counter

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """`name` runs over every tiny architecture, `core` over one per family and objective."""
    if {"name", "core"} & set(metafunc.fixturenames):
        import tiny  # slow to import, and needed by the tests of the core only

        names = {"name": tiny.SHAPES, "core": tiny.CORE}
        for argument in names.keys() & set(metafunc.fixturenames):
            metafunc.parametrize(argument, names[argument])


@pytest.fixture
def counted(monkeypatch):
    """Counts the rows of every forward and backward of a family, whichever copy they go through."""

    def install(model: nn.Module) -> Counter:
        counts, original = Counter(), type(model).forward

        def forward(self, x, t, y):
            counts["forward"] += len(x)
            return _Spy.apply(original(self, x, t, y), counts, len(x))

        monkeypatch.setattr(type(model), "forward", forward)
        return counts

    return install


class _Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, counts, rows):
        ctx.counts, ctx.rows = counts, rows
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.counts["backward"] += ctx.rows
        return grad, None, None
