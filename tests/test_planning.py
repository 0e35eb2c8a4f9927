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
from prunebench.records.provenance import config_hash
from prunebench.runtime import run

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).parent / "snakemake"
VARIANTS = ["entpruner_one_shot", "gradient_flow_literal", "gradient_flow_unsigned"]
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
    track["methods"] = {"folders": ["methods", "more"], "exclude": VARIANTS}
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


def _small(folder: Path, place: str) -> Path:
    """The smoke track in a folder of a copy of the workflow."""
    matrix(folder, 1)
    (folder / place).mkdir()
    track = yaml.safe_load((folder / "config" / "smoke.yaml").read_text())
    del track["methods"]["exclude"]  # names methods that the copy lacks
    file = folder / place / "small.yaml"
    file.write_text(yaml.safe_dump(track, sort_keys=False))
    return file


def _run(folder: Path, *command: str) -> tuple[int, str]:
    path = f"{SNAKEMAKE.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_tracks_path_is_text_to_the_shell(tmp_path):
    place = "it's a $(touch pwned) `touch pwned`; touch pwned"
    file = _small(tmp_path, place)
    track = str(file.relative_to(tmp_path))
    command = ("snakemake", "--cores", "1", "runs/small/assets.json", "--config", f"track={track}")
    status, output = _run(tmp_path, *command)
    assert status == 0, output
    assert (tmp_path / "runs/small/assets.json").exists()
    assert not list(tmp_path.rglob("pwned"))


def test_jobs_run_what_the_workflow_planned(tmp_path, monkeypatch):
    """A job whose track was edited after planning does nothing, whatever the edit is."""
    file = _small(tmp_path, "mine")
    monkeypatch.setenv(run.PLANNED, config_hash(tracks.load(str(file)).in_force))
    command = ("prunebench", "dense", "--model", "dit", "--track", str(file))
    file.write_text(file.read_text().replace("images: 160", "images: 176"))
    status, output = _run(tmp_path, *command)
    assert status == 2 and "was edited while its workflow ran" in output
    assert not (tmp_path / "runs").exists()
