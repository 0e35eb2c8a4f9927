"""docs/reliability.md is of the tests that there are."""

import importlib.util
import json

import reliability
import tiny


def test_every_test_that_is_counted_exists():
    for test in reliability.tests():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (tiny.ROOT / "tests" / f"{file}.py").read_text(), test


def test_the_page_is_of_these_kinds_and_nothing_was_wrong_in_silence():
    path = tiny.ROOT / "scripts" / "write_reliability.py"
    spec = importlib.util.spec_from_file_location("write_reliability", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    figures = json.loads(script.FIGURES.read_text())
    assert list(figures["kinds"]) == list(reliability.KINDS), "run scripts/write_reliability.py"
    assert script.PAGE.read_text() == script.page(figures)
    for kind, counts in figures["kinds"].items():
        assert sum(counts.values()) > 0 and not counts.get("wrong"), kind


class Report:
    when, failed, skipped = "call", False, False

    def __init__(self, nodeid, failed=False, told=()):
        self.nodeid, self.failed, self.user_properties = nodeid, failed, list(told)


def test_cases_are_counted_and_a_failure_is_wrong():
    counts, (kind, *_) = reliability.Counts(), reliability.KINDS
    test = "tests/test_records.py::test_a_wrong_key_is_named"
    for report in (Report(f"{test}[a]"), Report(f"{test}[b]"), Report(f"{test}[c]", failed=True),
                   Report(test, told=[("refused", 5), ("survived", 2)]),
                   Report("tests/test_records.py::test_other")):  # fmt: skip
        counts.pytest_runtest_logreport(report)
    assert counts.found[kind] == {"refused": 7, "survived": 2, "wrong": 1}
    assert reliability.row("a", counts.found[kind]) == "| a | 10 | 7 | 2 | 1 |"
