"""The contract of method files, rule by rule; and the published arithmetic of single methods."""

import subprocess
import sys
from contextlib import contextmanager
from math import log
from types import SimpleNamespace

import pytest
import tiny
import torch

from prunebench import methods
from prunebench.diffusion.objectives import NoisePrediction
from prunebench.errors import CellError, UserError
from prunebench.pruning.units import Layer

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


# What is wrong with the file, and what the message says.
BROKEN = {
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
        r"first\.py: a method must state KIND, one of none, layers, widths, weights, steps",
    ),
    "unknown kind": (
        GOOD.replace('"layers"', '"blocks"'),
        r"first\.py: KIND is 'blocks'; known: none, layers",
    ),
    "unknown recovery": (
        GOOD.replace("\nKIND", '\nRECOVERY = "maybe"\nKIND'),
        "RECOVERY is 'maybe'; known: optional, never, required",
    ),
    "computed constant": (
        GOOD.replace('"layers"', '"layers".lower()'),
        r"first\.py line 6: KIND must be a literal str, because the workflow reads it without",
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
        r"first\.py: FAMILIES names 'resnet'; known: dit, ",
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
    assert list(methods.discover([tmp_path / "a", str(tmp_path / "b")])) == ["one", "two"]


def test_one_name_in_two_folders(tmp_path):
    files = [_written(tmp_path / folder, GOOD, "one.py") for folder in "ab"]
    with pytest.raises(UserError) as raised:
        methods.discover([tmp_path / "a", tmp_path / "b"])
    assert str(raised.value) == f"{files[1]} and {files[0]} are both named one"


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"methods folder .*nowhere does not exist \(methods\.folders\)"
    ):
        methods.discover([tmp_path / "nowhere"])


def test_reading_does_not_run_the_file(tmp_path):
    method = methods.read(_written(tmp_path, GOOD + "\nraise SystemExit('ran')\n"))
    with pytest.raises(SystemExit, match="ran"):
        methods.load(method)


def test_loading_gives_select(tmp_path):
    select = methods.load(methods.read(_written(tmp_path, GOOD)))
    context = SimpleNamespace(layers=lambda: [1, 2], plan_layers=lambda layers: layers)
    assert select(context) == [1, 2]


def test_planning_does_not_import_torch():
    code = (
        "import sys; from prunebench import config; config.load('smoke').cells(); "
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
            r"parameters\.first\.shares: .*no such parameter; it has: share, steps, name",
        ),
        ({"steps": 3.5}, r"parameters\.first\.steps is 3\.5; it must be like its default 3"),
        ({"steps": "3"}, r"first\.steps is '3'; it must be like its default 3"),
        ({"steps": True}, r"first\.steps is True; it must be like its default 3"),
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


# EntPruner's ranking on networks that can be worked out (papers/entpruner.md, section 7).


class Toy:
    """A context whose "network" multiplies z by one factor per block that is present."""

    def __init__(self, factors: dict[str, float], dimensions: int = 1, classes: int = 1):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(200, dimensions, generator=generator)
        y = torch.arange(200) % classes
        self._batches = [
            SimpleNamespace(z=z[:120], y=y[:120]),
            SimpleNamespace(z=z[120:], y=y[120:]),
        ]
        self.factors, self.model = factors, self._network(factors)
        self.log = SimpleNamespace(info=lambda *_: None)

    @staticmethod
    def _network(factors):
        return lambda z: z * torch.tensor(list(factors.values())).prod()

    def draws(self, count, batch):
        return self._batches

    def predict(self, model, batch):
        return model(batch.z)

    def layers(self):
        return [Layer(name, 1) for name in self.factors]

    @contextmanager
    def without(self, name):
        yield self._network({k: v for k, v in self.factors.items() if k != name})

    def plan_layers(self, order, ced):
        return [layer.name for layer in order], ced


def _entpruner():
    return methods.load(tiny.found_methods()["entpruner"])


def test_ced_is_the_log_of_what_a_block_multiplies_by():
    order, ced = _entpruner()(Toy({"double": 2.0, "same": 1.0, "half": 0.5, "ten": 10.0}))
    assert ced["same"] == pytest.approx(0, abs=1e-6)
    assert ced["double"] == pytest.approx(log(2), abs=1e-6)
    assert ced["half"] == pytest.approx(log(2), abs=1e-6)
    assert ced["ten"] == pytest.approx(log(10), abs=1e-6)
    assert order[0] == "same" and order[-1] == "ten"


