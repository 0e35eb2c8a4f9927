"""What a method left is checked again by `cost` and `score`, where no method's code runs.

Here a method has got past the checks of `select`: its plan, weights and record are replaced by
others that belong together, as code that may do anything can do.
"""

from pathlib import Path

import pytest
import tiny
import torch

from prunebench.errors import CellError
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import sealed
from prunebench.stages import score
from prunebench.stages.work import check_selected


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A track, its runs and a cell, selected."""
    folder = tmp_path_factory.mktemp("selected")
    track, _ = tiny.released(folder)
    tiny.run("dense", track, folder, model="dit")
    cell = track.cell("dit", "magnitude_layers", 0.25, "none", 0)
    tiny.run("select", track, folder, cell)
    return track, folder, cell


def forged(selected, change) -> None:
    """Write the cell's selection anew, as `change` leaves the model, the plan and the sizes."""
    track, runs, cell = selected
    job = tiny.job("select", track, runs, cell)
    record = sealed.read(job.record)
    network, plan = surgery.load(job.record.parent)
    network, plan, size = change(network, plan, record.size)
    settings = job.settings
    files = surgery.save(job.record.parent, network, plan, settings.family, settings.config)
    sealed.write(job.record, record.model_copy(update={"size": size}), files)


def changed_weight(network, plan, size):
    with torch.no_grad():
        next(network.parameters()).mul_(1.0001)
    return network, plan, size


def other_sizes(network, plan, size):
    return network, plan, size.model_copy(update={"parameters": size.parameters - 1})


def no_sparsity(network, plan, size):
    dense = surgery.load(DENSE)[0]
    return dense, Plan(), size


def half_a_sparsity(network, plan, size):
    dense = surgery.load(DENSE)[0]
    steps = Plan(steps=0.75)
    return dense, steps, size


FORGED = {
    "a weight that no training changed": (changed_weight, "is not the dense model's"),
    "sizes of another model": (other_sizes, r"select\.json tells other sizes than its model has"),
    "nothing removed": (no_sparsity, "KIND is 'layers' but its plan removes nothing"),
    "another kind": (half_a_sparsity, "KIND is 'layers' but its plan removes steps"),
}
DENSE = Path()


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_selection_fails_its_cell(selected, what, monkeypatch):
    track, runs, cell = selected
    record = tiny.job("select", track, runs, cell).record
    whole = {file: file.read_bytes() for file in record.parent.iterdir() if file.is_file()}
    monkeypatch.setitem(
        globals(), "DENSE", tiny.job("dense", track, runs, model="dit").record.parent
    )
    change, message = FORGED[what]
    try:
        tiny.run("cost", track, runs, cell)
        forged(selected, change)
        with pytest.raises(CellError, match=message):
            tiny.run("cost", track, runs, cell)
    finally:
        for file, content in whole.items():
            file.write_bytes(content)


def test_a_score_compares_the_sizes_that_cost_and_select_tell(selected):
    track, runs, cell = selected
    job = tiny.job("cost", track, runs, cell)
    tiny.run("cost", track, runs, cell)
    records = {"select": sealed.read(job.path("select")), "cost": sealed.read(job.record)}
    score._check_recovered(job, records)
    size = records["cost"].size.model_copy(update={"nonzero_parameters": 1})
    records["cost"] = records["cost"].model_copy(update={"size": size})
    with pytest.raises(CellError, match=r"cost\.json tells other sizes than select\.json"):
        score._check_recovered(job, records)


def test_masks_that_a_recovery_let_go_are_found(selected):
    """A recovered model's weights are trained; what its plan removes stays removed."""
    track, runs, _ = selected
    cell = track.cell("dit", "magnitude_unstructured", 0.25, "finetune-low", 0)
    for stage in ("select", "recover"):
        tiny.run(stage, track, runs, cell)
    job = tiny.job("score", track, runs, cell)
    recovered, whole = job.read("recover"), surgery.load(job.path("dense").parent)[0]
    network, plan = surgery.load(job.path("recover").parent)
    check_selected(job, whole, network, plan, recovered)
    name, mask = next(iter(plan.masks.items()))
    with torch.no_grad():
        network.get_parameter(name)[~mask] = 1.0
    with pytest.raises(CellError, match=f"'{name}' is not masked"):
        check_selected(job, whole, network, plan, recovered)
