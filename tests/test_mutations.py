"""Thousands of slips of the keyboard: each is refused in one line that names the key, or harmless.

`pytest -s tests/test_mutations.py` prints the counts. Every mutation of every committed track takes
minutes: `python tests/test_mutations.py`, which prints what was accepted besides.
"""

import collections
import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from mutations import mutations

from prunebench import tracks
from prunebench.errors import UserError

# Of the mutations of a track every so many is tried; the strides have no factor in common with the
# number of mutations at a place, so that all kinds meet all keys.
STRIDES = {"smoke": 5, "embedded_releases": 17, "efficiency": 23, "text2image": 29}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(tiny.ROOT)


def _use(file: Path) -> None:
    """Everything that planning asks of a track."""
    track = tracks.load_any(str(file))
    assert all(track.records(division) for division in track.divisions)
    track.oracle(), track.assets(), track.needs("efficiency")
    if track.kind == "benchmark":
        for model in track.settings.models:
            track.fingerprint("dense", model=model, dense_seed=0)


def tried(name: str, folder: Path, stride: int = 1) -> tuple[collections.Counter, list]:
    """How many mutations of a track ended how, and (what, key) of the harmless ones."""
    content = yaml.safe_load((tiny.ROOT / "config" / f"{name}.yaml").read_text())
    counts, harmless, file = collections.Counter(), [], folder / "mine.yaml"
    for number, (what, path, changed) in enumerate(mutations(content)):
        if number % stride:
            continue
        text = yaml.dump(changed, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
        file.write_text(text)
        key = next(step for step in reversed(path) if isinstance(step, str))
        try:
            _use(file)
        except UserError as error:
            counts["refused"] += 1
            said = str(error)
            above = [str(step) for step in path[-2:]] if what == "deleted" else [key]
            named = key in said or above[0] in said  # of the last entry that which is left empty
            assert "\n" not in said and str(file) in said and named, (what, path, said)
        else:
            counts["harmless"] += 1
            harmless.append((what, ".".join(map(str, path))))
    return counts, harmless


# What no track may say, wherever it stands; free text and what may be left out aside.
NONSENSE = {"negative", "huge", "NaN", "infinite", "list", "mapping", "in a list", "true"}
BOOLEANS = (".flip", ".cpu_instead")
NAMES = ("models.", "divisions.", "budgets.", "plans.", "methods.parameters.")


@pytest.mark.parametrize("track_name", STRIDES)
def test_mutated_tracks_are_refused_by_name_or_harmless(track_name, tmp_path, record_property):
    counts, harmless = tried(track_name, tmp_path, STRIDES[track_name])
    sys.stdout.write(f"\n{track_name}: {dict(counts)}\n")
    record_property("refused", counts["refused"])
    record_property("survived", counts["harmless"])
    assert counts["refused"] > 10 * counts["harmless"] and sum(counts.values()) > 80
    plain = [(what, key) for what, key in harmless if not key.endswith(BOOLEANS)]
    wrong = [(what, key) for what, key in plain if what in NONSENSE]
    assert not wrong, wrong
    misspelt = [key for what, key in harmless if what == "misspelt"]
    assert all(key.startswith(NAMES) and key.count(".") == 1 for key in misspelt), misspelt


TEXTS = {
    "a key twice": ("seeds: [0]\nseeds: [1]\n", "the key 'seeds' stands there twice"),
    "a key twice below": ("budgets: {low: 1, low: 2}\n", "the key 'low' stands there twice"),
    "a key of a merge twice": (
        "a: &a {low: 1, low: 2}\nbudgets: {<<: *a}\n",
        "the key 'low' stands there twice",
    ),
    "a key that is a boolean": ("models: {on: {}}\n", "the key 'on' is no text to YAML: quote it"),
    "a key that is a number": ("budgets: {10: 100}\n", "the key '10' is no text to YAML"),
    "octal": ("seeds: [010]\n", "reads 010 as another number"),
    "sexagesimal": ("seeds: [1:30]\n", "reads 1:30 as another number"),
    "a date": ("title: 2025-01-01\n", "title: YAML reads a date; quote it"),
    "NaN": ("latency: {wait: .nan}\n", "latency.wait: nan is no number"),
    "infinite": ("seeds: [0, .inf]\n", "seeds.1: inf is no number"),
    "an anchor in itself": ("seeds: &a [*a]\n", "aliases (*name) that refer to themselves"),
    "a mapping in itself": ("models: &a {dit: *a}\n", "aliases (*name) that refer to themselves"),
    "an alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        "aliases (*name) that refer to themselves or multiply",
    ),
    "a bomb of merges": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)),
        "unknown key",
    ),
    "deep": ("seeds: " + "[" * 5000, "more than 50 levels of nesting"),
    "a tag": ("title: !!python/object:os.system {}\n", "could not determine a constructor"),
    "a tag that does not fit": ("title: !!timestamp x\n", "is not valid YAML"),
    "two documents": ("title: a\n---\ntitle: b\n", "expected a single document"),
    "a control character": ('title: "\\u202e"\n', "title: the text has control characters"),
    "NUL": ("title: \0\n", "control characters are not allowed"),
    "a list": ("- 1\n", "the file: a list should be a mapping"),
    "nothing": ("", "the file: None should be a mapping"),
}


