"""Records are typed, sealed, identified, and refused by name where they are not as they should."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import examples
import pytest
from pydantic import ValidationError

from prunebench.errors import UserError
from prunebench.records import parts, schema, sealed, upgrade

ROOT = Path(__file__).parents[1]
NAMED = "delete it and run|delete .* and run again|run the stage that writes it first"


@pytest.mark.parametrize("stage", schema.RECORDS)
def test_a_record_is_read_as_it_was_written(tmp_path, stage):
    record, file, payload = examples.every()[stage], tmp_path / "a.json", tmp_path / "a.bin"
    payload.write_bytes(b"abc")
    sealed.write(file, record, [payload])
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc"
    for kind in (None, schema.RECORDS[stage]):
        again = sealed.read(file, kind, record.identity)
        assert again.files == {"a.bin": known}
        assert again == examples.changed(record, files=again.files, checksum=again.checksum)


@pytest.mark.parametrize("stage", schema.RECORDS)
def test_equal_records_are_equal_bytes_and_the_checksum_is_of_everything(tmp_path, stage):
    for name in "ab":
        sealed.write(tmp_path / name, examples.every()[stage])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    content = json.loads((tmp_path / "a").read_text())
    given = content.pop("checksum")
    for key in content:
        assert sealed.checksum({**content, key: "other"}) != given
    assert sealed.checksum(dict(reversed(content.items()))) == given


def test_a_record_without_its_payload_is_not_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        sealed.write(tmp_path / "a.json", examples.score(), [tmp_path / "absent.bin"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"value": 1.0, "reason": "x"}, {}, {"value": float("nan")},
                                    {"value": "1"}, {"number": 1.0}])  # fmt: skip
def test_a_quality_is_a_number_or_the_reason_for_none(change):
    with pytest.raises(ValidationError):
        parts.Quality(**change)


def test_a_record_is_ok_or_says_why_it_failed():
    with pytest.raises(ValidationError, match="failed and says why"):
        examples.changed(examples.failed(), failure=None)
    with pytest.raises(ValidationError, match="status 'failed' and the reason"):
        examples.efficiency(size=None)
    with pytest.raises(ValidationError, match=r"identity\.stage is 'score', not 'sample'"):
        identity = parts.CellIdentity(stage="score", **examples.CELL)
        examples.changed(examples.every()["sample"], identity=identity.model_dump())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{}", "has no checksum"),
        (b"[]", "is not a record"),
        (b"", "is corrupt"),
        (b"\xff\xfe", "is corrupt"),
        (b'{"version": 2', "is corrupt"),
        (b"[" * 100_000, "is corrupt"),
        (b'{"schema": 1, "status": "ok"}', "is not a record of version 2"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"a\.json {reason}.*; ({NAMED})"):
        sealed.read(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"no\.json does not exist; run the stage"):
        sealed.read(tmp_path / "no.json")


def rewritten(file: Path, change) -> None:
    """Change a record's content and seal it again, as only somebody on purpose does."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps({**content, "checksum": sealed.checksum(content)}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("files"), None),  # holds none, as the record of its cost does
        (lambda c: c.update(version=3), "its version is 3"),
        (lambda c: c["quality"].update(recall={"value": "x"}), "score: quality.recall.value"),
        (lambda c: c["identity"].update(method="../x"), "identity.*method"),
        (lambda c: c["identity"].update(stage="nothing"), "identity.stage is 'nothing'"),
        (lambda c: c.update(more=1), "more: Extra inputs"),
        (lambda c: c.pop("plan"), "plan: Field required"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, change, reason):
    sealed.write(tmp_path / "a.json", examples.score())
    rewritten(tmp_path / "a.json", change)
    if reason:
        with pytest.raises(UserError, match=rf"a\.json .*{reason}"):
            sealed.read(tmp_path / "a.json")
    else:
        assert sealed.read(tmp_path / "a.json").files == {}


def test_a_failure_is_read_in_place_of_a_cells_record(tmp_path):
    sealed.write(tmp_path / "a.json", examples.failed())
    record = sealed.read(tmp_path / "a.json", schema.Score)
    assert isinstance(record, schema.Failed) and record.failure.stage == "select"