@pytest.mark.parametrize("classes", [1, 4])
def test_ced_summed_over_dimensions_is_d_times_the_pooled(classes):
    _, ced = _entpruner()(Toy({"b": 2.0}, dimensions=7, classes=classes), per_dimension=True)
    assert ced["b"] == pytest.approx(7 * log(2), abs=1e-5)
    _, pooled = _entpruner()(Toy({"b": 2.0}, dimensions=7, classes=classes))
    assert pooled["b"] == pytest.approx(log(2), abs=1e-6)


def test_ced_of_a_block_that_does_nothing_is_zero():
    model = tiny.dense("dit")
    for index in (1, 3):
        for parameter in model.blocks[index].adaLN_modulation[1].parameters():
            parameter.data.zero_()
    context = tiny.context("dit", model, sparsity=2 * 18912 / 87684)
    plan = _entpruner()(context, draws=20, batch=10)
    assert plan.layers == ("blocks.1", "blocks.3")
    ced = plan.notes["ced"]
    assert ced["blocks.1"] == ced["blocks.3"] == 0.0
    assert min(ced["blocks.0"], ced["blocks.2"]) > 0


# Diff-Pruning's gated Taylor terms (papers/diff_pruning.md, section 8).


def _calibration(function, goal=None):
    """A context with x0 = 0 and noise +-1, and a "model" function(x, parameter)."""
    goal, parameter = goal or NoisePrediction(), torch.nn.Parameter(torch.ones(()))
    noise = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    batch = SimpleNamespace(x0=torch.zeros(2, 1, 1, 1), noise=noise)

    def at_time(batch, t):
        return goal.noised(batch.x0, batch.noise, t.expand(2))

    return SimpleNamespace(
        draws=lambda count, size: [batch],
        at_time=at_time,
        data=SimpleNamespace(objective=goal),
        model=None,
        loss=lambda _, noised: (function(noised[0], parameter) - noised[1]).square().mean(),
        parameter=parameter,
    )


def _accumulate(context, threshold, timesteps=1000):
    select = methods.load(tiny.found_methods()["diff_pruning"])
    return select.__globals__["accumulate"](context, threshold, timesteps, 2)


@pytest.mark.parametrize(
    ("threshold", "stop"), [(0.01, 404), (0.02, 362), (0.05, 301), (0.1, 248), (0.0, 1000)]
)
def test_the_gate_stops_where_worked_out(threshold, stop):
    """eps_hat = x_t on x0 = 0: L_t = (1 - sqrt(1 - abar_t))^2, from L_0 = 0.9801 downwards."""
    assert _accumulate(_calibration(lambda x, p: p * x), threshold) == stop


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_a_constant_loss_never_stops_the_gate(threshold):
    assert _accumulate(_calibration(lambda x, p: 0 * p * x), threshold) == 1000


def test_gradients_add_up_to_the_gate_and_without_the_step_that_closes_it():
    context = _calibration(lambda x, p: p * x)
    abar = context.data.objective.scheduler.alphas_cumprod.double()
    assert _accumulate(context, 0.1) == 248
    root = (1 - abar[:248]).sqrt()
    assert context.parameter.grad.item() == pytest.approx(
        (2 * (root - 1) * root).sum().item(), 1e-4
    )


@pytest.mark.parametrize("method", ["diff_pruning", "magnitude_widths"])
def test_a_dead_neuron_goes_first(method):
    """No weights in or out: the score is 0 and the network does not change."""
    model = tiny.dense("dit")
    mlp = model.blocks[2].mlp
    for tensor in (mlp.fc1.weight[17], mlp.fc1.bias[17:18], mlp.fc2.weight[:, 17]):
        tensor.data.zero_()
    expected, parameters = tiny.output(model, "dit"), tiny.smoke().parameters(method)
    context = tiny.context("dit", model, sparsity=0.05)
    plan = methods.load(tiny.found_methods()[method])(context, **parameters)
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
