"""The contract of method files, rule by rule; and the published arithmetic of single methods."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from prunebench.errors import CellError, UserError
from prunebench.tracks import methods

GOOD = '''"""Removes the first layers.

More about it.
"""

KIND = "layers"


def select(context, share=0.5, *, steps=3, name="x"):
    return context.plan_layers(context.layers())
'''


def _written(folder, content: str, name: str = "first.py"):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    return file


def test_a_minimal_method(tmp_path):
    method = methods.read(_written(tmp_path, GOOD))
    assert (method.name, method.title, method.idea) == (
        "first",
        "first",
        "Removes the first layers.",
    )
    assert (method.kind, method.recovery, method.paper, method.notes) == (
        "layers",
        "optional",
        "",
        "",
    )
    assert not (method.control or method.reconstruction or method.trains)
    assert method.families == method.sparsities == ()
    assert dict(method.parameters) == {"share": 0.5, "steps": 3, "name": "x"}


def test_every_constant_is_read(tmp_path):
    constants = (
        'KIND = "weights"\nTITLE = "T"\nPAPER = "P"\nBIBTEX = "B"\nNOTES = "N"\nCONTROL = True\n'
        'RECONSTRUCTION = True\nTRAINS = True\nRECOVERY = "never"\nFAMILIES = ("dit",)\n'
        "SPARSITIES = (0.5, 0.75)"
    )
    method = methods.read(_written(tmp_path, GOOD.replace('KIND = "layers"', constants)))
    assert (method.kind, method.title, method.paper) == ("weights", "T", "P")
    assert (method.bibtex, method.notes, method.recovery) == ("B", "N", "never")
    assert method.control and method.reconstruction and method.trains
    assert (method.families, method.sparsities) == (("dit",), (0.5, 0.75))


VARIED = GOOD.replace(
    "\n\n\ndef",
    '\nTITLE = "First"\nCHECK = {"steps": 1}\nVARIANTS = {"half": {"TRAINS": True, '
    '"GUESSED": "a half", "parameters": {"share": 0.25}}, "other": {}}\n\n\ndef',
    1,
)


def test_a_variant_is_a_row_of_its_own_that_differs_as_it_says(tmp_path):
    found = methods.discover([_written(tmp_path, VARIED).parent]).methods
    assert list(found) == ["first", "first_half", "first_other"]
    base, half = found["first"], found["first_half"]
    assert (half.title, half.kind, half.file) == ("First: half", "layers", base.file)
    assert (base.trains, half.trains, base.guessed, half.guessed) == (False, True, "", "a half")
    assert (base.parameters["share"], half.parameters["share"]) == (0.5, 0.25)
    assert (dict(base.given), dict(half.given)) == ({}, {"share": 0.25})
    assert half.check == {"steps": 1, "share": 0.25} and base.check == {"steps": 1}


def test_a_variant_runs_with_its_parameters_unless_the_track_says_otherwise(tmp_path):
    found = methods.discover([_written(tmp_path, VARIED).parent]).methods
    smoke = tiny.smoke()
    plain = {**tiny.plain(smoke), "methods": {"folders": [str(tmp_path)]}}
    for given, wanted in (({}, 0.25), ({"first_half": {"share": 0.75}}, 0.75)):
        plain["methods"]["parameters"] = given
        track = tiny.track("varied", plain, found)
        cell = track.cell("dit", "first_half", 0.25, "none", 0)
        assert track.parameters(cell) == {"share": wanted}


def test_two_files_cannot_share_the_name_of_a_variant(tmp_path):
    _written(tmp_path, VARIED)
    _written(tmp_path, GOOD, "first_half.py")
    with pytest.raises(
        UserError, match=r"first_half\.py and .*first\.py are both named first_half"
    ):
        methods.discover([tmp_path])


# What is wrong with the file, and what the message says.
BROKEN = {
    "misspelt variant": (
        VARIED.replace('"TRAINS"', '"TRAIN"'),
        r"first\.py: VARIANTS half has 'TRAIN'; did you mean 'TRAINS'",
    ),
    "variant of no such parameter": (
        VARIED.replace('"share": 0.25', '"shares": 0.25'),
        r"first\.py: VARIANTS half\.shares: .* did you mean 'share'",
    ),
    "variant of another type": (
        VARIED.replace('"TRAINS": True', '"TRAINS": 1'),
        r"VARIANTS half TRAINS is 1, not a bool",
    ),
    "variant of an unknown kind": (
        VARIED.replace('"TRAINS": True', '"KIND": "rows"'),
        r"VARIANTS half: KIND is 'rows'; known: none, layers",
    ),
    "variant that is no dict": (
        VARIED.replace('"other": {}', '"other": 3'),
        r"VARIANTS other is 3; it must be a dict of constants",
    ),
    "variant that is a list": (
        VARIED.replace('"other": {}', '"other": ["parameters"]'),
        r"VARIANTS other is \['parameters'\]; it must be a dict of constants",
    ),
    "variant with a bad name": (VARIED.replace('"other"', '"O-1"'), r"VARIANTS O-1: a variant's"),
    "guess with a citation": (
        VARIED.replace("TITLE", 'GUESSED = "all"\nBIBTEX = "@x{y,}"\nTITLE'),
        r"first\.py: GUESSED and BIBTEX: no paper is cited for a criterion that is a guess",
    ),
    "syntax error": (
        GOOD.replace("def select(", "def select((("),
        r"first\.py line \d+: the method file is not valid Python",
    ),
    "null bytes": (GOOD + "\0", r"first\.py.*: the method file is not valid Python"),
    "no docstring": (
        GOOD.split('"""\n', 1)[1],
        r"first\.py: a method starts with a docstring whose first line is its idea",
    ),
    "empty docstring": ('"""  """\n' + GOOD.split('"""\n', 1)[1], "starts with a docstring"),
    "no kind": (
        GOOD.replace("KIND", "KINDS"),
        r"first\.py line 6: KINDS: did you mean KIND\?",
    ),
    "no constants": (
        GOOD.replace('KIND = "layers"', ""),
        r"first\.py: a method must state KIND, one of none, layers, widths, weights, steps",
    ),
    "misspelt constant": (
        GOOD.replace("\nKIND", '\nTITEL = "First"\nKIND'),
        r"first\.py line 6: TITEL: did you mean TITLE\?",
    ),
    "unknown kind": (
        GOOD.replace('"layers"', '"blocks"'),
        r"first\.py: KIND is 'blocks'; known: none, layers",
    ),
    "unknown recovery": (
        GOOD.replace("\nKIND", '\nRECOVERY = "maybe"\nKIND'),
        "RECOVERY is 'maybe'; known: optional, never, required",
    ),
    "unknown updates": (
        GOOD.replace("\nKIND", '\nUPDATES = "least squares"\nKIND'),
        "UPDATES is 'least squares'; known: closed form",
    ),
    "computed constant": (
        GOOD.replace('"layers"', '"layers".lower()'),
        r"first\.py line 6: KIND must be a literal str or tuple, because the workflow reads it",
    ),
    "constant of another type": (
        GOOD.replace("\nKIND", "\nCONTROL = 1\nKIND"),
        "line 6: CONTROL must be a literal bool",
    ),
    "families as a word": (
        GOOD.replace("\nKIND", '\nFAMILIES = ("dit")\nKIND'),
        "FAMILIES must be a literal tuple",
    ),
    "unknown family": (
        GOOD.replace("\nKIND", '\nFAMILIES = ("dit", "resnet")\nKIND'),
        r"first\.py: FAMILIES names 'resnet'; known: .*dit, ",
    ),
    "impossible sparsity": (
        GOOD.replace("\nKIND", "\nSPARSITIES = (0.5, 50)\nKIND"),
        r"first\.py: SPARSITIES has 50; each must be in \(0, 1\)",
    ),
    "no select": (
        GOOD.replace("def select", "def choose"),
        r"first\.py: a method defines select\(context, parameter=default, \.\.\.\) -> Plan",
    ),
    "select without a context": (
        GOOD.replace('context, share=0.5, *, steps=3, name="x"', ""),
        r"a method defines select\(context",
    ),
    "parameter without default": (
        GOOD.replace("share=0.5", "share"),
        r"first\.py: every parameter of select but the context needs a default",
    ),
    "keyword without default": (
        GOOD.replace("steps=3", "steps"),
        "every parameter of select but the context needs a default",
    ),
    "computed default": (
        GOOD.replace("share=0.5", "share=min(1, 2)"),
        r"first\.py: the defaults of select must be literals",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file(tmp_path, case):
    content, message = BROKEN[case]
    with pytest.raises(UserError, match=message):
        methods.read(_written(tmp_path, content))


@pytest.mark.parametrize("name_", ["First.py", "2nd.py", "my-method.py", "a b.py", "_hidden.py"])
def test_a_file_name_that_is_no_name(tmp_path, name_):
    file = _written(tmp_path, GOOD, name_)
    with pytest.raises(
        UserError, match="file name is its name everywhere; use a-z, 0-9 and _ only"
    ):
        methods.read(file)


def test_methods_of_several_folders_are_found_by_name(tmp_path):
    _written(tmp_path / "a", GOOD, "one.py")
    _written(tmp_path / "b", GOOD, "two.py")
    _written(tmp_path / "b", "not Python", "readme.txt")
    found = methods.discover([tmp_path / "a", str(tmp_path / "b")])
    assert list(found.methods) == ["one", "two"] and not found.warnings()


def test_what_editors_leave_stops_no_method(tmp_path):
    _written(tmp_path, GOOD, "one.py")
    for hidden in ("._one.py", ".#one.py", ".one.py.swp"):
        (tmp_path / hidden).write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / ".#two.py").symlink_to("nobody@nowhere.1234:1")
    strays = ["x (copy).py", "one-1.py", "2nd.py", "#one.py"]
    for name in strays:
        _written(tmp_path, GOOD, name)
    broken = {"half": GOOD[: len(GOOD) // 2], "bytes": "\0", "Upper": GOOD, "deep": "(" * 10_000}
    for name, content in broken.items():
        _written(tmp_path, content, f"{name}.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    found = methods.discover([tmp_path])
    assert list(found.methods) == ["one"]
    assert set(found.broken) == {*broken, "folder", "gone"}
    assert sorted(found.strays) == sorted(str(tmp_path / name) for name in strays)
    assert all("\n" not in line and str(tmp_path) in line for line in found.warnings())


def test_capitals_of_a_methods_own_are_its_own(tmp_path):
    own = GOOD.replace("\nKIND", "\nLADDER = (1, 2)\nCHOICES = {}\nkinds = 3\nKIND")
    assert methods.read(_written(tmp_path, own)).kind == "layers"


def test_one_name_in_two_folders(tmp_path):
    files = [_written(tmp_path / folder, GOOD, "one.py") for folder in "ab"]
    with pytest.raises(UserError) as raised:
        methods.discover([tmp_path / "a", tmp_path / "b"])
    assert str(raised.value) == f"{files[1]} and {files[0]} are both named one"


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"methods folder .*nowhere does not exist"):
        methods.discover([tmp_path / "nowhere"])


def test_reading_does_not_run_the_file(tmp_path):
    method = methods.read(_written(tmp_path, GOOD + "\nraise SystemExit('ran')\n"))
    with pytest.raises(CellError, match=r"first\.py fails at import: SystemExit: ran"):
        methods.load(method)


def test_loading_gives_select(tmp_path):
    select = methods.load(methods.read(_written(tmp_path, GOOD)))
    context = SimpleNamespace(layers=lambda: [1, 2], plan_layers=lambda layers: layers)
    assert select(context) == [1, 2]


def test_planning_does_not_import_torch():
    code = (
        "import sys; from prunebench import tracks; tracks.load('smoke').cells(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=False).returncode == 0


# Parameters given by a track.


def test_parameters_of_the_right_type_pass(tmp_path):
    method = methods.read(_written(tmp_path, GOOD))
    methods.check_parameters(method, {"share": 1, "steps": 7, "name": "y"})
    methods.check_parameters(method, {"share": 0.25})
    methods.check_parameters(method, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"shares": 1},
            r"parameters\.first\.shares: .*did you mean 'share'\?; it has: share, steps, name",
        ),
        ({"steps": 3.5}, r"parameters\.first\.steps is 3\.5; it must be like its default 3"),
        ({"steps": "3"}, r"first\.steps is '3'; it must be like its default 3"),
        ({"steps": True}, r"first\.steps is True; it must be like its default 3"),
        ({"steps": 0}, r"first\.steps is 0; it must be from 1 to"),
        ({"steps": -3}, r"first\.steps is -3; it must be from 1 to"),
        ({"share": 1.5}, r"first\.share is 1\.5; it must be from 0 to 1"),
        ({"share": False}, r"first\.share is False"),
        ({"share": None}, r"first\.share is None; it must be like its default 0\.5"),
        ({"name": 1}, r"first\.name is 1; it must be like its default 'x'"),
        ({"share": 0.5, "steps": []}, r"first\.steps is \[\]"),
    ],
)
def test_parameters_of_the_wrong_type(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        methods.check_parameters(methods.read(_written(tmp_path, GOOD)), given)


def test_a_method_without_parameters_says_so(tmp_path):
    content = GOOD.replace(', share=0.5, *, steps=3, name="x"', "")
    with pytest.raises(UserError, match="it has: none"):
        methods.check_parameters(methods.read(_written(tmp_path, content)), {"a": 1})


# Magnitude.


def test_a_dead_neuron_goes_first():
    """No weights in or out: the score is 0 and the network does not change."""
    model = tiny.dense("dit")
    mlp = model.blocks[2].mlp
    for tensor in (mlp.fc1.weight[17], mlp.fc1.bias[17:18], mlp.fc2.weight[:, 17]):
        tensor.data.zero_()
    expected = tiny.output(model, "dit")
    context = tiny.context("dit", model, sparsity=0.05)
    plan = methods.load(tiny.found_methods()["magnitude_widths"])(context)
    assert 17 not in plan.kept["blocks.2.mlp.neurons"]
    cut = tiny.context("dit", model).model
    from prunebench.pruning import surgery

    only = {"blocks.2.mlp.neurons": tuple(i for i in range(128) if i != 17)}
    surgery.apply(cut, surgery.Plan(kept=only), tiny.INSTANCES["dit"].module)
    torch.testing.assert_close(tiny.output(cut, "dit"), expected, rtol=1e-4, atol=1e-5)


def test_magnitude_widths_scores_are_squared_norms():
    """The neuron with the smallest squared norm over its rows and columns goes first."""
    context = tiny.context("dit", sparsity=0.03)
    plan = methods.load(tiny.found_methods()["magnitude_widths"])(context)
    mlp = context.model.blocks[0].mlp
    squares = mlp.fc1.weight.square().sum(1) + mlp.fc2.weight.square().sum(0)
    gone = set(range(128)) - set(plan.kept["blocks.0.mlp.neurons"])
    assert gone == set(squares.argsort()[: len(gone)].tolist()) and gone


def test_magnitude_layers_takes_the_smallest_mean():
    model = tiny.dense("dit")
    for parameter in model.blocks[2].parameters():
        parameter.data.mul_(0.5)
    plan = methods.load(tiny.found_methods()["magnitude_layers"])(tiny.context("dit", model))
    assert plan.layers == ("blocks.2",)


def test_magnitude_masks_are_global():
    context = tiny.context("dit", sparsity=0.3)
    plan = methods.load(tiny.found_methods()["magnitude_unstructured"])(context)
    kept = torch.cat([context.model.get_parameter(n)[m].abs() for n, m in plan.masks.items()])
    gone = torch.cat([context.model.get_parameter(n)[~m].abs() for n, m in plan.masks.items()])
    assert gone.max() <= kept.min() and len(gone) == round(0.3 * 87684)


def test_a_file_that_fails_at_import_fails_its_cells_only(tmp_path):
    file = tmp_path / "needy.py"
    file.write_text('"""Idea."""\n\nimport no_such_package\n\nKIND = "layers"\n\n\n'
                    "def select(context):\n    ...\n")  # fmt: skip
    with pytest.raises(CellError, match=r"needy\.py fails at import: ModuleNotFoundError"):
        methods.load(methods.read(file))
