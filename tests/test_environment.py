"""pyproject.toml, the lock, the conda environment and the citation tell the same story."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prunebench

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
HOST = re.compile(r"://|\b[a-z0-9-]+\.(org|com|net|io)\b", re.IGNORECASE)


def locked() -> dict[str, str]:
    """Package -> version; fails on a line that is not an exact pin with at least one hash."""
    pins = {}
    for line in LOCK.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        requirement, *options = line.split(" --")
        pin = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)( ;.*)?", requirement.strip())
        assert pin, f"{requirement} is not an exact pin"
        name, version = pin.group(1), pin.group(2)
        assert options, f"{name} has no hash"
        assert all(re.fullmatch(r"hash=sha256:[0-9a-f]{64} *", option) for option in options), name
        pins[canonicalize_name(name)] = version
    return pins


def requirements(texts: list[str]) -> dict[str, Requirement]:
    parsed = map(Requirement, texts)
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_lock_pins_every_dependency_within_its_bounds():
    pins = locked()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for name, requirement in requirements(wanted).items():
        assert name in pins, f"{name} is not locked; run make lock"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{name} {pins[name]}"


@pytest.mark.parametrize("file", ["requirements.lock", "environment.yml", "pyproject.toml"])
def test_no_addresses(file):
    """Users and mirrors choose the package index; a file that names one would overrule them."""
    found = [line for line in (ROOT / file).read_text().splitlines() if HOST.search(line)]
    assert not found


def test_conda_environment_is_pyproject_at_the_locked_versions():
    pip = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    pins = locked()
    names = sorted(requirements(PROJECT["dependencies"]))
    assert pip == [f"{name}=={pins[name]}" for name in names]
    assert CONDA["name"] == PROJECT["name"]
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


def test_conda_environment_has_the_python_of_pyproject():
    python = next(entry for entry in CONDA["dependencies"] if str(entry).startswith("python="))
    requires = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert requires.contains(python.removeprefix("python=") + ".0")


def test_rules_use_the_same_conda_environment():
    assert (ROOT / "envs" / "prunebench.yaml").resolve() == ROOT / "environment.yml"


def test_citation_and_licence_agree_with_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # the format requires
    assert citation["version"] == PROJECT["version"] == prunebench.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
