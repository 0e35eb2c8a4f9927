"""Tracks: what loads, what is refused with which words, the cells, and what recomputes."""

import inspect
import itertools
import json
import re

import pytest
import tiny
import yaml
from accelerate import init_empty_weights

from prunebench import models, tracks
from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import OBJECTIVES, objective
from prunebench.errors import UserError
from prunebench.tracks.settings_benchmark import FlowObjective, NoiseObjective

SMOKE = tiny.ROOT / "config" / "smoke.yaml"
TRACKS = sorted(
    path.stem
    for path in SMOKE.parent.glob("*.yaml")
    if "kind" not in yaml.safe_load(path.read_text())  # others: tests/test_efficiency.py
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(tiny.ROOT)


@pytest.fixture
def edited(tmp_path):
    """Loads the smoke track with changes: {"a.b": value}, ... deletes."""

    def load(changes: dict, methods: dict | None = None) -> tracks.Track:
        # Through JSON, because entries that YAML anchors share would change together.
        content = json.loads(json.dumps(yaml.safe_load(SMOKE.read_text())))
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            entry = content
            for key in parents:
                entry = entry.setdefault(key, {})
            entry[last] = value
            if value is ...:
                del entry[last]
        for name, text in (methods or {}).items():
            (tmp_path / "more").mkdir(exist_ok=True)
            (tmp_path / "more" / f"{name}.py").write_text(text)
            content["methods"]["folders"] = ["methods", str(tmp_path / "more")]
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return tracks.load(str(file))

    return load


@pytest.mark.parametrize("track", TRACKS)
def test_committed_tracks_load(track):
    loaded = tracks.load(track)
    assert loaded.name == track and loaded.cells()
    assert {"dense", "random_layers", "scratch", "fewer_steps"} <= set(loaded.methods)
    assert tracks.load(f"config/{track}.yaml").settings == loaded.settings


def test_a_track_may_rest_on_another(tmp_path):
    (tmp_path / "whole.yaml").write_text(SMOKE.read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: whole\nseeds: [7]\nmodels: {dit: {config: {depth: 6}}}\n")
    ours, whole = tracks.load(str(mine)), tracks.load(str(SMOKE))
    assert ours.name == "mine" and ours.settings.seeds == (7,)
    assert ours.model("dit").config == {**whole.model("dit").config, "depth": 6}
    assert ours.model("unet") == whole.model("unet")
    mine.write_text("base: none\n")
    with pytest.raises(UserError, match=r"base: .*none\.yaml does not exist"):
        tracks.load(str(mine))


@pytest.mark.parametrize("track", TRACKS)
def test_committed_tracks_fit_the_code(track):
    """What the schema leaves open (architectures, objectives, solvers) is understood."""
    for settings in tracks.load(track).settings.models.values():
        with init_empty_weights():
            model = models.family(settings.family).build(settings.config)
        assert models.family(settings.family).layers(model, "block")
        goal, sampling = objective(settings.objective.model_dump()), settings.sampling
        samplers.checked(
            sampling.sampler,
            sampling.steps,
            sampling.options,
            goal.name,
            goal.train_steps,
        )


def test_unknown_tracks_list_the_known_ones():
    with pytest.raises(UserError, match=r"'embeded'.*known tracks: .*embedded.*smoke"):
        tracks.load("embeded")
    with pytest.raises(UserError, match=r"nowhere/x\.yaml does not exist"):
        tracks.load("nowhere/x.yaml")


def test_broken_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [1, 2")
    with pytest.raises(UserError, match=r"x\.yaml is not valid YAML: "):
        tracks.load(str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_text("")
    with pytest.raises(UserError, match=r"x\.yaml: the file: None should be a mapping"):
        tracks.load(str(tmp_path / "x.yaml"))


REFUSED = {
    "unknown key": (
        {"sparsity": [0.5]},
        r"mine\.yaml: sparsity: unknown key; did you mean 'sparsities'",
    ),
    "missing key": ({"seeds": ...}, r"mine\.yaml: seeds: this key is missing"),
    "unknown nested key": (
        {"sampling.lane": 1},
        r"sampling\.lane: unknown key; did you mean 'lanes'\?; k",
    ),
    "unknown training key": (
        {"models.dit.training.lr": 1.0},
        r"models\.dit\.training\.lr: unknown",
    ),
    "training without images": (
        {"models.dit.training.images": ...},
        r"training\.images: this key is",
    ),
    "unknown family": (
        {"models.dit.family": "dti"},
        r"mine\.yaml: models\.dit\.family: unknown family 'dti'; did you mean 'dit'\?; known: ",
    ),
    "unknown objective": ({"models.dit.objective.name": "score"}, r"models\.dit\.objective\.name"),
    "more shards than blocks": (
        {"sampling.shards": 3},
        r"mine\.yaml: sampling\.shards: 3 shards, but 40 images are 2 blocks of 20 .*at most 2",
    ),
    "no shards": ({"sampling.shards": 0}, r"sampling\.shards: 0 should be greater"),
    "classes dropped without classes": (
        {"models.unet.config.classes": None, "models.unet.training.class_dropout": 0.1},
        r"models\.unet\.training\.class_dropout: the model is unconditional; .*config\.classes",
    ),
    "classes dropped in recovery without classes": (
        {"models.unet.config.classes": ..., "models.unet.recovery.class_dropout": 0.1},
        r"models\.unet\.recovery\.class_dropout: the model is unconditional",
    ),
    "guidance without classes": (
        {"models.unet.config.classes": None, "models.unet.sampling.guidance": 1.5},
        r"models\.unet\.sampling\.guidance: the model is unconditional",
    ),
    "unknown sampler": ({"models.dit.sampling.sampler": "ode"}, r"models\.dit\.sampling\.sampler"),
    "model name": ({"models.DiT": {}}, "DiT"),
    "unknown excluded": (
        {"methods.exclude": ["magic"]},
        r"mine\.yaml: methods\.exclude: unknown method 'magic'; known: .*dense, ",
    ),
    "unknown only": ({"methods.only": ["magic"]}, r"methods\.only: unknown method 'magic'"),
    "parameters of unknown": (
        {"methods.parameters.taylr": {}},
        r"methods\.parameters: unknown method 'taylr'; did you mean 'taylor'\?",
    ),
    "unknown parameter": (
        {"methods.parameters.entpruner": {"draw": 5}},
        r"methods\.parameters\.entpruner\.draw: .*did you mean 'draws'\?; it has: draws, ",
    ),
    "wrong parameter": (
        {"methods.parameters.entpruner": {"draws": "many"}},
        r"methods\.parameters\.entpruner\.draws is 'many'; it must be like its default 1000",
    ),
    "excluded control": (
        {"methods.exclude": ["random_layers"]},
        r"methods\.exclude: 'random_layers' is a control and can't be switched off",
    ),
    "unknown budget": (
        {"divisions.matched.recoveries": ["none", "finetune-medium"]},
        r"divisions\.matched\.recoveries: 'finetune-medium' needs a budget of: low, high",
    ),
    "unknown recovery": (
        {"divisions.matched.recoveries": ["none", "finetuning-low"]},
        r"divisions\.matched\.recoveries: unknown recovery 'finetuning' in 'finetuning-low'; "
        r"did you mean 'finetune'\?",
    ),
    "recovery without budget": (
        {"divisions.matched.recoveries": ["finetune"]},
        r"divisions\.matched\.recoveries\.0: 'finetune'",
    ),
    "no division": ({"divisions": {}}, "divisions: "),
    "a division with a taken name": (
        {"divisions.select": {"compares": "selections", "recoveries": ["none"]}},
        r"divisions\.select: the name is taken",
    ),
    "a division of an excluded method": (
        {"divisions.recovery.methods": ["taylor"], "methods.exclude": ["taylor"]},
        r"divisions\.recovery\.methods: 'taylor' is left out",
    ),
    "unknown comparison": ({"divisions.matched.compares": "all"}, r"divisions\.matched\.compares"),
    "precisions out of order": (
        {"precisions": ["int8", "fp32"]},
        r"precisions: order them as fp32, bf16, int8: others are compared with the first",
    ),
    "a precision that is timed anyway": (
        {"precisions": ["fp32", "bf16"], "latency.variants": ["bf16"]},
        r"latency\.variants: 'bf16' is timed as one of the track's",
    ),
    "a sampling called default": (
        {"models.dit.samplings": {"default": {"sampler": "ddim", "steps": 2}}},
        r"models\.dit\.samplings\.default: the name is that of `sampling`",
    ),
    "a sampling that does not fit": (
        {"models.dit.samplings": {"few": {"sampler": "euler", "steps": 2}}},
        r"models\.dit\.samplings\.few\.sampler: ",
    ),
    "combinations of one": (
        {"divisions.matched.compares": "combinations"},
        r"divisions\.matched\.compares: 'combinations' needs several `precisions`, or",
    ),
    "combinations in another division": (
        {"divisions.matched.precisions": ["fp32"]},
        r"divisions\.matched\.precisions: only divisions that compare combinations have it",
    ),
    "combinations without the base": (
        {
            "precisions": ["fp32", "int8"],
            "divisions.matched.compares": "combinations",
            "divisions.matched.precisions": ["int8"],
        },
        r"divisions\.matched\.precisions: begin with fp32, which others compare with",
    ),
    "unknown sampling of a division": (
        {
            "precisions": ["fp32", "int8"],
            "divisions.matched.compares": "combinations",
            "divisions.matched.samplings": ["default", "few"],
        },
        r"divisions\.matched\.samplings: unknown sampling 'few'; known: default",
    ),
    "unknown method of a division": (
        {"divisions.recovery.methods": ["magic"]},
        r"divisions\.recovery\.methods: unknown method 'magic'",
    ),
    "oracle of an unknown model": (
        {"oracle.models": ["dti"]},
        r"oracle\.models: unknown model 'dti'",
    ),
    "oracle of a recipe": (
        {"oracle.recoveries": ["recipe-low"]},
        r"oracle\.recoveries: 'recipe-low' belongs to a method",
    ),
    "sparsity 0": ({"sparsities": [0.25, 0]}, r"sparsities\.1: 0 should be greater than"),
    "sparsity 1.5": ({"sparsities": [1.5]}, r"sparsities\.0: 1\.5 should be less than"),
    "sparsity as text": ({"sparsities": ["0.5"]}, r"0: '0\.5' should be a valid number; leave out"),
    "all steps gone": ({"fewer_steps": [1.0]}, r"fewer_steps\.0"),
    "no budget": ({"budgets.low": 0}, r"budgets\.low: 0 should be greater than"),
    "negative seed": ({"seeds": [0, -1]}, r"seeds\.1: -1 should be greater than"),
    "seed twice": ({"seeds": [1, 1]}, r"seeds: \[1, 1\] has an entry twice"),
    "no folder": ({"methods.folders": ["nowhere"]}, r"methods\.folders: .*nowhere does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_name_of_the_key(edited, case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        edited(changes)


METHOD = '"""An idea."""\nKIND = "layers"\n{}\n\n\ndef select(context, power=1):\n    return None\n'


def test_a_folder_from_outside_adds_rows(edited):
    track = edited({"methods.only": ["mine"]}, {"mine": METHOD.format("")})
    assert "mine" in track.methods and "entpruner" not in track.methods
    assert all(m.control for name, m in track.methods.items() if name != "mine")


def test_a_broken_method_stops_nothing_but_itself(edited):
    broken = {"mine": METHOD.format("1 +"), "other": METHOD.format("")}
    track = edited({}, broken)
    assert "mine" not in track.methods and {"other", "taylor", "dense"} <= set(track.methods)
    (line,) = track.warnings
    message = r"mine\.py line 3: the method file is not valid Python"
    assert re.search(message, line)
    for key in ({"methods.only": ["mine"]}, {"methods.parameters.mine": {"power": 1}}):
        with pytest.raises(UserError, match=rf"mine\.yaml: methods\.\w+: .*{message}"):
            edited(key, broken)


# Cells.


def _count(track: tracks.Track, **fields) -> int:
    cells = [tracks.as_dict(cell) for cell in track.cells()]
    return sum(all(cell[k] == v for k, v in fields.items()) for cell in cells)


def test_the_cells_of_a_track(edited):
    track = edited(
        {
            "sparsities": [0.25, 0.5],
            "seeds": [0, 1, 2],
            "divisions.matched.recoveries": ["none", "finetune-low"],
        }
    )
    for model in ("dit", "sit", "unet"):
        assert _count(track, model=model, method="dense") == 3
        assert _count(track, model=model, method="dense", sparsity=0.0, recovery="none") == 3
        assert _count(track, model=model, method="random_layers") == 2 * 2 * 3
        assert _count(track, model=model, method="scratch") == 2 * 3  # never untrained
        steps = track.settings.fewer_steps
        assert _count(track, model=model, method="fewer_steps") == len(steps) * 3  # never trained
        assert _count(track, model=model, method="magnitude_2_4") == 2 * 3
        assert _count(track, model=model, method="magnitude_2_4", sparsity=0.5) == 2 * 3
    cells = track.cells()
    assert len(set(cells)) == len(cells)
    assert {cell.track for cell in cells} == {"mine"}


def test_cells_of_the_smoke_track_are_the_product():
    track = tracks.load("smoke")
    seeds, models = len(track.settings.seeds), track.settings.models
    expected = 0
    for model, method in itertools.product(models.values(), track.methods.values()):
        if method.families and model.family not in method.families:
            continue
        sparsities = {"none": 1, "steps": len(track.settings.fewer_steps)}
        levels = sparsities.get(method.kind, len(method.sparsities or track.settings.sparsities))
        recovered = {"never": 1, "required": 1, "optional": 2}[method.recovery]
        expected += levels * recovered * seeds
    assert len(track.cells()) == expected


def test_methods_stay_out_of_families_they_do_not_claim(edited):
    track = edited({}, {"mine": METHOD.format('FAMILIES = ("unet",)')})
    assert _count(track, method="mine", model="unet") == 2 * 2
    assert _count(track, method="mine") == 2 * 2


def test_a_cell_given_by_hand():
    track = tracks.load("smoke")
    cell = track.cell("dit", "random_layers", 0.4, "finetune-high", 17)
    assert cell == tracks.Cell(
        track="smoke",
        model="dit",
        method="random_layers",
        sparsity=0.4,
        recovery="finetune-high",
        seed=17,
    )
    assert track.budget(cell) == 128
    assert track.budget(track.cell("dit", "dense", 0.0, "none", 0)) == 0
    for arguments, message in (
        (
            ("dti", "dense", 0.0, "none", 0),
            r"unknown model 'dti' in track smoke; did you mean 'dit'\?; known: dit, sit, unet",
        ),
        (("dit", "magic", 0.5, "none", 0), "unknown method 'magic' in track smoke; known: dense, "),
        (
            ("dit", "random_layers", 0.0, "none", 0),
            r"sparsity 0\.0 is impossible for random_layers",
        ),
        (("dit", "random_layers", 1.5, "none", 0), r"sparsity 1\.5 is impossible"),
        (("dit", "random_layers", 0.5, "finetune-max", 0), "'finetune-max' needs a budget of: low"),
        (("dit", "random_layers", 0.5, "heal-low", 0), "unknown recovery 'heal' in 'heal-low'"),
    ):
        with pytest.raises(UserError, match=message):
            track.cell(*arguments)


def test_an_unconditional_model_without_guidance_is_fine(edited):
    changes = {"config.classes": None, "training.class_dropout": 0, "sampling.guidance": 1}
    edited({f"models.unet.{key}": value for key, value in changes.items()})


# What recomputes.


def _fingerprints(track: tracks.Track) -> dict:
    stages = [name for name in tracks.stages.NEEDY if name not in ("efficiency", "shard")]
    places = itertools.product(stages, ("dit", "unet"), ("magnitude_layers", "dense", "mine"))
    return {
        (stage, model, method): track.fingerprint(stage, model=model, method=method, dense_seed=0)
        for stage, model, method in places
    }


CHANGED = {
    "title": ("title", "Other", set(), "", ""),
    "seeds": ("seeds", [5], {"decoder"}, "", ""),
    "sparsities": ("sparsities", [0.3], set(), "", ""),
    "data": ("dataset.limit_train", 999, {"extractor", "coder", "encode", "dense"}, "", ""),
    "extractor": ("extractor.training.epochs", 2, {"extractor"}, "", ""),
    "architecture": ("models.dit.config.depth", 5, {"dense"}, "dit", ""),
    "objective": ("models.dit.objective.beta_end", 0.03, {"dense"}, "dit", ""),
    "training": ("models.dit.training.images", 321, {"dense"}, "dit", ""),
    "recovery": ("models.dit.recovery.batch", 17, {"recover", "oracle"}, "dit", ""),
    "steps": (
        "models.dit.sampling.steps",
        5,
        {"select", "sample", "cost", "oracle", "decoder"},
        "dit",
        "",
    ),
    "budget": ("budgets.low", 65, {"recover", "oracle"}, "", ""),
    "masks": ("oracle.masks", 5, {"oracle"}, "", ""),
    "parameter": ("methods.parameters.mine.power", 2, {"select"}, "", "mine"),
    "count": ("sampling.count", 41, {"sample", "oracle", "decoder"}, "", ""),
    "shards": ("sampling.shards", 2, set(), "", ""),
    "latency": ("latency.rounds", 3, {"cost", "decoder"}, "", ""),
    "patience": ("latency.wait", 9, set(), "", ""),
    "evaluation": ("evaluation.batch", 51, {"score", "oracle", "decoder"}, "", ""),
}


@pytest.mark.parametrize("case", CHANGED)
def test_only_the_stages_that_depend_on_an_entry_recompute(edited, case):
    key, value, stages, model, method = CHANGED[case]
    mine, base = {"mine": METHOD.format("TRAINS = True")}, {"methods.parameters.mine.power": 1}
    before = _fingerprints(edited(base, mine))
    after = _fingerprints(edited({**base, key: value}, mine))
    changed = {place for place in before if before[place] != after[place]}
    expected = {
        (stage, m, name)
        for stage, m, name in before
        if stage in stages and model in ("", m) and method in ("", name)
    }
    if "recover" in stages:  # a selection that trains depends on how and on how much
        expected |= {("select", m, "mine") for m in ("dit", "unet") if model in ("", m)}
    assert changed == expected


def test_fingerprints_do_not_depend_on_defaults_that_are_written_down(edited):
    """Nor on keys that the suite may get later, which every track then has with their defaults."""
    given = {
        "dataset.flip": False,
        "models.dit.objective.beta_end": 0.02,
        "models.dit.training.clip_norm": 1.0,
        "models.dit.recovery.class_dropout": 0,
        "models.unet.sampling.guidance": 1,
        "models.unet.sampling.options": {},
        "sampling.shards": 1,
        "latency.variants": [],
        "dense_seeds": [0],
        "checkpoint_seconds": 300,
    }
    plain, spelt = edited({}), edited(given)
    assert _fingerprints(spelt) == _fingerprints(plain)
    assert spelt.in_force == plain.in_force
    assert spelt.settings.dataset.flip is False and plain.settings.checkpoint_seconds == 300


def test_defaults_of_objectives_are_those_of_their_classes():
    for kind in (NoiseObjective, FlowObjective):
        settings = kind(name=kind.model_fields["name"].annotation.__args__[0])
        named = settings.model_dump(exclude={"name"})
        signature = inspect.signature(OBJECTIVES[settings.name]).parameters
        assert {name: entry.default for name, entry in signature.items()} == named


def test_fingerprints_do_not_depend_on_order(edited):
    track = edited({})
    turned = tiny.plain(track)
    turned["models"] = dict(reversed(turned["models"].items()))
    turned["models"]["dit"] = dict(reversed(turned["models"]["dit"].items()))
    other = tiny.track(track.name, dict(reversed(turned.items())), track.methods)
    assert _fingerprints(other) == _fingerprints(track)


# Where artefacts lie.


def test_one_selection_serves_all_recoveries_unless_it_trains(edited):
    track = edited({}, {"mine": METHOD.format("TRAINS = True")})
    one_shot = [
        tracks.Paths(track, track.cell("dit", "magnitude_layers", 0.25, recovery, 0))
        for recovery in ("none", "finetune-low", "finetune-high")
    ]
    assert {paths.select for paths in one_shot} == {
        "runs/mine/dit/magnitude_layers/0.25/selection/seed0/select.json"
    }
    assert len({paths.cost for paths in one_shot}) == 1
    trained = tracks.Paths(track, track.cell("dit", "mine", 0.25, "finetune-low", 0))
    assert trained.select == "runs/mine/dit/mine/0.25/selection-finetune-low/seed0/select.json"
    untrained = tracks.Paths(track, track.cell("dit", "mine", 0.25, "none", 0))
    assert untrained.select == "runs/mine/dit/mine/0.25/selection-none/seed0/select.json"


# Divisions.

MINE = 'RECIPE = {"recovery": "output_kd", "parameters": {"power": 2}, "sparsities": (0.4,)}'


def test_a_recipe_runs_in_the_published_division_only(edited):
    track = edited({}, {"mine": METHOD.format(MINE)})
    (cell, *_) = [c for c in track.cells("as_published") if c.method == "mine"]
    assert (cell.sparsity, cell.recovery) == (0.4, "recipe-low")
    assert track.recovered_by(cell) == "output_kd" and track.parameters(cell) == {"power": 2}
    assert track.budget(cell) == track.settings.budgets["low"]
    paths = tracks.Paths(track, cell)
    assert paths.select == "runs/mine/dit/mine/0.4/selection-recipe-low/seed0/select.json"
    matched = [c for c in track.cells() if c.method == "mine"]
    assert {c.recovery for c in matched} == {"none", "finetune-low"}
    assert {track.recovered_by(c) for c in matched} == {"none", "finetune"}
    assert all(track.parameters(c) == {} and c.sparsity == 0.25 for c in matched)


def test_what_has_no_recipe_is_finetuned_at_the_recipes_sparsities(edited):
    track = edited({}, {"mine": METHOD.format(MINE)})
    cells = [c for c in track.cells("as_published") if c.method == "random_layers"]
    assert {c.recovery for c in cells} == {"finetune-low"}
    assert 0.4 in {c.sparsity for c in cells}
    dense = [c for c in track.cells("as_published") if c.method == "dense"]
    assert {(c.sparsity, c.recovery) for c in dense} == {(0.0, "none")}


def test_a_recipe_stands_whatever_the_track_sets_for_the_matched_division(edited):
    given = {"methods.parameters.mine": {"power": 3}}
    track = edited(given, {"mine": METHOD.format(MINE)})
    (cell, *_) = [c for c in track.cells("as_published") if c.method == "mine"]
    assert track.parameters(cell) == {"power": 2}


def test_the_recovery_division_holds_its_methods_and_the_references():
    track = tracks.load("smoke")
    named = set(track.divisions["recovery"].methods)
    cells = track.cells("recovery")
    assert {c.method for c in cells} == named | {"dense", "fewer_steps"}
    pairs = {(c.method, c.recovery) for c in cells if c.method in named}
    assert pairs == set(itertools.product(named, track.divisions["recovery"].recoveries))


def test_controls_stay_where_selections_are_compared(edited):
    track = edited({"divisions.matched.methods": ["taylor"]})
    controls = {name for name, method in track.methods.items() if method.control}
    assert {c.method for c in track.cells()} == controls | {"taylor"}


def test_an_unknown_division_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown division 'all' in track smoke; known: matched, "):
        tracks.load("smoke").cells("all")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            '{"recover": "finetune"}',
            r"mine\.py: RECIPE has 'recover'; did you mean 'recovery'\?; known: recovery",
        ),
        (
            '{"recovery": "heal"}',
            r"mine\.py: RECIPE names the recovery 'heal'; known: .*finetune",
        ),
        ('{"sparsities": (50,)}', r"mine\.py: RECIPE sparsities has 50"),
        ('{"parameters": {"pow": 2}}', r"mine\.py: RECIPE\.pow: .*no such parameter"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(edited, recipe, message):
    track = edited({}, {"mine": METHOD.format(f"RECIPE = {recipe}")})
    assert "mine" not in track.methods and re.search(message, *track.warnings)


def test_the_jobs_of_the_oracle():
    track = tracks.load("smoke")
    jobs = track.oracle()
    settings = track.settings.oracle
    records = [tracks.Layout(track).record("oracle", **job) for job in jobs]
    assert len(jobs) == len(set(records)) == len(settings.recoveries) * settings.masks
    assert records[0] == "runs/smoke/oracle/dit/none/seed0/mask0/oracle.json"


def test_shards_lie_beside_what_they_are_gathered_into(edited):
    track = edited({"sampling.shards": 2})
    paths = tracks.Paths(track, track.cell("dit", "dense", 0.0, "none", 1))
    folder = "runs/mine/dit/dense/0.0/none/seed1"
    assert paths.sample == f"{folder}/sample.json"
    assert paths.shards == [
        (f"{folder}/shard{index}of2.json", f"{folder}/shard{index}of2.safetensors")
        for index in (0, 1)
    ]
    track = edited({})
    assert tracks.Paths(track, track.cell("dit", "dense", 0.0, "none", 1)).shards == []


def test_the_checkpoint_is_what_was_trained_last():
    track = tracks.load("smoke")
    recovered = tracks.Paths(track, track.cell("dit", "dense", 0.0, "finetune-low", 1), runs="r")
    bare = tracks.Paths(track, track.cell("dit", "dense", 0.0, "none", 1), runs="r")
    assert (
        recovered.checkpoint
        == recovered.recover
        == "r/smoke/dit/dense/0.0/finetune-low/seed1/recover.json"
    )
    assert bare.checkpoint == bare.select == "r/smoke/dit/dense/0.0/selection/seed1/select.json"
    assert bare.dense_sample == bare.sample == recovered.dense_sample
    assert bare.dense == "r/smoke/dit/dense/dense.json"


def test_cells_do_not_share_records():
    track = tracks.load("smoke")
    cells = track.cells()
    paths = [tracks.Paths(track, cell) for cell in cells]
    assert len({p.score for p in paths}) == len({p.sample for p in paths}) == len(cells)


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("models.sit.sampling.sampler", "ddim", "does not sample objective 'flow'"),
        ("models.dit.sampling.steps", 1, "change steps or fewer_steps"),
        (
            "models.dit.sampling",
            {"sampler": "ddpm", "steps": 750},
            "'leading' with 750 steps never visits the noisiest 250 of 1000 times",
        ),
        (
            "models.dit.sampling",
            {"sampler": "ddim", "steps": 600, "options": {"timestep_spacing": "leading"}},
            "'leading' with 600 steps never visits the noisiest 400 ",
        ),
        ("models.dit.recovery.images", 100, "models.dit.recovery.images: unknown key"),
        ("models.dit.training.images", 1, r"training\.images: 1 is less than one batch, 16"),
        ("budgets.low", 1, "budgets.low: less than one batch"),
        ("models.dit.objective.times", "uniform", "times"),
        ("extractor", {"name": "domain"}, r"extractor\.training: 'domain' needs this key"),
        (
            "extractor",
            {"name": "inception-v3-compat", "asset": "inception"},
            "evaluation.lpips: 'dom",
        ),
        ("extractor.training.epoch", 3, "epoch"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(edited, dotted, value, message):
    with pytest.raises(UserError, match=message):
        edited({dotted: value})


def test_needs_are_the_suites_then_the_tracks_then_the_rules(edited):
    assert not tracks.load("embedded").settings.needs
    assert tracks.load("embedded").needs("dense") == tracks.stages.STAGES["dense"].needs
    given = {"default": {"mem_mb": 9000, "gpu": 1}, "dense": {"gpu": 4, "cpus": 16}}
    track = edited({"needs": given})
    runtime = tracks.stages.STAGES["dense"].needs["runtime"]
    assert track.needs("dense") == {"mem_mb": 9000, "runtime": runtime, "gpu": 4, "cpus": 16,
                                    "cpu_instead": False}  # fmt: skip
    assert track.needs("score")["gpu"] == 1


def test_needs_recompute_nothing(edited):
    track = edited({"needs": {"default": {"mem_mb": 9000}}})
    smoke = tracks.load("smoke")
    names = {"model": "dit", "method": "taylor", "dense_seed": 0}
    for stage in tracks.stages.STAGES:
        assert track.fingerprint(stage, **names) == smoke.fingerprint(stage, **names)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            {"train": {"gpu": 1}},
            r"needs\.train: unknown stage 'train'; .*known: default, extractor, coder, encode",
        ),
        ({"dense": {"gpus": 1}}, r"needs\.dense\.gpus: unknown key; did you mean 'gpu'"),
        ({"dense": {"mem_mb": "8 GB"}}, r"needs\.dense\.mem_mb: '8 GB' should be a valid integer"),
        ({"cost": {"mem_mb": 100}}, r"needs\.cost\.mem_mb: 100 should be greater .* 300"),
        ({"default": {"gpu": 2}}, r"needs\.default\.gpu: only dense and recover can use more"),
        ({"sample": {"gpu": 2}}, r"needs\.sample\.gpu: only dense and recover can use more"),
    ],
)
def test_needs_that_make_no_sense_are_refused(edited, needs, message):
    with pytest.raises(UserError, match=message):
        edited({"needs": needs})


def test_a_batch_that_several_gpus_cannot_share_is_refused(edited):
    with pytest.raises(UserError, match=r"recovery.batch: 16 can't be shared by the 3 GPUs of"):
        edited({"needs.recover": {"gpu": 3}})
