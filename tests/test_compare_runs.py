"""What is compared of two runs, and what is not."""

import importlib.util
import json

import pytest
import tiny


@pytest.fixture(scope="module")
def script():
    path = tiny.ROOT / "scripts" / "compare_runs.py"
    spec = importlib.util.spec_from_file_location("compare_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    for name in ("old", "new"):
        cell = tmp_path / name / "dit" / "a"
        (cell / "training").mkdir(parents=True)
        (cell / "images.safetensors").write_bytes(b"images")
        (cell / "plan.json").write_text("{}")
        (cell / "training" / "part1.safetensors").write_text(name)  # of no finished stage
        record = {"status": "ok", "quality": {"fid": 1.5}, "wall_s": len(name), "files": {name: ""}}
        (cell / "score.json").write_text(json.dumps(record))
        (cell / "cost.json").write_text(json.dumps({"latency": name}))
    return tmp_path / "old", tmp_path / "new"


def _compared(script, runs) -> list[str]:
    return script.differences(*map(script.contents, runs))


def test_times_and_machines_are_not_compared(script, runs):
    assert _compared(script, runs) == []
    assert len(script.contents(runs[0])) == 3


@pytest.mark.parametrize("file", ["images.safetensors", "plan.json", "score.json"])
def test_what_differs_is_named(script, runs, file):
    changed = runs[1] / "dit/a" / file
    record = {"status": "ok", "quality": {"fid": 1.6}}
    changed.write_text(json.dumps(record))
    assert _compared(script, runs) == [f"differs: dit/a/{file}"]
    changed.unlink()
    assert _compared(script, runs) == [f"only in the old run: dit/a/{file}"]
    assert _compared(script, runs[::-1]) == [f"only in the new run: dit/a/{file}"]
