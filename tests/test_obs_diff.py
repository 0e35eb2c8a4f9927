"""OBS-Diff: its solver against least squares, its timestep weights, and what may be changed."""

import copy
import math

import pytest
import tiny
import torch

from prunebench.errors import CellError
from prunebench.selection import brain_surgeon, checks
from prunebench.tracks import methods

FOUND = tiny.found_methods()
ROWS = {row.name: row for row in FOUND["obs_diff"].rows}
select = methods.load(FOUND["obs_diff"])
GLOBALS = select.__globals__
QUICK = {"images": 4, "batch": 4, "timesteps": 2, "packages": 2}


def _problem(rows: int = 5, columns: int = 12, samples: int = 60) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs


def _best(weight: torch.Tensor, inputs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The least-squares weights of one row on the columns that stay."""
    solution = torch.linalg.lstsq(inputs[:, kept], inputs @ weight).solution
    return torch.zeros_like(weight).masked_scatter(kept, solution)


# The solver.


def test_one_column_that_goes_leaves_the_least_squares_solution():
    """Of heads or neurons, for every row; and OBS's error is the rise of the squared error."""
    weight, inputs, moment = _problem()
    for column in range(4):
        reader = brain_surgeon.Reader(torch.nn.Parameter(weight.clone()), moment, 0.0)
        error = (weight[:, column].square() / reader.inverse[column, column]).sum()
        reader.remove(torch.tensor([column]))
        kept = torch.arange(weight.shape[1]) != column
        expected = torch.stack([_best(row, inputs, kept) for row in weight])
        torch.testing.assert_close(reader.weight, expected)
        rise = ((reader.weight - weight) @ inputs.T).square().sum()
        torch.testing.assert_close(rise, error)


def test_columns_that_go_one_after_another_leave_the_joint_solution():
    weight, inputs, moment = _problem()
    reader = brain_surgeon.Reader(torch.nn.Parameter(weight.clone()), moment, 0.0)
    for gone in ([3, 4], [0], [9, 10]):
        reader.remove(torch.tensor(gone))
    kept = torch.ones(12, dtype=torch.bool)
    kept[[0, 3, 4, 9, 10]] = False
    expected = torch.stack([_best(row, inputs, kept) for row in weight])
    torch.testing.assert_close(reader.weight, expected)


def test_the_first_column_of_a_row_is_solved_for_exactly():
    """SparseGPT's solver lets columns behind make up for one: with the first gone, all do."""
    weight, inputs, moment = _problem()
    weight[:, 0] *= 1e-3
    solved, kept = brain_surgeon.prune(weight, moment, weight.shape[0], 0.0)
    assert not kept[:, 0].any() and kept[:, 1:].all()
    expected = torch.stack(
        [_best(row, inputs, mask) for row, mask in zip(weight, kept, strict=True)]
    )
    torch.testing.assert_close(solved, expected)


@pytest.mark.parametrize("target", [200, (2, 4)])
def test_blocks_are_worked_off_as_single_columns_are(target):
    """Against the published loop, one column at a time, over more columns than a block has."""
    weight, _, moment = _problem(3, 150 if target == 200 else 24, 400)
    solved, kept = brain_surgeon.prune(weight, moment, target, 0.01)
    factor = brain_surgeon.upper_factor(weight.clone(), moment, 0.01)
    expected = weight.clone()
    for column in range(weight.shape[1]):
        error = expected[:, column] * ~kept[:, column] / factor[column, column]
        expected[:, column:] -= error.unsqueeze(1) * factor[column, column:]
    torch.testing.assert_close(solved, expected * kept)
    assert int((~kept).sum()) == (200 if target == 200 else 36)


@pytest.mark.parametrize("target", [24, (2, 4)])
def test_solving_beats_masking_alone(target):
    weight, inputs, moment = _problem()
    solved, kept = brain_surgeon.prune(weight, moment, target, 0.01)
    assert not solved[~kept].any() and int((~kept).sum()) == (24 if target == 24 else 30)
    errors = [((new - weight) @ inputs.T).square().sum() for new in (solved, weight * kept)]
    assert errors[0] < errors[1]


def test_uncorrelated_inputs_need_no_solving():
    """With H a multiple of the identity it is magnitude: the rest stays as it is."""
    weight, _, _ = _problem()
    solved, kept = brain_surgeon.prune(weight, 3 * torch.eye(12, dtype=torch.float64), 20, 0.0)
    lowest = weight.abs().flatten().argsort()[:20]
    assert set((~kept).flatten().nonzero().flatten().tolist()) == set(lowest.tolist())
    torch.testing.assert_close(solved[kept], weight[kept])


def test_columns_without_inputs_go_first():
    weight, _, moment = _problem()
    moment[5], moment[:, 5] = 0, 0
    solved, kept = brain_surgeon.prune(weight, moment, weight.shape[0], 0.01)
    assert not kept[:, 5].any() and int((~kept).sum()) == weight.shape[0]
    torch.testing.assert_close(solved[kept], weight[kept])


# Timesteps and shares.


def test_early_timesteps_weigh_more_by_a_logarithm():
    """The authors' log_decrease: the logarithmic rise from 0.8 to 1.2, turned round."""
    alphas = GLOBALS["log_decrease"](25, 0.8, 1.2)
    rise = [0.8 + 0.4 / math.log(25) * math.log(1 + index) for index in range(25)]
    assert alphas == pytest.approx(rise[::-1])
    assert GLOBALS["log_decrease"](1, 0.8, 1.2) == [1.2]


def test_moments_are_weighted_means_over_images():
    context = tiny.context("dit")
    name = "blocks.1.mlp.fc2.weight"
    batches = GLOBALS["calibration"](context, 3, 3, 2, 0.8, 1.2)
    model = copy.deepcopy(context.model)
    moment = GLOBALS["moments"](context, model, [name], batches)[name]
    seen = []
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.append(x[0].double()))
    with torch.no_grad():
        for batch, _ in batches:
            context.predict(model, batch)
    (early, late), (high, low) = seen, (alpha for _, alpha in batches)
    assert (batches[0][0].t > batches[1][0].t).all() and (high, low) == pytest.approx((1.2, 0.8))
    sums = [
        alpha * x.flatten(0, 1).T @ x.flatten(0, 1) for alpha, x in ((high, early), (low, late))
    ]
    torch.testing.assert_close(moment, 2 * sum(sums) / (3 * (high + low)))


