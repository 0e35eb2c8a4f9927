"""Finding the files that are shipped: in a checkout and in an installed wheel."""

from pathlib import Path

import pytest

from prunebench.runtime import resources

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as a wheel installs it; the current folder is another one."""
    package, here = tmp_path / "site-packages" / "prunebench", tmp_path / "here"
    for folder in (package / "shipped" / "config", here):
        folder.mkdir(parents=True)
    (package / "shipped" / "config" / "smoke.yaml").touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(resources, "root", lambda root=resources.root: root(package))
    return package / "shipped"


def test_a_checkout_uses_its_own_files():
    assert resources.root() == ROOT


def test_a_wheel_uses_its_copies(installed):
    assert resources.root() == installed
    assert resources.find("config/smoke.yaml") == installed / "config" / "smoke.yaml"


def test_the_current_folder_goes_first(installed):
    own = Path("config/smoke.yaml")
    own.parent.mkdir()
    own.touch()
    assert resources.find("config/smoke.yaml") == own
    assert resources.listed("config/*.yaml") == [own]


def test_an_unknown_name_is_left_as_it_is(installed):
    assert resources.find("config/smoek.yaml") == Path("config/smoek.yaml")


def test_own_and_shipped_files_are_listed_together(installed):
    Path("config").mkdir()
    Path("config/mine.yaml").touch()
    listed = resources.listed("config/*.yaml")
    assert listed == [Path("config/mine.yaml"), installed / "config" / "smoke.yaml"]
