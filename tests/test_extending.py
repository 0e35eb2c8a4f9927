"""What docs/add_a_*.md say is enough: their examples, added to a copy of the project and tried.

Each test states all files that are added or changed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

PARTS = ("prunebench", "methods", "config", "workflow", "tests", "Snakefile", "pyproject.toml")
EXAMPLE = re.compile(
    r"(?P<verb>[Ss]ave this as|[Aa]dd this to)\s+`(?P<file>[^`]+)`:\n\n```\w+\n(?P<code>.*?)```",
    re.DOTALL,
)
CHANGE = re.compile(r"```diff\n(?P<lines>.*?)```", re.DOTALL)


class Copy:
    """A copy of the project to which an example of the docs is added."""

    def __init__(self, folder: Path):
        self.folder = folder
        skipped = shutil.ignore_patterns("__pycache__")
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=skipped)
            else:
                shutil.copy(ROOT / part, folder / part)

    def add(self, page: str, *changed: str) -> list[str]:
        """Follow a page of the docs; the files that it adds or changes.

        Args:
            changed: the files that its diffs are of, in their order.
        """
        before, text = self._content(), (ROOT / "docs" / page).read_text()
        for example in EXAMPLE.finditer(text):
            file = self.folder / example["file"]
            old = file.read_text() if file.exists() else ""
            assert file.exists() == example["verb"].lower().startswith("add"), file
            file.write_text(f"{old}\n{example['code']}" if old else example["code"])
        for name, change in zip(changed, CHANGE.finditer(text), strict=True):
            lines = change["lines"].splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] != "+")
            file = self.folder / name
            assert file.read_text().count(old) == 1, f"{file}: {old}"
            new = "".join(line[1:] for line in lines if line[0] != "-")
            file.write_text(file.read_text().replace(old, new))
        return sorted(name for name, text in self._content().items() if before.get(name) != text)

    def _content(self) -> dict[str, bytes]:
        files = (file for file in self.folder.rglob("*") if file.is_file())
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in files}

    def run(self, *command: str, **environment: str) -> str:
        """What a command of Python prints in the copy, which must go well."""
        found = {**os.environ, "PYTHONPATH": str(self.folder), **environment}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=found,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def tested(self, which: str, *files: str) -> int:
        """How many of the suite's own tests ran over what was added."""
        output = self.run("-m", "pytest", "-p", "no:cacheprovider", *files, "-k", which)
        return int(re.search(r"^(\d+) passed", output, re.MULTILINE)[1])


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


def test_a_method_is_one_file(copy):
    assert copy.add("add_a_method.md") == ["methods/mine.py"]
    output = copy.run("-m", "prunebench", "check", "methods/mine.py")
    assert "9 tiny networks of conditional_unet, dit, flux, unet, uvit" in output
    assert "wrong" not in output and output.count("  ok  ") == 12


def test_a_recovery_is_one_file(copy):
    assert copy.add("add_a_recovery.md") == ["prunebench/recovery/huber_kd.py"]
    assert copy.tested("huber_kd and (dit or sit)", "tests/test_recovery.py") >= 4


def test_a_family_is_two_files_and_none_of_the_tests(copy):
    assert copy.add("add_a_model.md") == [
        "prunebench/models/configs/convnet.py",
        "prunebench/models/convnet.py",
    ]
    contract = "magnitude_layers or magnitude_widths or magnitude_unstructured"
    files = ("tests/test_units.py", "tests/test_contract.py")
    assert copy.tested(f"convnet and (test_units or {contract})", *files) >= 8


def test_a_metric_is_one_file(copy):
    assert copy.add("add_a_metric.md") == ["prunebench/evaluation/metrics/coverage.py"]
    assert copy.tested("coverage", "tests/test_quality.py") >= 2


SAMPLED = """
from prunebench.selection import tiny
images = next(tiny.sampler("sit", tiny.dense("sit"), sampler="midpoint").images(0, 0, 4, 4))
assert images.shape == (4, 1, 8, 8) and images.float().std() > 0
"""


def test_a_sampler_is_one_file(copy):
    assert copy.add("add_a_sampler.md") == ["prunebench/diffusion/samplers/midpoint.py"]
    copy.run("-c", SAMPLED)


LOADED = """
import io, os, zipfile
import numpy as np
from pathlib import Path
from PIL import Image
from prunebench import assets, cli
with zipfile.ZipFile(Path(os.environ["PRUNEBENCH_MIRROR"]) / "shapes.zip", "w") as archive:
    for index, name in enumerate(("train/b/1", "train/a/2", "test/a/3")):
        content = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 50 * index, np.uint8)).save(content, "png")
        archive.writestr(f"{name}.png", content.getvalue())
assert cli.main(["assets", "fetch", "shapes16"]) == 0
data = assets.load_dataset("shapes16")
assert data.train_images.float().mean((1, 2, 3)).tolist() == [50, 0]
assert data.train_labels.tolist() == [0, 1] and data.reference_labels.tolist() == [0]
"""


def test_a_data_set_is_one_file_and_its_entry(copy, tmp_path_factory):
    assert copy.add("add_a_dataset.md") == [
        "prunebench/assets/datasets/class_folders.py",
        "prunebench/assets/registry.yaml",
    ]
    folders = {f"PRUNEBENCH_{n}": str(tmp_path_factory.mktemp(n)) for n in ("MIRROR", "CACHE")}
    copy.run("-c", LOADED, **folders)


STAGED = """
import json, sys
from pathlib import Path
from prunebench import cli
cell = ["--model", "dit", "--method", "dense", "--sparsity", "0", "--seed", "0"]
for stage in ("dense", "select", "sample", "spectrum"):
    words = cell if stage != "dense" else cell[:2]
    assert cli.main([stage, "--track", "smoke", *words]) == 0
power = json.loads(Path("runs/smoke/dit/dense/0.0/none/seed0/spectrum.json").read_text())["power"]
assert len(power) == 8 and min(power) > 0
"""


def test_a_stage_is_an_entry_a_record_a_file_and_a_rule(copy):
    changed = ("prunebench/tracks/stages.py", "Snakefile", "Snakefile")
    assert copy.add("add_a_stage.md", *changed) == [
        "Snakefile",
        "prunebench/records/schema.py",
        "prunebench/stages/spectrum.py",
        "prunebench/tracks/stages.py",
        "workflow/rules/spectrum.smk",
    ]
    copy.run("-c", STAGED)
    target = "runs/smoke/dit/dense/0.0/none/seed1/spectrum.json"
    asked = ("-m", "snakemake", "-n", "--cores", "1", "--config", "track=smoke", "--", target)
    assert re.search(r"^spectrum +1$", copy.run(*asked), re.MULTILINE)