def _refusal(file: Path) -> str:
    with pytest.raises(UserError) as raised:
        tracks.load_any(str(file))
    return str(raised.value)


@pytest.mark.parametrize("case", TEXTS)
def test_what_yaml_takes_in_another_sense(tmp_path, case):
    text, message = TEXTS[case]
    (tmp_path / "mine.yaml").write_text(text)
    said = _refusal(tmp_path / "mine.yaml")
    assert message in said and "mine.yaml" in said and "\n" not in said


def test_what_is_no_text_file(tmp_path):
    smoke = (tiny.ROOT / "config" / "smoke.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_bytes(smoke.encode("utf-16"))
    assert "is not UTF-8 text (UTF-16?); save it as UTF-8" in _refusal(file)
    file.write_bytes(smoke.encode("utf-8-sig"))  # a byte order mark changes nothing
    assert tracks.load(str(file)).cells()
    (tmp_path / "folder.yaml").mkdir()
    assert "is not a file" in _refusal(tmp_path / "folder.yaml")
    file.write_text(f"title: {'x' * 1_000_001}")
    assert "more than 1000000 bytes" in _refusal(file)


@pytest.mark.parametrize("stem", ["a b", "$(touch x)", "a'b", "a;b", "a{b}", "a\nb", "é", "-a"])
def test_a_name_that_is_no_folder(tmp_path, stem):
    (tmp_path / f"{stem}.yaml").write_text("title: x")
    said = _refusal(tmp_path / f"{stem}.yaml")
    assert "a track's" in said and "\n" not in said


def test_two_tracks_of_one_name_do_not_share_results(tmp_path):
    file = tmp_path / "smoke.yaml"
    file.write_text((tiny.ROOT / "config" / "smoke.yaml").read_text())
    assert "would share runs/smoke" in _refusal(file)


def test_the_folder_of_a_track_is_one_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "mine.yaml").write_text("title: x")
    runs = tmp_path / "runs" / "mine"
    for name in ("a/mine.yaml", str(tmp_path / "a" / "mine.yaml")):
        tracks.claim(name, runs)
        assert (runs / "track").read_text() == "a/mine.yaml\n"
    with pytest.raises(UserError, match=r"b/mine\.yaml: .*runs/mine holds .* of a/mine\.yaml"):
        tracks.claim("b/mine.yaml", runs)
    Path("a/mine.yaml").unlink()
    tracks.claim("b/mine.yaml", runs)


def test_the_hints():
    """What the remedy is, where a value looks right."""
    smoke = yaml.safe_load((tiny.ROOT / "config" / "smoke.yaml").read_text())
    said = {}
    for rate in ("2e-3", "1E-4", "12e3", "0.5"):
        smoke["models"]["dit"]["recovery"]["learning_rate"] = rate
        with pytest.raises(UserError) as raised:
            tracks.checked(Path("mine.yaml"), smoke)
        said[rate] = str(raised.value).partition("; ")[2]
    assert said == {
        "2e-3": "YAML reads 2e-3 as text: write 2.0e-3",
        "1E-4": "YAML reads 1E-4 as text: write 1.0e-4",
        "12e3": "YAML reads 12e3 as text: write 1.2e+4",
        "0.5": "leave out the quotes: 0.5",
    }


def test_the_schemas_of_editors_are_the_models(tmp_path):
    spec = importlib.util.spec_from_file_location(
        "write_schemas", tiny.ROOT / "scripts" / "write_schemas.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, settings in script.SCHEMAS.items():
        assert (script.FOLDER / name).read_text() == script.text_of(settings), (
            "run python scripts/write_schemas.py"
        )
    for file in (tiny.ROOT / "config").glob("*.yaml"):
        kind = "efficiency" if file.stem == "efficiency" else "track"
        named = f"# yaml-language-server: $schema=../workflow/schemas/{kind}.schema.json\n"
        assert file.read_text().startswith(named), file


if __name__ == "__main__":
    import tempfile

    whole = [f for f in (tiny.ROOT / "config").glob("*.yaml") if "\nbase: " not in f.read_text()]
    for track in sorted(file.stem for file in whole):
        found, passed = tried(track, Path(tempfile.mkdtemp()))
        sys.stdout.write(f"{track}: {dict(found)}\n")
        sys.stdout.writelines(f"    {what} {key}\n" for what, key in passed)
