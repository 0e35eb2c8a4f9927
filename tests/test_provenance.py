import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from importlib import metadata

import pytest

from prunebench.records import provenance as module
from prunebench.records.provenance import code_hash, config_hash, provenance

KEYS = "commit dirty code config date cpu cores gpu memory_gb os python packages"


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package, results and one commit."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # set while a git hook runs these tests
    root = tmp_path / "checkout"
    for file in ("package/__init__.py", "results/board.csv", "config.yaml"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("first\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    yield root
    module._git.cache_clear()


def state(root):
    module._git.cache_clear()
    return module._git(root / "package")


def test_record_has_the_agreed_keys_and_json_types():
    record = provenance({"track": "embedded"})
    assert " ".join(record) == KEYS
    assert json.loads(json.dumps(record)) == record
    assert record["packages"]["torch"] == metadata.version("torch")
    assert len(record["packages"]) == 10
    assert all(record["packages"].values())
    assert record["cores"] >= 1
    assert record["cpu"]
    age = datetime.now(UTC) - datetime.fromisoformat(record["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_commit_and_edits_of_tracked_files(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert state(checkout) == (commit, False)
    (checkout / "runs").mkdir()
    (checkout / "runs" / "model.bin").touch()
    (checkout / "results" / "board.csv").write_text("second\n")
    assert state(checkout) == (commit, False)
    (checkout / "config.yaml").write_text("second\n")  # outside of the package's folder
    assert state(checkout) == (commit, True)
    git(checkout, "add", "config.yaml")
    assert state(checkout) == (commit, True)


def test_worktree(checkout, tmp_path):
    git(checkout, "worktree", "add", "--quiet", str(tmp_path / "other"))
    (checkout / "config.yaml").write_text("second\n")
    assert state(tmp_path / "other") == (git(checkout, "rev-parse", "HEAD"), False)


def test_no_commit_outside_of_git_or_in_a_foreign_repository(checkout, tmp_path, monkeypatch):
    (tmp_path / "alone" / "package").mkdir(parents=True)
    assert state(tmp_path / "alone") == (None, False)
    installed = checkout / ".venv"
    (installed / "package").mkdir(parents=True)
    (installed / "package" / "__init__.py").touch()
    assert state(installed) == (None, False)
    monkeypatch.setenv("PATH", "")
    assert state(checkout) == (None, False)


def test_git_is_asked_once(checkout, monkeypatch):
    first = state(checkout)
    monkeypatch.setattr(module, "_run", None)
    assert module._git(checkout / "package") == first


def test_code_hash_depends_on_names_and_contents_of_sources(tmp_path):
    def hash_of(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        code_hash.cache_clear()
        return code_hash(tmp_path)

    first = hash_of(a_py="1", b_py="2")
    assert first == hash_of(b_py="2", a_py="1", notes_txt="any")
    others = {hash_of(a_py="2", b_py="1"), hash_of(a_py="12", b_py=""), hash_of(a_py="1", c_py="2")}
    assert len(others | {first}) == 4


def test_config_hash_ignores_order_only():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1, "b": [1, 2]}) != config_hash({"a": 1, "b": [2, 1]})
    known = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of "{}"
    assert config_hash({}) == known
