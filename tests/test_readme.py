"""The README's figures are those of the committed results, and its example is a real method."""

import importlib.util
import re
from pathlib import Path

import pandas as pd

from prunebench import methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_results_in_the_readme_are_the_committed_ones():
    spec = importlib.util.spec_from_file_location("update", ROOT / "scripts" / "update_readme.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.updated(README, pd.read_csv(update.RESULTS)) == README


def test_examples_keep_the_contract(tmp_path):
    for document in (README, (ROOT / "docs" / "add_a_method.md").read_text()):
        code = re.search(r"```python\n(.*?)```", document, re.DOTALL).group(1)
        (tmp_path / "mine.py").write_text(code)
        assert methods.read(tmp_path / "mine.py").kind == "layers"


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
