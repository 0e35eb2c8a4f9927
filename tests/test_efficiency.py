"""Efficiency tracks: what loads, hand-counted costs, the measuring code on a CPU, the tables."""

import functools
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from prunebench import cli, models, tracks
from prunebench.errors import CellError, UserError
from prunebench.evaluation import variants
from prunebench.leaderboard import efficiency as table
from prunebench.pruning.plan import Plan
from prunebench.records import schema, sealed, upgrade
from prunebench.stages import efficiency as stage
from prunebench.stages import networks
from prunebench.tracks import efficiency
from prunebench.tracks.settings_efficiency import Network
from prunebench.tracks.settings_efficiency import Plan as Asked

COMMITTED = tiny.ROOT / "results" / "efficiency"
DEPTH, WIDTH, TOKENS = 4, 32, 16
DIT = {**tiny.INSTANCES["dit"].config}
TRACK = {
    "kind": "efficiency",
    "title": "Tiny",
    "seed": 0,
    "device": "cuda",
    "precisions": ["fp32", "bf16"],
    "modes": ["eager"],
    "rounds": 2,
    "warmup": 0,
    "wait": 0,
    "models": {
        "dit": {
            "family": "dit",
            "title": "Tiny DiT",
            "config": DIT,
            "x": [1, 8, 8],
            "batches": [1, 3],
        }
    },
    "plans": {
        "layers_50": {"kind": "layers", "sparsity": 0.5},
        "widths_25": {"kind": "widths", "sparsity": 0.25},
        "uniform_50": {"kind": "uniform", "sparsity": 0.5},
        "sparse_2_4": {"kind": "2:4"},
        "named": {"kind": "layers", "layers": ["blocks.1", "blocks.2.mlp"]},
    },
    "published": [
        {
            "title": "A <paper> & co",
            "speedup": 2.0,
            "paper": "Somebody 2024",
            "source": "Table 1",
            "conditions": "not stated",
            "model": "dit",
            "plan": "layers_50",
            "beside": {"precision": "bf16", "mode": "eager", "batch": 3},
            "differs": "it is tiny",
        }
    ],
}


@pytest.fixture
def load(tmp_path):
    """Loads the tiny track with changes: {"a.b": value}."""

    def loaded(changes: dict | None = None) -> efficiency.Track:
        content = json.loads(json.dumps(TRACK))
        for dotted, value in (changes or {}).items():
            *parents, last = dotted.split(".")
            entry = content
            for key in parents:
                entry = entry[int(key)] if isinstance(entry, list) else entry[key]
            entry[last] = value
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return efficiency.load(str(tmp_path / "tiny.yaml"))

    return loaded


def run(track: efficiency.Track, folder: Path, *plans: str) -> list[schema.Efficiency]:
    """Records of the named plans of the first model; of all without names."""
    model = next(iter(track.settings.models))
    for plan in plans or [plan for _, plan in track.rows()]:
        tiny.run("efficiency", track, folder, model=model, plan=plan)
    names = plans or [plan for _, plan in track.rows()]
    return [sealed.read(track.record(model, plan, folder)) for plan in names]


def texts(track: efficiency.Track, folder: Path) -> dict[str, str]:
    """The tables of what `run` has left."""
    table.build(track, sorted(folder.rglob("efficiency.json")), folder / "out")
    return {file.name: file.read_text() for file in (folder / "out").glob("leaderboard.*")}


# Tracks


