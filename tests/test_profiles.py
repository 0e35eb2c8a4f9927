"""The profiles that the short commands of the documents name, from the root of a checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunebench import tracks

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).parent / "snakemake"
PARTS = ("Snakefile", "workflow", "config", "methods", "environment.yml", "envs", "slurm", "local")


@pytest.mark.parametrize("profile", ["slurm", "local"])
def test_every_job_states_its_needs(tmp_path, profile):
    for part in PARTS:
        copied = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copied(ROOT / part, tmp_path / part)
    file = tmp_path / "config" / "smoke.yaml"
    file.write_text(file.read_text().replace("sampling: {count", "sampling: {shards: 2, count"))
    targets = [
        "runs/smoke/dit/taylor/0.25/finetune-low/seed0/score.json",
        "runs/smoke/oracle/dit/none/seed0/mask0/oracle.json",
    ]
    command = [SNAKEMAKE, *targets, "-n", "--cores", "all", "--profile", profile]
    done = subprocess.run(
        [*command, "--config", "track=smoke"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    found = re.findall(r"rule (\w+):\n(?:    .*\n)*?    resources: (.*)\n", done.stdout)
    stated = {rule: dict(pair.split("=") for pair in line.split(", ")) for rule, line in found}
    track = tracks.load(str(ROOT / "config" / "smoke.yaml"))
    del stated["assets"]  # runs beside Snakemake, where there is a network
    others = {"coder", "encode", "decoder", "efficiency"}  # of other kinds of tracks
    assert stated.keys() == set(tracks.stages.NEEDY) - others
    for rule, resources in stated.items():
        needs = track.needs(rule)
        asked = {name: resources[name] for name in ("mem_mb", "runtime", "gpu", "nodes")}
        expected = {name: needs[name] for name in ("mem_mb", "runtime", "gpu")} | {"nodes": 1}
        assert asked == {name: str(value) for name, value in expected.items()}
        assert resources["cpus_per_task"] == str(needs["cpus"])
