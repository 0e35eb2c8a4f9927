"""What planning imports is light. The contract of who may import whom stands in pyproject.toml."""

import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{sys.argv[1]}.{module.name}")
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "package", ["assets", "leaderboard", "models", "progress", "records", "runtime", "tracks"]
)
def test_is_imported_without_torch(package):
    """The Snakefile and the tables need these; torch takes seconds and a gigabyte."""
    code = IMPORT_ALL
    if package == "models":  # the families themselves are modules of torch
        code = "import sys, prunebench.models; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, f"prunebench.{package}"], check=True)
