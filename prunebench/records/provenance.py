"""Where a result comes from: code, configuration, machine and library versions."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PACKAGES = (
    "clean-fid",
    "diffusers",
    "lpips",
    "numpy",
    "scipy",
    "snakemake",
    "timm",
    "torch",
    "torch-fidelity",
    "torch-pruning",
)


def provenance(config: dict) -> dict:
    """What the result of a stage run here and now depends on; JSON types only.

    `commit` is null and `dirty` false where the package does not lie in a git checkout; `code`, the
    hash of the package's sources, identifies the code in any case. `memory_gb` is of the machine.
    """
    commit, dirty = _git(PACKAGE)
    return {
        "commit": commit,
        "dirty": dirty,
        "code": code_hash(PACKAGE),
        "config": config_hash(config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **_machine(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def config_hash(config: Mapping) -> str:
    """SHA-256 of a configuration, whatever the order of its keys.

    Without what jobs need of a cluster: whoever gives them more memory changes no result.
    """
    content = {key: value for key, value in config.items() if key != "needs"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_hash(package: Path) -> str:
    """SHA-256 over names and contents of the package's Python sources, in sorted order.

    Without the leaderboard's and the live view's: how results are shown does not change them. And
    without a wheel's copy of the methods, so that wheel and checkout have the same hash.
    """
    digest, apart = hashlib.sha256(), ("leaderboard", "progress", "shipped")
    others = {path for folder in apart for path in package.glob(f"{folder}/**/*.py")}
    for path in sorted(set(package.rglob("*.py")) - others):
        name = path.relative_to(package).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _git(package: Path) -> tuple[str | None, bool]:
    """Commit, and whether tracked files differ from it; results/ is output and does not count."""
    # Without optional locks: hundreds of jobs ask at once and must not touch the user's index.
    git = ["git", "--no-optional-locks", "-C", str(package)]
    status = [*git, "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    status += ["--", ":/", ":(top,exclude)results"]
    try:
        # A package installed inside somebody else's checkout is not part of that repository.
        _run([*git, "ls-files", "--error-unmatch", "__init__.py"])
        lines = _run(status).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None, False
    commit = next(line.split()[2] for line in lines if line.startswith("# branch.oid "))
    dirty = any(not line.startswith("#") for line in lines)
    return (None if commit == "(initial)" else commit), dirty


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _machine() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": _gpu(),
        "memory_gb": round(memory / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
