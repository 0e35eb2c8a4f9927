"""One thread per test process: two xdist workers on two cores, and results not depending on it."""

import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """`name` runs over every tiny architecture, `core` over one per family and objective."""
    if {"name", "core"} & set(metafunc.fixturenames):
        import tiny  # slow to import, and needed by the tests of the core only

        names = {"name": tiny.SHAPES, "core": tiny.CORE}
        for argument in names.keys() & set(metafunc.fixturenames):
            metafunc.parametrize(argument, names[argument])
