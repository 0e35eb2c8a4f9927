"""One thread per test process: they are more than the cores, and results do not depend on it."""

import os
import re
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


LONGEST = ("test_slurm", "test_workflow")  # minutes of waiting each, beside which others compute


def pytest_configure(config):
    import reliability

    if reliability.VARIABLE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(reliability.Counts())


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_generate_tests(metafunc):
    """`name` runs over every tiny architecture, `core` over one per family and objective."""
    if {"name", "core"} & set(metafunc.fixturenames):
        import tiny  # slow to import, and needed by the tests of the core only

        names = {"name": tiny.SHAPES, "core": tiny.CORE}
        for argument in names.keys() & set(metafunc.fixturenames):
            metafunc.parametrize(argument, names[argument])


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Adds assets to the registry; the mirror and the cache are empty folders."""
    from prunebench import assets

    for folder in ("mirror", "cache"):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(f"PRUNEBENCH_{folder.upper()}", str(tmp_path / folder))

    def add(name, *files, **changes):
        fields = {
            "kind": "extractor",
            "description": "three bytes",
            "licence": "none",
            "home": "https://example.org",
            **changes,
        }
        entry = assets.Asset(name=name, files=files, **fields)
        monkeypatch.setitem(assets.ASSETS, name, entry)
        return entry

    return add


@pytest.fixture
def added(monkeypatch, tmp_path):
    """Adds the one Python file that a page of the docs shows to a package, under a name."""

    def add(page, package, name):
        text = (Path(__file__).parents[1] / page).read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        (tmp_path / name).write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])

    return add
