"""One thread per test process: two xdist workers on two cores, and results that do not depend on it."""

import tiny
import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """`name` runs over every tiny instance, `core` over one per family and objective."""
    for argument, names in (("name", tiny.NAMES), ("core", tiny.CORE)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
