"""The README's figures are those of the committed results, and its example is a real method."""

import importlib.util
import re
from pathlib import Path

import pandas as pd
import tiny
import yaml

from prunebench import models
from prunebench.tracks import methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _script(name="write_results"):
    spec = importlib.util.spec_from_file_location("write", ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_results_in_the_documents_are_the_committed_ones():
    pages = _script().written()
    assert len(pages) > 5
    for page, text in pages.items():
        assert page.read_text() == text, f"run scripts/write_results.py: {page} is out of date"


def test_the_table_of_systems_is_that_of_the_files():
    script = _script("write_systems")
    assert script.written(README) == README, "run scripts/write_systems.py"
    implemented = set(re.findall(r"`(\w+)`", script.table()))
    assert implemented >= set(tiny.found_methods()), "a method is in no system"


def test_a_system_that_lacks_its_file_is_not_implemented(tmp_path):
    script = _script("write_systems")
    script.FOLDERS["method"] = tmp_path
    mine = '"""What it does."""\nKIND = "layers"\nFAITHFUL_TO = "its code"\n'
    (tmp_path / "wanda.py").write_text(f'{mine}FAMILIES = ("dit",)\ndef select(context): ...\n')
    lines = script.table().splitlines()
    assert "| EcoDiff | learned masks | no | — | — | — | — |" in lines
    told = "| Wanda | selection | `wanda` | its code | no | dit | selections, methods |"
    assert told in lines


def test_every_published_method_of_a_paper_has_a_page_with_its_result():
    rows = pd.read_csv(ROOT / "results" / "embedded" / "leaderboard.csv")
    named = set(rows[rows.paper.notna() & ~rows.control].method)
    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "methods").glob("*.md")}
    # Methods that the embedded track leaves out have a page without its result.
    assert named <= set(pages) <= set(methods.discover([ROOT / "methods"]).methods)
    for name in named:
        found = re.findall(r"FID is lower in \d+ of [1-9]\d* comparisons", pages[name])
        assert len(found) == 2, name


def test_nothing_was_left_to_be_filled_in():
    assert re.findall(r"[A-Z]+_(?:TEXT|MINUTES)", README) == []


def test_examples_keep_the_contract(tmp_path):
    for document in (README, (ROOT / "docs" / "add_a_method.md").read_text()):
        code = re.search(r"```python\n(.*?)```", document, re.DOTALL).group(1)
        (tmp_path / "mine.py").write_text(code)
        assert methods.read(tmp_path / "mine.py").kind == "layers"


def test_the_table_has_every_track():
    table = README.partition("\n## Tracks\n")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert sorted(named) == sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))


def test_counts_are_those_of_the_package():
    table = yaml.safe_load((ROOT / "config/efficiency.yaml").read_text())["models"]
    published = [set(models.published(family)) for family in models.family_names()]
    assert f"{len(set.union(*published) & set(table))} published networks" in README
    assert f"{sum(map(len, published))} published configurations" in README


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
