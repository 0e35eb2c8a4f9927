"""A copy of the workflow in a folder of its own, for tests that run it for real."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "workflow", "config", "methods", "slurm", "local", "environment.yml", "envs")
BIN = Path(sys.executable).parent


class Project:
    """A copy of the workflow; the package is the checkout's.

    `environment` holds variables that its commands run with besides the tests' own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None):
        self.folder = folder
        self.environment = {**os.environ, **(environment or {})}
        self.environment["PATH"] = f"{BIN}:{self.environment['PATH']}"
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, symlinks=True)
            else:
                shutil.copy(source, folder / part)

    def start(self, *command: str, stdout=subprocess.PIPE, **options) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, *command: str, timeout: float = 1500, **options) -> tuple[int, str]:
        process = self.start(*command, **options)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def snakemake(self, *arguments: str, track: str = "smoke") -> tuple[int, str]:
        return self.run("snakemake", "--cores", "2", *arguments, "--config", f"track={track}")

    def records(self, track: str = "smoke") -> dict[Path, bytes]:
        """Every finished record. Made again it would differ: in its date and seconds at least.

        Its time says less: Snakemake touches what a job has written.
        """
        files = (self.folder / "runs" / track).rglob("*.json")
        return {
            file: file.read_bytes()
            for file in files
            if file.name != "plan.json" and not {"training", "leaderboard"} & {*file.parts}
        }

    def scores(self, track: str = "smoke") -> list[Path]:
        return sorted((self.folder / "runs" / track).rglob("score.json"))

    def rows(self, track: str = "smoke", division: str = "matched") -> list[dict]:
        folder = self.folder / "runs" / track / "leaderboard" / division
        with (folder / "leaderboard.csv").open() as handle:
            return list(csv.DictReader(handle))
