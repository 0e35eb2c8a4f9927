"""Kills a run of a track again and again at random moments, then compares it with one left alone.

    python scripts/kill_runs.py --kills 50

Works on two clones of HEAD in a temporary folder. Each kill is a SIGKILL to Snakemake, a job or
the warm server, whichever the draw says and is alive; the same command is given again whenever
Snakemake has ended. At the end all images, weights, plans and qualities must be those of the
undisturbed run (scripts/compare_runs.py), and no process may be left. Exit status 0 if so.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUIET_SECONDS = 20  # after the run has ended, until which its helpers must be gone


def main() -> int:
    arguments = _arguments()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="prunebench-kills-", dir=arguments.folder) as place:
        killed, left_alone = _clone(Path(place) / "killed"), _clone(Path(place) / "left_alone")
        counts = _killed_run(killed, arguments, draw)
        print(
            "killed:", ", ".join(f"{n} x {what}" for what, n in sorted(counts.items())), flush=True
        )
        leftovers = _leftovers(killed)
        _start(left_alone, arguments.track).wait()
        return bool(leftovers) | _compare(left_alone, killed, arguments.track)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--track", default="smoke")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of moments and victims")
    parser.add_argument("--pause", type=float, default=20, help="mean seconds between two kills")
    parser.add_argument("--folder", help="where the two clones lie while they run")
    return parser.parse_args()


def _clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def _start(folder: Path, track: str) -> subprocess.Popen:
    command = ["snakemake", "--cores", "all", "everything", "--config", f"track={track}"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with (folder / "snakemake.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _killed_run(folder: Path, arguments: argparse.Namespace, draw: random.Random) -> Counter:
    """Run the track to its end, killing on the way; how often each kind of process was killed."""
    counts, run = Counter(), _start(folder, arguments.track)
    while True:
        # The first kills come within the first seconds, where servers and clients are starting.
        mean = arguments.pause * min(1.0, (counts.total() + 1) / 10)
        ended = _wait(run, draw.expovariate(1 / mean))
        if ended and run.returncode == 0:
            if counts.total() < arguments.kills:
                shutil.rmtree(folder / "runs")
                print(f"finished after {counts.total()} kills; runs/ removed, going on", flush=True)
            else:
                return counts
        if ended:
            run = _start(folder, arguments.track)
        elif counts.total() < arguments.kills:
            what = draw.choice(("snakemake", "job", "server"))
            counts[what] += _kill(folder, what, run.pid, draw)


def _wait(run: subprocess.Popen, seconds: float) -> bool:
    try:
        run.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


def _kill(folder: Path, what: str, snakemake: int, draw: random.Random) -> int:
    victims = [snakemake] if what == "snakemake" else _processes(folder, what, snakemake)
    if not victims:
        return 0
    os.kill(draw.choice(victims), signal.SIGKILL)
    return 1


def _processes(folder: Path, what: str = "", but: int = 0) -> list[int]:
    """Processes whose working folder is the clone: servers, jobs (all but servers), or all."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or (entry / "cwd").readlink() != folder:
                continue
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            server = b"warm_server" in (entry / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        wanted = not what or server == (what == "server")
        if state != "Z" and wanted and int(entry.name) != but:
            found.append(int(entry.name))
    return found


def _leftovers(folder: Path) -> list[int]:
    end = time.monotonic() + QUIET_SECONDS
    while (left := _processes(folder)) and time.monotonic() < end:
        time.sleep(1)
    print(f"left behind: {left}" if left else "no process is left behind", flush=True)
    return left


def _compare(one: Path, other: Path, track: str) -> int:
    script = ROOT / "scripts" / "compare_runs.py"
    runs = [str(folder / "runs" / track) for folder in (one, other)]
    return subprocess.run([sys.executable, str(script), *runs], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