def test_another_cells_record_and_another_stages_are_refused(tmp_path):
    files = examples.finished_run(tmp_path)
    other = parts.CellIdentity(stage="sample", **{**examples.CELL, "seed": 1})
    with pytest.raises(UserError, match=r"sample of embedded/sit/0/a/.*/0, not of .*/1; was its"):
        sealed.read(files["sample"], schema.Sample, other)
    with pytest.raises(UserError, match="is not a record of sample"):
        sealed.read(files["recover"], schema.Sample)


def test_what_a_record_was_made_from_is_checked(tmp_path):
    files = examples.finished_run(tmp_path)
    recovered, chosen = sealed.read(files["recover"]), sealed.read(files["select"])
    sealed.check_made_from(files["recover"], recovered, select=chosen)
    (files["select"].parent / "model.safetensors").write_bytes(b"other weights")
    payload = [files["select"].parent / name for name in chosen.files]
    sealed.write(files["select"], chosen, payload)
    with pytest.raises(UserError, match=r"recover\.json was made from another select/model\.safe"):
        again = sealed.read(files["select"])
        sealed.check_made_from(files["recover"], recovered, select=again)
    with pytest.raises(UserError, match="was made from another method than there is now"):
        sealed.check_made_from(files["recover"], recovered, method=examples.HASH)


def test_a_record_stands_for_its_payload_or_for_itself(tmp_path):
    files = examples.finished_run(tmp_path)
    made = sealed.made_from(cost=sealed.read(files["cost"]), sample=sealed.read(files["sample"]),
                            method=Path(__file__), data="f00")  # fmt: skip
    assert list(made) == ["cost", "sample/images.safetensors", "method", "data"]
    assert made["cost"] == json.loads(files["cost"].read_text())["checksum"]
    assert made["data"] == "f00" and made["method"] == sealed.sha256(Path(__file__))


# What a record says of its cost


@pytest.mark.parametrize("texts", [0, 10_000])
@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_the_beginning_of_a_record_says_what_it_cost(tmp_path, texts, gpu):
    training = examples.TRAINING.model_copy(update={"processes": 2})
    inputs = {f"input{i}": examples.HASH for i in range(texts)}
    record = examples.changed(examples.every()["dense"], training=training.model_dump(), wall_s=2.5,
                              provenance={"gpu": gpu}, inputs=inputs)  # fmt: skip
    sealed.write(tmp_path / "a.json", record)
    assert sealed.skim(tmp_path / "a.json") == {
        "status": "ok", "wall_s": 2.5, "gpu": gpu is not None, "processes": 2, "failure": None
    }  # fmt: skip


def test_a_failure_is_skimmed_however_long_its_text(tmp_path):
    failure = parts.Failure(stage="select", error="x" * 10_000, log=None)
    sealed.write(tmp_path / "a.json", examples.failed(failure=failure))
    found = sealed.skim(tmp_path / "a.json")
    assert (found["status"], found["wall_s"]) == ("failed", 0.0)
    assert found["failure"] == failure.model_dump()


@pytest.mark.parametrize("text", ["{}", "[]", '{"status": "ok"', '{"status": "ok", "x": null}', ""])
def test_what_is_no_record_is_not_skimmed(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):
        sealed.skim(tmp_path / "a.json")


# Older records


def committed() -> list[Path]:
    return sorted((ROOT / "results").rglob("raw/**/*.json"))


def test_committed_records_are_read():
    kinds = [type(upgrade.parse(file, file.read_bytes())) for file in committed()]
    assert {schema.Score, schema.Oracle, schema.Efficiency} <= set(kinds)


def test_an_upgraded_score_says_what_the_old_one_did(tmp_path):
    file = next(file for file in committed() if "magnitude_2_4" in str(file))
    old = json.loads(file.read_text())
    if "schema" not in old:
        pytest.skip("the committed records are of today's version")
    new = upgrade.parse(file, file.read_bytes())
    assert new.identity.method == old["cell"]["method"] and new.identity.dense_seed == 0
    assert new.quality["fid"].value == old["quality"]["fid"]
    assert new.quality["ssim"].value == old["consistency"]["ssim"]
    assert new.quality["inception_score"].reason == old["quality"]["unavailable"]["inception_score"]
    assert new.latency.sampling.ratio == old["latency"]["sampling"]["ratio"]
    assert new.inputs == {"method": old["settings"]["method_sha256"]}
    assert new.files == old["files"] and new.checksum
    with pytest.raises(UserError, match=r"not a record of version 2 \(its version is 1\)"):
        sealed.parse(file, file.read_bytes())
    with pytest.raises(UserError, match="not a record of schema 1: KeyError"):
        upgrade.parse(file, b'{"schema": 1, "status": "ok"}')


