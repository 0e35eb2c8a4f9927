"""The wheel, installed away from the checkout, holds all that the command and the workflow read."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CELL = ("--model", "sit", "--method", "random_widths", "--sparsity", "0.25", "--seed", "0")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a command of an environment that has the wheel, in an empty folder of its own.

    What the package depends on is taken from the environment of the tests, and nothing is
    downloaded. The checkout can't be seen: the .pth file of an editable installation is read in
    its own environment only.
    """
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    packages = next((folder / "env" / "lib").glob("python*/site-packages"))
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    (folder / "elsewhere").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"

    def run(*command: str) -> str:
        done = subprocess.run(
            [python.parent / command[0], *command[1:]],
            cwd=folder / "elsewhere", env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_checkout_is_not_used(installed):
    show = "from prunebench.runtime import resources; print(resources.root())"
    root = Path(installed("python", "-c", show).strip())
    assert root.parts[-3:] == ("site-packages", "prunebench", "shipped")


def test_code_has_the_hash_of_the_checkout(installed):
    show = "from prunebench.records.provenance import *; print(code_hash(PACKAGE))"
    ours = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, check=True)
    assert installed("python", "-c", show) == ours.stdout.decode()


def test_command_finds_tracks_and_methods_from_any_folder(installed):
    assert installed("prunebench", "--version").strip() == "0.1.0"
    listed = installed("prunebench", "methods", "--track", "smoke")
    assert {"dense", "random_widths"} <= {line.split()[0] for line in listed.splitlines()}
    assert "embedded" in installed("prunebench", "assets", "list")


@pytest.mark.slow
def test_a_smoke_cell_is_made_elsewhere(installed):
    for stage in (("dense", "--model", "sit"), ("select", *CELL)):
        installed("prunebench", *stage, "--track", "smoke")
    show = "import pathlib; print(*pathlib.Path('runs').rglob('plan.json'))"
    assert "random_widths" in installed("python", "-c", show)


def test_the_workflow_is_planned_elsewhere(installed):
    show = "from prunebench.runtime import resources; print(resources.root())"
    snakefile = Path(installed("python", "-c", show).strip()) / "Snakefile"
    command = ["-m", "snakemake", "--snakefile", str(snakefile), "--cores", "1", "--dry-run"]
    planned = installed("python", *command, "--quiet", "rules", "--config", "track=smoke")
    assert "select" in planned
