"""Compare what two runs of a track made: tensors and plans byte for byte, qualities as numbers.

    python scripts/compare_runs.py runs/smoke elsewhere/runs/smoke

Compared are all *.safetensors, which hold weights, images and features, and plan.json by their
bytes; of every score.json the numbers of quality and size, and the plan; of every oracle.json the
FID. Times, dates, machines and words are not. Exit status 0 if both runs have the same files and
all are equal.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Of a record, what a run on the same machine gives again; those that a version has not are skipped.
SAME = {
    "score.json": ("quality", "consistency", "size", "plan", "samples", "reference_samples"),
    "oracle.json": ("fid", "layers"),
}
BYTES = ("*.safetensors", "plan.json")
UNFINISHED = "training"  # folder of what trainings save while they run


def contents(run: Path) -> dict[str, tuple[str, object]]:
    """By name what is compared: its kind and its value."""
    return {name: (kind, value) for kind, name, value in _found(run)}


def _found(run: Path) -> Iterator[tuple[str, str, object]]:
    for pattern in (*BYTES, *SAME):
        for file in run.rglob(pattern):
            name = file.relative_to(run).as_posix()
            if {UNFINISHED, "leaderboard"} & {*file.parts}:
                continue
            if pattern in BYTES:
                yield pattern, name, hashlib.sha256(file.read_bytes()).hexdigest()
            else:
                record = json.loads(file.read_text())
                told = {key: _without_words(record.get(key)) for key in SAME[pattern]}
                yield pattern, name, {"status": record["status"], **told}


def _without_words(content: object) -> object:
    """Numbers, and what lists hold; not the reasons why a number is missing."""
    if not isinstance(content, dict):
        return content
    kept = {key: _without_words(value) for key, value in content.items()}
    return {key: value for key, value in kept.items() if not isinstance(value, str)}


def differences(old: dict, new: dict) -> list[str]:
    """A line for everything that only one run has or that differs."""
    lines = [f"only in the old run: {name}" for name in sorted(old.keys() - new.keys())]
    lines += [f"only in the new run: {name}" for name in sorted(new.keys() - old.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [f"differs: {name}" for name in both if old[name] != new[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old, new = contents(arguments.old), contents(arguments.new)
    lines = differences(old, new)
    counts = Counter(kind for name, (kind, _) in old.items() if new.get(name) == old[name])
    equal = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    sys.stdout.write("\n".join([*lines, f"equal: {equal or 'nothing'}", ""]))
    return 1 if lines or not counts else 0


if __name__ == "__main__":
    sys.exit(main())
