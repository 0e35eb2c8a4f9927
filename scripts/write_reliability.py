"""Run the tests that try to break the suite and write what they found into docs/reliability.md.

    python scripts/write_reliability.py                     run the tests (minutes), write the page
    python scripts/write_reliability.py --only methods      the tests of the kinds that begin so
    python scripts/write_reliability.py --kills FILE        take a report of scripts/kill_runs.py
    python scripts/write_reliability.py --render            only write the page

The figures lie in docs/reliability.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT / "tests"))

import reliability  # noqa: E402

TEXT = """# What was tried to break it

Made by `python scripts/write_reliability.py`, which runs the tests that are counted here
(`tests/reliability.py` names them).

*Refused*: one line that names the file, key or method and the remedy. *Survived*: the result is
the right one all the same, or only the cells of the method that did it are lost. *Wrong in
silence*: neither.

| kind | inputs tried | refused clearly | survived | wrong in silence |
|---|---|---|---|---|
{rows}

Counted on {date}.

## Kills of a whole run
`python scripts/kill_runs.py --kills 50` runs the smoke track, all divisions and the oracle, once
undisturbed and then under SIGKILLs at random moments (Snakemake, the warm server, its clients, jobs
and methods' own processes); the same command is given again. Afterwards all images, weights, plans
and qualities must be equal to the bit, and no process and no temporary file of the suite may be
left. `--out FILE` keeps the figures for `python scripts/write_reliability.py --kills FILE`.
Snakemake's own empty folders in TMPDIR stay when it is killed.

{kills}

## What is not held
- Pictures that a data set's index only points to (ImageNet, COCO, CC) are decoded when they are
  read; their contents have no hash. What was encoded of them has (`encode`).
- A method is code and may do anything to the files that its user may write. `cost` and `score` run
  no method's code and check sizes, target, masks and untouched weights again.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=Path)
    parser.add_argument("--only", default="", help="beginning of the kinds to count anew")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    figures, status = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}, 0
    if arguments.kills:
        figures["kills"] = json.loads(arguments.kills.read_text()) | {"date": _today()}
    elif not arguments.render:
        status, counts = _tried(arguments.only)
        figures |= {"kinds": {**figures.get("kinds", {}), **counts}, "date": _today()}
    FIGURES.write_text(f"{json.dumps(figures, indent=1)}\n")
    PAGE.write_text(page(figures))
    return status


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _tried(only: str) -> tuple[int, dict]:
    """Exit status of the tests, and what they counted, by kind in the order of the page."""
    chosen = [test for test, (kind, _) in reliability.tests().items() if kind.startswith(only)]
    names = [f"tests/{test.replace('::', '.py::')}" for test in chosen]
    with tempfile.NamedTemporaryFile(suffix=".json") as found:
        environment = {**os.environ, reliability.VARIABLE: found.name}
        command = [sys.executable, "-m", "pytest", "-q", *names]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        counts = json.loads(Path(found.name).read_text())
        return status, {kind: counts[kind] for kind in counts if kind.startswith(only)}


def page(figures: dict) -> str:
    """docs/reliability.md."""
    rows = [reliability.row(kind, counts) for kind, counts in figures["kinds"].items()]
    kills = _kills(figures["kills"]) if "kills" in figures else "It has not been run to its end."
    return TEXT.format(rows="\n".join(rows), date=figures["date"], kills=kills)


def _kills(report: dict) -> str:
    named = ", ".join(f"{count} x {kind}" for kind, count in report["kills"].items())
    return (
        f"Last run ({report['date']}, track `{Path(report['track']).stem}`, target "
        f"`{report['target']}`): {sum(report['kills'].values())} kills ({named}) in "
        f"{report['runs']} runs and {report['starts']} starts; {len(report['different'])} files "
        f"differ, {len(report['left_behind'])} are left behind."
    )


if __name__ == "__main__":
    sys.exit(main())