def test_shares_are_whole_numbers_that_add_up():
    parts = brain_surgeon.spread(10, [3, 3, 3, 90, 1])
    assert sum(parts) == 10 and parts[3] == 9 and min(parts) >= 0


def test_ranks_of_two_readers_are_fused():
    assert GLOBALS["fused"]([[2, 0, 1]]) == [2, 0, 1]
    assert GLOBALS["fused"]([[0, 1, 2, 3], [1, 3, 0, 2]])[0] == 1


# Whole networks.


@pytest.mark.parametrize("row", ROWS)
def test_outputs_are_closer_to_the_dense_ones_than_with_the_plan_alone(row):
    """On the calibration's times, where the same plan leaves the weights as they were."""
    method = ROWS[row]
    sparsity = method.sparsities[0] if method.sparsities else 0.25
    options = {**method.given, **QUICK, "images": 16, "batch": 16, "timesteps": 3}
    solve = methods.load(method)
    context = tiny.context("dit", sparsity=sparsity)
    plan, solved = checks.select(context, solve, method.kind, options, updates=method.updates)
    plain = tiny.context("dit", sparsity=sparsity)
    cut, masked = checks.select(plain, lambda _: plan, method.kind, {})
    (batch,) = tiny.context("dit").draws(32, 32)
    with torch.no_grad():
        dense, *outputs = (plain.predict(m, batch) for m in (tiny.dense("dit"), masked, solved))
    errors = [(output - dense).square().mean() for output in outputs]
    assert errors[1] < errors[0] and cut is plan
    stored = (tiny.dense("dit"), solved, plan, plain.family, method.kind, sparsity, None, True)
    checks.recheck(*stored, updates=method.updates)
    with pytest.raises(CellError, match="of the pruned model is not the dense model's"):
        checks.recheck(*stored)


def test_solved_weights_are_refused_where_they_are_not_declared():
    with pytest.raises(CellError, match="was trained, but not by"):
        checks.select(tiny.context("dit"), select, "weights", QUICK)


def test_only_the_weights_under_pruning_may_be_solved_for():
    def touches(context, **options):
        plan, model = select(context, **options)
        model.final_layer.linear.weight.data.mul_(1.01)
        return plan, model

    with pytest.raises(CellError, match="was trained, but not by"):
        checks.select(tiny.context("dit"), touches, "weights", QUICK, updates="closed form")


def test_gradients_are_no_closed_form():
    def trains(context, **options):
        plan, model = select(context, **options)
        (batch,) = context.draws(4, 4)
        context.loss(context.model, batch).backward()
        return plan, model

    with pytest.raises(CellError, match="4 images went backward through the model: that is train"):
        checks.select(tiny.context("dit"), trains, "weights", QUICK, updates="closed form")


def test_the_meter_knows_every_package():
    """2 packages of 4 images at 2 times, and one image that tells the order of the matrices."""
    context = tiny.context("dit")
    select(context, **QUICK)
    counts = context._meter.counts
    assert counts["student_forward"] == 2 * 4 * 2 + 1 and not counts["student_backward"]


def test_an_unknown_pattern_is_refused():
    with pytest.raises(CellError, match="'4:2' is none of unstructured, N:M, structured"):
        select(tiny.context("dit"), pattern="4:2", **QUICK)