def test_the_committed_track_names_every_family_and_published_speedup(monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    track = tracks.load_any("efficiency")
    published = {family for family in models.family_names() if models.published(family)}
    assert {m.family for m in track.settings.models.values()} == published
    assert [claim.speedup for claim in track.settings.published] == [2.22, 1.96, 1.2, 1.95]
    kinds = {plan.kind for plan in track.settings.plans.values()}
    assert kinds == {"layers", "widths", "uniform", "2:4"}
    assert track.rows()[0] == ("dit_xl_2_256", "dense")
    assert ("dit_xl_2_256", "snapfusion_removals") not in track.rows()
    assert [p for m, p in track.rows() if m == "uvit_wide"] == ["dense", "sparse_2_4"]
    assert track.needs("efficiency")["gpu"] == 1


REFUSED = {
    "unknown family": ({"models.dit.family": "dti"}, r"models\.dit\.family: unknown family 'dti'"),
    "unknown configuration": ({"models.dit.config": "dit_xxl"}, r"models\.dit\.config: .*dit_xl_2"),
    "no shape": ({"models.dit.x": [8, 8]}, r"models\.dit\.x"),
    "batches": ({"models.dit.batches": [2]}, r"models\.dit\.batches: begins with 1"),
    "unknown kind": ({"plans.layers_50.kind": "depth"}, r"plans\.layers_50"),
    "no sparsity": ({"plans.layers_50": {"kind": "layers"}}, r"plans\.layers_50"),
    "sparsity of a pattern": ({"plans.sparse_2_4.sparsity": 0.5}, r"plans\.sparse_2_4"),
    "named widths": ({"plans.named.kind": "widths"}, r"plans\.named"),
    "reserved": ({"plans.dense": {"kind": "2:4"}}, r"plans\.dense: the name is taken"),
    "plan of a model": (
        {"models.dit.plans": ["half"]},
        r"models\.dit\.plans: unknown plan 'half'",
    ),
    "model of a plan": ({"plans.named.models": ["sit"]}, r"plans\.named\.models: unknown .*'sit'"),
    "unknown key": ({"latency": {}}, "latency: unknown key"),
    "unknown rule": (
        {"needs": {"costs": {"gpu": 1}}},
        r"needs\.costs: unknown stage 'costs'; did you mean 'cost'",
    ),
    "claim of no row": ({"published.0.plan": "half"}, r"published\.0: unknown plan 'half'"),
    "claim of no condition": (
        {"published.0.beside.batch": 64},
        r"published\.0\.beside\.batch: 64 is none of the batches: 1, 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case, load):
    changes, message = REFUSED[case]
    if "needs" in changes:
        changes = {"needs": changes["needs"]}
    with pytest.raises(UserError, match=message):
        load(changes)


def test_names_given_by_hand_are_checked(load, tmp_path, capsys):
    track = load({"plans.named.models": ["dit"]})
    with pytest.raises(UserError, match="unknown model 'sit' in track tiny; did you mean 'dit'"):
        track.model("sit")
    with pytest.raises(UserError, match="unknown plan 'half' in track tiny; known: dense, layers"):
        track.plan("dit", "half")
    with pytest.raises(UserError, match="unknown division 'matched'"):
        track.records("matched")
    with pytest.raises(UserError, match=r"plans\.named|block that does not exist|does not exist"):
        track = load({"plans.named.layers": ["blocks.9"]})
        run(track, tmp_path, "named")
    file = str(tmp_path / "tiny.yaml")
    assert cli.main(["efficiency", "--track", file, "--model", "sit", "--plan", "dense"]) == 2
    assert cli.main(["dense", "--track", file, "--model", "dit"]) == 2
    assert "is an efficiency track" in capsys.readouterr().err


def test_what_reruns(load):
    before = load().fingerprint("efficiency", "dit", "layers_50")
    assert (
        load({"title": "Other", "wait": 5}).fingerprint("efficiency", "dit", "layers_50") == before
    )
    for change in (
        {"plans.layers_50.sparsity": 0.25},
        {"rounds": 3},
        {"models.dit.batches": [1, 3, 4]},
    ):
        assert load(change).fingerprint("efficiency", "dit", "layers_50") != before


# Counted


def block_macs() -> tuple[int, int]:
    """Of one block of the tiny DiT: matrices and modulation, and the two attention products."""
    return TOKENS * 12 * WIDTH**2 + 6 * WIDTH**2, 2 * TOKENS**2 * WIDTH


def test_costs_of_a_dit_by_hand(load, tmp_path):
    dense, layers, sparse, named = run(
        load(), tmp_path, "dense", "layers_50", "sparse_2_4", "named"
    )
    matrices, products = block_macs()
    size, whole = layers.size, dense.size
    assert len(layers.layers) == 2 == DEPTH // 2
    assert whole.macs - size.macs == 2 * (matrices + products)
    difference = [s.macs_without_attention_products for s in (whole, size)]
    assert difference[0] - difference[1] == 2 * matrices
    block = 18 * WIDTH**2 + 15 * WIDTH
    assert whole.parameters - size.parameters == 2 * block
    assert size.dense_macs == whole.macs
    # 2:4 zeroes half of the matrices of attention and MLP, and no count of MACs changes.
    assert sparse.size.macs == whole.macs
    assert whole.parameters - sparse.size.nonzero_parameters == DEPTH * 6 * WIDTH**2
    # One block, and the MLP of another with its half of the modulation.
    branch = TOKENS * 8 * WIDTH**2 + 3 * WIDTH**2
    assert whole.macs - named.size.macs == matrices + products + branch


def test_widths_leave_what_was_asked_for(load, tmp_path):
    dense, widths, uniform = run(load(), tmp_path, "dense", "widths_25", "uniform_50")
    assert widths.size.sparsity_reached == pytest.approx(0.25, abs=0.02)
    assert {(left, of) for left, of in uniform.left.values()} == {(2, 4), (64, 128)}
    # Half of the heads and neurons leave half of the matrices' and of the attention's MACs.
    saved = dense.size.macs - uniform.size.macs
    matrices, products = block_macs()
    assert saved == DEPTH * (matrices - 6 * WIDTH**2 + products) // 2


def test_full_size_counts_are_the_published_ones(monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    track = tracks.load_any("efficiency")
    for name in ("dit_xl_2_256", "sd15", "ddpm_cifar10", "uvit_s_2_cifar10"):
        settings = track.model(name)
        entry = models.published(settings.family)[name]
        network = networks.dense(settings)
        found = stage._size(stage.Row(settings, network, network, Plan()))
        for key in ("parameters", "macs", "macs_without_attention_products"):
            assert found[key] == getattr(entry, key), (name, key)


def test_a_plan_that_can_not_be_is_a_failed_row(load, tmp_path):
    (record,) = run(load({"plans.widths_25.sparsity": 0.97}), tmp_path, "widths_25")
    assert record.status == "failed"
    assert "97% of the parameters can't be removed" in record.failure.error
    with pytest.raises(CellError):
        networks.pruned(load().model("dit"), Asked(kind="widths", sparsity=0.97), 0)


@pytest.mark.parametrize("name_", ["unet", "unet_attention"])
def test_widths_of_a_unet_do_not_need_memory_or_its_image_size(name_):
    """What is traced on a small image is what one of its own size gives."""
    instance = tiny.INSTANCES[name_]
    settings = _network(name_)
    real, empty = tiny.dense(name_), networks.dense(settings)
    expected, found = instance.module.widths(real), instance.module.widths(empty)
    side = instance.config["sample_size"]
    assert side > 2 ** len(real.down_blocks)
    example = torch.zeros(1, 1, side, side), torch.zeros(1).long(), torch.zeros(1).long()
    original, instance.module._example = instance.module._example, lambda _: example
    try:
        whole = instance.module.widths(real)
    finally:
        instance.module._example = original
    assert all(parameter.is_meta for parameter in empty.parameters())
    for units in (found, whole):
        assert [(u.name, u.size, u.groups) for u in units] == [
            (u.name, u.size, u.groups) for u in expected
        ]
        for one, other in zip(units, expected, strict=True):
            for left, right in zip(one.members, other.members, strict=True):
                assert (left.tensor, left.axis) == (right.tensor, right.axis)
                assert torch.equal(left.index, right.index)


# Measured


def _network(name: str) -> Network:
    """A tiny instance as an efficiency track would name it."""
    instance = tiny.INSTANCES[name]
    return Network(
        family=instance.family,
        config=dict(instance.config),
        title=name,
        x=instance.shape,
        batches=(1,),
    )


@pytest.mark.parametrize("name_", tiny.SHAPES)
@pytest.mark.parametrize("plan", ["layers", "widths", "2:4"])
def test_random_weights_run_in_bf16(name_, plan):
    """Every architecture, pruned, straight in its dtype; a 2:4 network keeps the pattern."""
    settings = _network(name_)
    wanted = Asked(kind=plan, sparsity=None if plan == "2:4" else 0.25)
    network, chosen, _ = networks.pruned(settings, wanted, 0)
    assert all(parameter.is_meta for parameter in network.parameters())
    real = networks.materialised(network, chosen, torch.device("cpu"), torch.bfloat16)
    tensors = [*real.parameters(), *(b for b in real.buffers() if b.is_floating_point())]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    with torch.inference_mode():
        output = real(*networks.inputs(settings, 2, "cpu", torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all() and output.std() > 0
    for weight in chosen.masks:
        groups = real.get_parameter(weight).movedim(1, -1).unflatten(-1, (-1, 4))
        assert ((groups != 0).sum(-1) <= 2).all()
    assert bool(chosen.masks) == (plan == "2:4")


def test_without_a_gpu_nothing_is_measured(load, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    records = run(load(), tmp_path, "dense", "layers_50")
    assert all(r.timings == () and r.not_measured == "no GPU" for r in records)
    found = texts(load(), tmp_path)
    assert "not measured: no GPU" in found["leaderboard.md"]
    assert "not measured here" in found["leaderboard.md"]
    assert "4 rows are not finished" in found["leaderboard.md"]
    for text in found.values():
        assert "images_per_s" not in text and "Images/s" not in text


def test_measuring_runs_on_a_cpu_where_a_track_says_so(load, tmp_path):
    track = load({"device": "cpu"})
    layers, sparse = run(track, tmp_path, "layers_50", "sparse_2_4")
    places = [(t.precision, t.mode, t.batch) for t in layers.timings]
    assert places == [(p, "eager", b) for p in ("fp32", "bf16") for b in (1, 3)]
    for timing in layers.timings:
        assert timing.ms > 0 and timing.ratio == timing.ms / timing.dense_ms
        assert timing.images_per_s == pytest.approx(1e3 * timing.batch / timing.ms)
        assert 0 < timing.peak_memory_mb < timing.dense_peak_memory_mb
    assert {t.failure for t in sparse.timings} == {
        "2:4 kernels exist in half precision only",
        "no 2:4 kernels on this CPU: the pattern brings no speed",
    }
    text = texts(track, tmp_path)["leaderboard.md"]
    assert f"{1 / layers.timings[3].ratio:.2f}×" in text.split("## Tiny DiT")[0]
    assert "sparse\\_2\\_4: not timed in fp32" in text and "Images/s" in text


def test_compiled_networks_are_measured(load, tmp_path, monkeypatch):
    """Traced by dynamo and run as they are; inductor takes most of a minute."""
    backend = functools.partial(variants.compiled, backend="eager")
    monkeypatch.setattr(variants, "compiled", backend)
    changes = {"device": "cpu", "modes": ["compiled"], "precisions": ["fp32"], "published": []}
    track = load({**changes, "models.dit.batches": [1]})
    (record,) = run(track, tmp_path, "layers_50")
    assert [t.mode for t in record.timings] == ["compiled"]
    assert record.timings[0].ms > 0


def test_what_does_not_fit_is_recorded_as_such(load, tmp_path, monkeypatch):
    """No memory for the weights in one precision; in the other, for one batch."""
    track, real = load({"device": "cpu"}), networks.materialised

    def materialised(network, plan, device, dtype):
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 48 GiB")
        return real(network, plan, device, dtype)

    compare = variants.compare

    def narrow(pair, given, timed, wait):
        if len(given["forward"][0]) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return compare(pair, given, timed, wait)

    monkeypatch.setattr(networks, "materialised", materialised)
    monkeypatch.setattr(variants, "compare", narrow)
    (record,) = run(track, tmp_path, "layers_50")
    failures = [timing.failure for timing in record.timings]
    assert all("out of memory" in failures[index] for index in (0, 1, 3)), failures
    assert failures[2] is None and record.status == "ok"
    text = texts(track, tmp_path)["leaderboard.md"]
    assert "not timed in fp32, eager, batch 1: out of memory" in text


# Tables


def test_tables_are_escaped_and_the_same_for_the_same_records(load, tmp_path):
    track = load()
    run(track, tmp_path / "runs")
    files = [Path(record) for record in track.records(runs=tmp_path / "runs")]
    table.build(track, files, tmp_path / "one")
    table.build(track, files, tmp_path / "two")
    table.build(track, files[:-1], tmp_path / "two")
    assert len(list((tmp_path / "two" / "raw").rglob("*.json"))) == len(files) - 1
    table.build(track, files, tmp_path / "two")
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 6 + len(files)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    page = (tmp_path / "one" / "leaderboard.html").read_text()
    assert "A &lt;paper&gt; &amp; co" in page and "<paper>" not in page
    assert (
        r"A \textless{}paper\textgreater{} \& co"
        in (tmp_path / "one" / "leaderboard.tex").read_text()
    )


def test_the_committed_tables_are_made_of_the_committed_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    track = tracks.load_any("efficiency")
    files = [COMMITTED / "raw" / model / f"{plan}.json" for model, plan in track.rows()]
    table.build(track, files, tmp_path, older=True)
    for kind in ("csv", "md", "tex", "html", "bib"):
        name = f"leaderboard.{kind}"
        assert (tmp_path / name).read_text() == (COMMITTED / name).read_text(), name
    for file in files:
        record = upgrade.parse(file, file.read_bytes())
        assert not record.provenance.dirty
        name, family = record.identity.model, record.settings["model"]["family"]
        entry = models.published(family).get(name)
        if record.identity.plan == "dense" and entry:
            assert record.size.macs == entry.macs
            assert record.size.parameters == entry.parameters