def test_the_documentation_is_generated():
    spec = importlib.util.spec_from_file_location("w", ROOT / "scripts" / "write_records.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for file, text in script.written().items():
        assert file.read_text() == text, f"run scripts/write_records.py: {file} is out of date"


# A finished run, corrupted in 500 ways

SOURCES = {"select": ["dense"], "cost": ["dense", "select"], "recover": ["dense", "select"],
           "sample": ["recover"],
           "score": ["dense", "select", "recover", "sample", "cost", "extractor"]}  # fmt: skip


def check_run(files: dict[str, Path], identities: dict) -> dict[str, schema.Sealed]:
    """What the stages of a cell read, each as the result that it has to be."""
    found = {name: sealed.read(file, schema.RECORDS[name], identities[name])
             for name, file in files.items()}  # fmt: skip
    for stage, names in SOURCES.items():
        sealed.check_made_from(files[stage], found[stage], **{n: found[n] for n in names})
    return found


def flip(random_: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    file.write_bytes(content)


def edit(random_: random.Random, file: Path) -> None:
    """Change, delete or add one value anywhere in a record."""
    content = json.loads(file.read_text())
    place, path = content, []
    while isinstance(place, dict) and place:
        path.append(random_.choice(sorted(place)))
        place = place[path[-1]]
    parent = content
    for name in path[:-1]:
        parent = parent[name]
    what = random_.choice(["delete", "null", "number", "text", "add"])
    if what == "delete":
        del parent[path[-1]]
    else:
        values = {"null": None, "number": random_.random(), "text": "x", "add": 1}
        parent[path[-1] + "x" * (what == "add")] = values[what]
    file.write_text(json.dumps(content))


def cut(random_: random.Random, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random_.randrange(len(content))])


def attack(random_: random.Random, files: dict[str, Path], other: dict[str, Path]) -> str:
    """Do one harm to a run; returns its kind."""
    stage = random_.choice(sorted(files))
    file = files[stage]
    payload = [file.parent / name for name in json.loads(file.read_text())["files"]]
    kind = random_.choice(["flip", "edit", "cut", "empty", "swap", "folder", "payload", "gone"])
    if kind == "flip":
        flip(random_, file)
    elif kind == "edit":
        edit(random_, file)
    elif kind == "cut":
        cut(random_, file)
    elif kind == "empty":
        file.write_text(random_.choice(["{}", "[]", "null", "", '{"status": "ok"}']))
    elif kind == "swap":  # the record alone, of another cell or another stage of this one
        others = [*other.values(), *(found for found in files.values() if found != file)]
        shutil.copy(random_.choice(others), file)
    elif kind == "folder":
        shutil.copytree(other[stage].parent, file.parent, dirs_exist_ok=True)
    elif payload:
        chosen = random_.choice(payload)
        flip(random_, chosen) if kind == "payload" else chosen.unlink()
    return kind


def test_500_corruptions_of_a_finished_run_are_refused_by_name_or_harmless(
    tmp_path, capsys, record_property
):
    whole, other = tmp_path / "whole", tmp_path / "other"
    files = examples.finished_run(whole)
    others = examples.finished_run(other, "b", 1)
    identities = {name: sealed.read(file).identity for name, file in files.items()}
    before = check_run(files, identities)
    contents = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    random_, counts, wrong = random.Random(0), {}, []
    for number in range(500):
        kind = attack(random_, files, others)
        try:
            outcome = "harmless" if check_run(files, identities) == before else "wrong"
        except UserError as error:
            named = str(whole) in str(error) and "\n" not in str(error)
            outcome = "refused" if named else "unnamed"
        counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
        if outcome not in ("refused", "harmless"):
            wrong.append((number, kind, outcome))
        for file, content in contents.items():
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
    with capsys.disabled():
        print(f"\n500 corruptions of a run: {dict(sorted(counts.items()))}")
    assert wrong == [] and sum(counts.values()) == 500
    refused = sum(count for (_, outcome), count in counts.items() if outcome == "refused")
    record_property("refused", refused)
    record_property("survived", 500 - refused)
