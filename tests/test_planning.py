"""How long Snakemake plans a large matrix: an eighth of the largest one, and its share of the time.

The whole is four tracks (data sets) of 8 models x 8 methods and the controls x 5 sparsities x 5
seeds, 55,700 jobs. Two cores have a minute for it: 120 seconds of CPU.
"""

import copy
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from prunebench import tracks

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).parent / "snakemake"
METHODS = ("diff_pruning", "entpruner", "gradient_flow", "laptop_diff", "sparsedm", "taylor")
CONTROLS = ("dense", "fewer_steps", "magnitude_2_4", "magnitude_layers", "magnitude_unstructured",
            "magnitude_widths", "random_2_4", "random_layers", "random_widths",
            "scratch")  # fmt: skip
SHARE = 1 / 8
SECONDS = 120


def matrix(folder: Path, models: int) -> str:
    """A track in a copy of the workflow: smoke's models and two methods under new names."""
    for part in ("Snakefile", "workflow", "config", "environment.yml", "envs"):
        copied = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copied(ROOT / part, folder / part)
    for name in ("methods", "more"):
        (folder / name).mkdir()
    for name in (*METHODS, *CONTROLS):
        shutil.copy(ROOT / "methods" / f"{name}.py", folder / "methods")
    for name in ("taylor_a", "taylor_b"):
        shutil.copy(ROOT / "methods" / "taylor.py", folder / "more" / f"{name}.py")
    track = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    known = [copy.deepcopy(track["models"][name]) for name in ("dit", "unet")]
    track["models"] = {f"model_{i}": known[i % 2] for i in range(models)}
    track["methods"] = {"folders": ["methods", "more"]}
    track["sparsities"], track["seeds"] = [0.1, 0.2, 0.3, 0.4, 0.5], [0, 1, 2, 3, 4]
    track["divisions"] = {"matched": {"compares": "selections", "recoveries": ["finetune-low"]}}
    del track["oracle"]
    (folder / "config" / "matrix.yaml").write_text(yaml.safe_dump(track, sort_keys=False))
    return "matrix"


def test_a_large_matrix_is_planned_in_time(tmp_path, monkeypatch):
    models = 4
    name = matrix(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    track = tracks.load(name)
    assert sum(not method.control for method in track.methods.values()) == 8
    assert len(track.cells()) == models * 350
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [SNAKEMAKE, "--cores", "all", "-n", "-q", "--config", f"track={name}"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < SECONDS * SHARE
