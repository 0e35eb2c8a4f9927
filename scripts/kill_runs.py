"""Kills a run of a track again and again at random moments, then compares it with one left alone.

    python scripts/kill_runs.py --kills 50

Works on clones of HEAD in a temporary folder: first the track is run without any kill, then as
often as it takes with kills, until there were enough. Each kill is a SIGKILL to Snakemake, the warm
server, a client of it, a job or a job's own child, whichever the draw says and is alive; the same
command is given again whenever Snakemake has ended. After every finished run all images, weights,
plans and qualities must be those of the undisturbed one (scripts/compare_runs.py), and no process
and no temporary file may be left. Exit status 0 if so. `--reference FOLDER` compares with a run
that was made before, by the same code on the same machine, instead of making one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUIET_SECONDS = 20  # after the run has ended, until which its helpers must be gone
# What Snakemake itself leaves in TMPDIR when it is killed, and torch's cache of kernels.
NOT_OURS = ("snakemake", "torchinductor_")
KINDS = ("snakemake", "server", "client", "job", "child")


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="kills-", dir=arguments.folder) as place:
        harness = Harness(Path(place), arguments, random.Random(arguments.seed))
        reference = arguments.reference or harness.left_alone()
        report = harness.report(reference)
    text = json.dumps(report, indent=1)
    print(text, flush=True)
    if arguments.out:
        arguments.out.write_text(f"{text}\n")
    return bool(report["different"] or report["left_behind"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--track", default="smoke", help="of config/, or the path of a YAML file")
    parser.add_argument("--target", default="everything", help="what Snakemake is to make")
    parser.add_argument("--cores", default="all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of moments and victims")
    parser.add_argument("--pause", type=float, default=20, help="mean seconds between two kills")
    parser.add_argument("--folder", type=Path, help="where the clones lie while they run")
    parser.add_argument("--reference", type=Path, help="runs/<track> of an undisturbed run")
    parser.add_argument("--out", type=Path, help="where the report goes, as JSON")
    return parser.parse_args()


@dataclass
class Harness:
    """Runs of a track in clones below `place`.

    Attributes:
        owners: process ids of all Snakemakes so far; the servers' folders are called by them.
    """

    place: Path
    asked: argparse.Namespace
    draw: random.Random
    counts: Counter = field(default_factory=Counter)
    owners: list[int] = field(default_factory=list)
    starts: int = 0

    def left_alone(self) -> Path:
        """The track's folder of an undisturbed run."""
        folder = self.clone("left_alone")
        if self.start(folder).wait():
            sys.exit(
                f"the undisturbed run failed:\n{(folder / 'snakemake.log').read_text()[-3000:]}"
            )
        return folder / "runs" / self.name

    def report(self, reference: Path) -> dict:
        """Kill and finish until there were enough kills; what was found."""
        different, left, runs = [], [], 0
        while self.counts.total() < self.asked.kills:
            runs += 1
            folder = self.clone(f"killed{runs}")
            self.killed_run(folder)
            left += self.left_behind(folder)
            different += _differences(reference, folder / "runs" / self.name)
            self.say(f"run {runs} finished after {self.counts.total()} kills")
            shutil.rmtree(folder)
        return {
            "track": self.asked.track,
            "target": self.asked.target,
            "kills": dict(sorted(self.counts.items())),
            "runs": runs,
            "starts": self.starts,
            "different": different,
            "left_behind": left,
        }

    @property
    def name(self) -> str:
        return Path(self.asked.track).stem

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def clone(self, name: str) -> Path:
        folder = self.place / name
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        (self.place / "tmp").mkdir(exist_ok=True)
        return folder

    def start(self, folder: Path) -> subprocess.Popen:
        track = f"track={self.asked.track}"
        command = ["snakemake", "--cores", self.asked.cores, self.asked.target, "--config", track]
        temporary = str(self.place / "tmp")
        environment = {**os.environ, "PYTHONPATH": str(folder), "TMPDIR": temporary}
        with (folder / "snakemake.log").open("a") as log:
            run = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.starts += 1
        self.owners.append(run.pid)
        return run

    def killed_run(self, folder: Path) -> None:
        """Run the track to its end in a clone, killing on the way."""
        run, failures = self.start(folder), 0
        while True:
            # The first kills come within seconds, where servers and clients are starting.
            mean = self.asked.pause * min(1.0, (self.counts.total() + 1) / 10)
            if not _ended(run, self.draw.expovariate(1 / mean)):
                if self.counts.total() < self.asked.kills:
                    failures = 0 if self.kill(folder, run.pid) else failures
                continue
            if run.returncode == 0:
                return
            failures += 1
            if failures > 3:  # without a kill in between
                sys.exit(f"no kill, and still:\n{(folder / 'snakemake.log').read_text()[-3000:]}")
            run = self.start(folder)

    def kill(self, folder: Path, snakemake: int) -> bool:
        """Kill a process of a drawn kind; False if there was none."""
        found: dict[str, list[int]] = {}
        for process, kind in _processes(folder, snakemake):
            found.setdefault(kind, []).append(process)
        kind = self.draw.choice(KINDS)
        if kind not in found:
            return False
        try:
            os.kill(self.draw.choice(found[kind]), signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.counts[kind] += 1
        self.say(f"kill {self.counts.total()}: {kind}")
        return True

    def left_behind(self, folder: Path) -> list[str]:
        """Processes and temporary files that are still there when a run has ended."""
        end = time.monotonic() + QUIET_SECONDS
        while (alive := list(_processes(folder))) and time.monotonic() < end:
            time.sleep(1)
        left = [f"process {process} ({kind})" for process, kind in alive]
        halves = [*folder.rglob("*.part"), *(folder / "runs").rglob("training")]
        servers = [d for pid in self.owners for d in Path("/tmp").glob(f"prunebench-{pid}-*")]
        others = [d for d in (self.place / "tmp").iterdir() if not d.name.startswith(NOT_OURS)]
        return left + [str(file) for file in (*halves, *servers, *others)]


def _ended(run: subprocess.Popen, seconds: float) -> bool:
    try:
        run.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


def _processes(folder: Path, snakemake: int = 0) -> Iterator[tuple[int, str]]:
    """Processes whose working folder is the clone, each with its kind.

    Jobs are forks of the server and have its command line; a job's child has a job for its parent.
    """
    lines, parents = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or (entry / "cwd").readlink() != folder:
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (entry / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if state != "Z":
            lines[int(entry.name)], parents[int(entry.name)] = line, int(parent)
    for process, line in lines.items():
        yield process, "snakemake" if process == snakemake else _kind(process, line, lines, parents)


def _kind(process: int, line: bytes, lines: dict[int, bytes], parents: dict[int, int]) -> str:
    if b"warm_server" not in line:
        return "client"  # or its shell
    depth, above = 0, parents[process]
    while b"warm_server" in lines.get(above, b""):
        depth, above = depth + 1, parents[above]
    return ("server", "job", "child")[min(depth, 2)]


def _differences(reference: Path, run: Path) -> list[str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import compare_runs

    old, new = compare_runs.contents(reference), compare_runs.contents(run)
    print(f"compared: {len(old)} and {len(new)} files", flush=True)
    return compare_runs.differences(old, new)


if __name__ == "__main__":
    sys.exit(main())
