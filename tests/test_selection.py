"""What a method is given, and what is said to a method that breaks the contract."""

import copy
import signal

import pytest
import tiny
import torch

from prunebench import models
from prunebench.diffusion.objectives import objective
from prunebench.errors import CellError, UserError
from prunebench.evaluation import cost
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import plan_layers
from prunebench.selection import checks as selection
from prunebench.selection.context import weights_of
from prunebench.tracks import methods
from prunebench.training import loop
from prunebench.training.budget import BudgetMeter

# The context.


def test_the_model_is_a_private_copy_in_evaluation_mode():
    dense = tiny.dense("dit").train()
    context = tiny.context("dit", dense)
    assert not context.model.training and dense.training
    for parameter in context.model.parameters():
        parameter.data.zero_()
    tiny.assert_same(dense.state_dict(), tiny.dense("dit").state_dict())


def test_numbers_depend_on_seed_method_and_order_only():
    def numbers(**changes):
        context = tiny.context("dit", **changes)
        return [torch.rand(1, generator=context.generator()).item() for _ in range(3)]

    first = numbers()
    torch.manual_seed(99)
    assert numbers() == first == numbers(sparsity=0.5)
    assert len({*first, *numbers(seed=1), *numbers(method="other")}) == 9


def test_draws_are_batched_and_repeatable(core):
    batches = tiny.context(core).draws(10, 4)
    assert [len(batch.y) for batch in batches] == [4, 4, 2]
    assert [len(batch.y) for batch in tiny.context(core).draws(8, 4)] == [4, 4]
    for one, two in zip(batches, tiny.context(core).draws(10, 4), strict=True):
        assert torch.equal(one.noised, two.noised) and torch.equal(one.y, two.y)
    assert all(batch.x0.abs().max() <= 1 for batch in batches)


def test_at_time_keeps_images_and_noise(core):
    context = tiny.context(core)
    (batch,) = context.draws(4, 4)
    t = context.data.objective.grid(5)[3]
    moved = context.at_time(batch, t)
    assert torch.equal(moved.x0, batch.x0) and torch.equal(moved.noise, batch.noise)
    assert moved.t.tolist() == [t.item()] * 4
    noised, target = context.data.objective.noised(batch.x0, batch.noise, t.expand(4))
    assert torch.equal(moved.noised, noised) and torch.equal(moved.target, target)


def test_predictions_leave_the_variance_out(name):
    context = tiny.context(name)
    (batch,) = context.draws(2, 2)
    assert context.predict(context.model, batch).shape == batch.x0.shape


def test_a_model_without_layers_shares_all_weights(name):
    context = tiny.context(name)
    intact = tiny.output(context.model, name)
    own = {id(parameter) for parameter in context.model.parameters()}
    first, second = (layer.name for layer in context.layers()[:2])
    with context.without(first, second) as shell:
        assert {id(parameter) for parameter in shell.parameters()} < own
        removed = copy.deepcopy(context.model)
        for layer in (first, second):
            context.family.remove_layer(removed, layer)
        assert torch.equal(tiny.output(shell, name), tiny.output(removed, name))
        assert not torch.equal(tiny.output(shell, name), intact)
    assert torch.equal(tiny.output(context.model, name), intact)
    with context.without() as shell:
        assert torch.equal(tiny.output(shell, name), intact)


def test_what_can_be_pruned_costs_no_budget(name):
    """UNets find their widths by tracing a forward pass; that is not the method's."""
    context = tiny.context(name)
    context.layers(), context.layers("branch"), context.widths(), context.weights()
    scores = {unit.name: torch.rand(unit.size) for unit in context.widths()}
    selection.select(context, lambda context: context.plan_widths(scores), "widths", {})
    report = context._meter.report()
    assert report == {**dict.fromkeys(report, 0), "wall_s": 0.0}


def test_weights_are_those_of_the_model(core):
    context = tiny.context(core)
    for weight, value in context.weights().items():
        assert value is context.model.get_parameter(weight)


def test_training_is_charged_and_capped():
    context = tiny.context("dit", train_images=64)
    model = copy.deepcopy(context.model)
    losses = context.train(model, 40)
    assert len(losses) == 5 and context.trained_images == 40
    assert context._meter.counts["student_backward"] == 40
    tiny.assert_same(context.model.state_dict(), tiny.dense("dit").state_dict())
    with pytest.raises(CellError, match="wants to train on 25 more images; 40 of its budget of 64"):
        context.train(model, 25)
    context.train(model, 24)
    with pytest.raises(CellError, match="-8 more images"):
        context.train(model, -8)
    assert context.trained_images == 64


def test_training_twice_uses_other_draws_and_is_repeatable():
    runs = []
    for _ in range(2):
        context = tiny.context("dit", train_images=64)
        model = copy.deepcopy(context.model)
        runs.append([*context.train(model, 32), *context.train(model, 32)])
    assert runs[0] == runs[1]
    assert runs[0][:4] != runs[0][4:]


def test_fresh_models_have_the_plans_shape_and_other_weights(core):
    context = tiny.context(core)
    plan = tiny.plan(core, "branch")
    before = torch.random.get_rng_state()
    fresh = context.fresh(plan)
    assert torch.equal(torch.random.get_rng_state(), before)
    shapes = {n: p.shape for n, p in fresh.named_parameters()}
    pruned = copy.deepcopy(context.model)
    for layer in plan.layers:
        context.family.remove_layer(pruned, layer)
    assert shapes == {n: p.shape for n, p in pruned.named_parameters()}
    matrix = next(n for n in context.family.weights(fresh))
    assert not torch.equal(fresh.get_parameter(matrix), pruned.get_parameter(matrix))
    tiny.assert_same(tiny.context(core).fresh(plan).state_dict(), fresh.state_dict())
    fresh(*tiny.inputs(core, 4))
    assert context._meter.counts["student_forward"] == 4


# Right and wrong results.


def _select(function, kind: str, name: str = "dit", **changes):
    return selection.select(tiny.context(name, **changes), function, kind, {})


def test_parameters_reach_the_method():
    given = {}
    selection.select(
        tiny.context("dit", sparsity=0.0),
        lambda c, **k: given.update(k) or Plan(),
        "none",
        {"a": 1},
    )
    assert given == {"a": 1}


def test_what_a_method_does_to_its_copy_does_not_count():
    """Only the plan does: the pruned model has the dense weights."""

    def vandal(context):
        plan = context.plan_layers(context.layers())
        for parameter in context.model.parameters():
            parameter.data.fill_(7)
        context.family.remove_layer(context.model, "blocks.3")
        return plan

    plan, pruned = _select(vandal, "layers")
    assert plan.layers == ("blocks.0",)
    dense = tiny.dense("dit").state_dict()
    assert all(torch.equal(tensor, dense[n]) for n, tensor in pruned.state_dict().items())


def test_a_trained_model_is_returned_unmetered():
    def trains(context):
        plan = context.plan_layers(context.layers())
        with context.without(*plan.layers) as shell:
            model = copy.deepcopy(shell)
        context.train(model, 16)
        return plan, model

    context = tiny.context("dit", train_images=16)
    plan, pruned = selection.select(context, trains, "layers", {})
    assert context.trained_images == context._meter.counts["student_backward"] == 16
    assert not pruned.training and plan.layers == ("blocks.0",)
    tiny.output(pruned, "dit")
    assert context._meter.counts["student_forward"] == 16
    changed = pruned.state_dict()["blocks.1.mlp.fc1.weight"]
    assert not torch.equal(changed, tiny.dense("dit").blocks[1].mlp.fc1.weight)


def _steps(model, context):
    """A training loop of the method's own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context.loss(model, context.draws(8, 8)[0]).backward()
    optimizer.step()


@pytest.mark.parametrize("excuse", ["train", "fresh"])
def test_a_training_without_a_step_excuses_no_other(excuse):
    """Fewer images than a batch, or a fresh model that is not the one returned."""

    def trains(context):
        plan = context.plan_layers(context.layers())
        with context.without(*plan.layers) as shell:
            model = copy.deepcopy(shell)
        if excuse == "train":
            context.train(model, 7)
        else:
            context.fresh(plan)
        _steps(model, context)
        return plan, model

    with pytest.raises(CellError, match=r"was trained, but not by context\.train"):
        selection.select(tiny.context("dit", train_images=16), trains, "layers", {})


@pytest.mark.parametrize("after", ["steps", "scales", "nothing", "prunes"])
def test_a_training_excuses_no_change_that_comes_after_it(after, record_property):
    """One step that the budget knows does not pay for a training of the method's own."""

    def trains(context):
        plan = context.plan_layers(context.layers())
        with context.without(*plan.layers) as shell:
            model = copy.deepcopy(context.model if after == "prunes" else shell)
        context.train(model, 8)
        if after == "prunes":
            surgery.apply(model, plan, context.family)
        elif after == "steps":
            _steps(model, context)
        elif after == "scales":
            with torch.no_grad():
                next(model.parameters()).mul_(1.1)
        return plan, model

    def run():
        return selection.select(tiny.context("dit", train_images=16), trains, "layers", {})

    if after in ("nothing", "prunes"):
        record_property("survived", 1)
        assert run()[0].layers
    else:
        with pytest.raises(CellError, match=r"was trained, but not by context\.train"):
            run()


def test_what_is_left_of_trained_weights_is_told_from_others():
    whole = torch.arange(12.0).view(3, 4) + 1
    mask = torch.ones(3, 4).view(-1).index_fill(0, torch.tensor([1, 5]), 0).view(3, 4)
    for part in (whole, whole * mask, whole[[0, 2]], whole[:, 1:3], whole.half()):
        assert selection._part_of(part, whole)
    for other in (whole + 1e-3, whole[:2] * 1.01, whole.roll(1, 0), -whole[:1]):
        assert not selection._part_of(other, whole)


def test_weights_are_known_by_their_plain_names_and_by_what_they_give():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Tanh())
    found = weights_of(model)
    assert found.keys() == {"0.weight", "0.bias"} and len(found["0.bias"]) == 1
    assert {round(tensor[0, 0].item(), 4) for tensor in found["0.weight"]} == {3.0, 0.9951}
    with torch.no_grad():
        model[0].bias.add_(1)
    assert not torch.equal(found["0.bias"][0], model[0].bias)


def test_a_fresh_model_is_returned_as_it_is_or_not_at_all():
    def made(context, trained):
        plan = context.plan_layers(context.layers())
        model = context.fresh(plan)
        if trained:
            _steps(model, context)
        return plan, model

    _, pruned = selection.select(tiny.context("dit"), made, "layers", {"trained": False})
    assert not torch.equal(
        pruned.blocks[1].mlp.fc1.weight, tiny.dense("dit").blocks[1].mlp.fc1.weight
    )
    with pytest.raises(CellError, match=r"was trained, but not by context\.train"):
        selection.select(tiny.context("dit"), made, "layers", {"trained": True})


def test_the_teacher_shares_no_memory_with_the_dense_model():
    dense = tiny.dense("dit")
    context = tiny.context("dit", dense)
    with torch.no_grad():
        for tensor in context.teacher().state_dict().values():
            tensor.zero_()
    tiny.assert_same(dense.state_dict(), tiny.dense("dit").state_dict())


@pytest.mark.parametrize("role", ["model", "teacher", "fresh", "copy", "shell"])
def test_what_would_pass_the_meter_is_refused(core, role):
    context = tiny.context(core)
    block = context.layers()[0].name
    with context.without() as shell:
        model = {
            "model": lambda: context.model,
            "teacher": context.teacher,
            "fresh": lambda: context.fresh(Plan()),
            "copy": lambda: copy.deepcopy(context.model),
            "shell": lambda: shell,
        }[role]()
    (batch,) = context.draws(4, 4)
    with pytest.raises(CellError, match="the model's forward was called past the meter"):
        model.forward(batch.noised, batch.network_time, batch.y)
    with pytest.raises(CellError, match="of the model was called past the meter"):
        model.get_submodule(block)(batch.noised)
    assert not any(context._meter.counts.values())
    context.predict(model, batch)
    kind = "teacher_forward" if role == "teacher" else "student_forward"
    assert dict(context._meter.counts) == {kind: 4}
    assert type(model).__name__ == type(tiny.dense(core)).__name__
    free = selection.unmetered(model)
    assert type(free) is type(tiny.dense(core))
    free.forward(batch.noised, batch.network_time, batch.y)
    assert sum(context._meter.counts.values()) == 4


def test_checkpointed_blocks_run_again_in_the_backward_pass():
    context = tiny.context("dit", settings=tiny.settings(activation_checkpointing=True))
    (batch,) = context.draws(4, 4)
    context.loss(context.model, batch).backward()
    assert dict(context._meter.counts) == {"student_forward": 4, "student_backward": 4}


def test_training_by_hand_is_metered():
    """A loop of the method's own is seen on its row, though nothing stops it."""

    def sly(context):
        batch = context.draws(12, 12)[0]
        for _ in range(3):
            context.loss(copy.deepcopy(context.model), batch).backward()
        return context.plan_layers(context.layers())

    context = tiny.context("dit")
    selection.select(context, sly, "layers", {})
    assert context._meter.counts["student_backward"] == 36 and context.trained_images == 0


def _heads(context, **kept):
    return Plan(kept={"blocks.0.attn.heads": (0, 1, 2)})


def _masks(value=True, pattern="unstructured"):
    def select(context):
        masks = {n: torch.full(w.shape, value) for n, w in context.weights().items()}
        return Plan(masks=masks, pattern=pattern)

    return select


def _raises(context):
    raise KeyError("blocks.7")


def _unmasked(context):
    """A plan of masks and a model that was never masked."""
    plan = context.plan_weights({n: w.detach().abs() for n, w in context.weights().items()})
    return plan, copy.deepcopy(context.model)


def _overspends(context):
    context.train(copy.deepcopy(context.model), context.train_images + 1)


def _noted(value):
    def select(context):
        return context.plan_layers(context.layers(), note=value)

    return select


WRONG = {
    "misses its target": (
        lambda c: Plan(layers=("blocks.0", "blocks.1", "blocks.2")),
        "layers",
        r"plan removes 0\.6471 of the parameters; the target is 0\.25 and one unit is 0\.2157",
    ),
    "misses its target with widths": (_heads, "widths", r"plan removes 0\.0120 .* target is 0\.25"),
    "misses its target with masks": (
        _masks(False),
        "weights",
        r"removes 0\.5606 .* target is 0\.25",
    ),
    "takes other steps than asked": (
        lambda c: Plan(steps=0.5),
        "steps",
        r"leaves out 0\.5000 of .*; the target is 0\.25",
    ),
    "removes nothing": (
        lambda c: Plan(),
        "layers",
        "the method's KIND is 'layers' but its plan removes nothing",
    ),
    "removes although it should not": (
        lambda c: Plan(layers=("blocks.0",)),
        "none",
        "KIND is 'none' but its plan removes layers",
    ),
    "another kind": (
        lambda c: Plan(layers=("blocks.0",)),
        "widths",
        "KIND is 'widths' but its plan removes layers",
    ),
    "two kinds": (
        lambda c: Plan(layers=("blocks.0",), kept={"blocks.1.attn.heads": (0,)}),
        "layers",
        "KIND is 'layers' but its plan removes layers and widths",
    ),
    "unknown layer": (
        lambda c: Plan(layers=("block.0",)),
        "layers",
        r"names a layer that does not exist: block\.0; the model has blocks\.0, blocks\.0\.attn",
    ),
    "unknown width": (
        lambda c: Plan(kept={"blocks.0.heads": (0,)}),
        "widths",
        r"names a width that does not exist: blocks\.0\.heads; the model has blocks\.0\.attn",
    ),
    "unknown weight": (
        lambda c: Plan(masks={"pos_embed": torch.ones(1).bool()}, pattern="unstructured"),
        "weights",
        "names a maskable weight that does not exist: pos_embed; the model has blocks",
    ),
    "raises": (_raises, "layers", "KeyError: 'blocks.7'"),
    "exits its loop with an assertion": (
        lambda c: [].pop(),
        "layers",
        "IndexError: pop from empty",
    ),
    "takes more arguments": (
        lambda c, more: Plan(),
        "layers",
        "TypeError: .*missing 1 required positional argument: 'more'",
    ),
    "returns nothing": (lambda c: None, "layers", "select returned NoneType, not a Plan"),
    "returns names": (lambda c: ["blocks.0"], "layers", "select returned list, not a Plan"),
    "returns an empty tuple": (lambda c: (), "layers", "select returned tuple, not a Plan"),
    "returns three things": (
        lambda c: (Plan(layers=("blocks.0",)), c.model, 1),
        "layers",
        r"a tuple that is not \(Plan, model\)",
    ),
    "returns weights for a model": (
        lambda c: (Plan(layers=("blocks.0",)), c.model.state_dict()),
        "layers",
        r"a tuple that is not \(Plan, model\)",
    ),
    "returns a model of another shape": (
        lambda c: (Plan(layers=("blocks.0",)), c.model),
        "layers",
        r"the returned model does not fit its plan: blocks\.0\.",
    ),
    "returns an unmasked model": (
        _unmasked,
        "weights",
        r"the returned model does not fit its plan: 'blocks\.0\..*' is not masked",
    ),
    "trains without a budget": (
        _overspends,
        "layers",
        "method test wants to train on 1 more images; 0 of its budget of 0 are spent",
    ),
    "has masks that are no N:M": (
        _masks(True, "2:4"),
        "weights",
        "does not keep 2 of every 4 weights",
    ),
    "has masks without a pattern": (_masks(True, None), "weights", "the pattern None"),
    "notes a tensor": (_noted(torch.ones(1)), "layers", "cannot be stored as JSON: .*Tensor"),
    "notes no number": (_noted(float("nan")), "layers", "as JSON: .* not JSON compliant"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_method_fails_its_cell_with_the_reason(case):
    function, kind, message = WRONG[case]
    with pytest.raises(CellError, match=message):
        _select(function, kind)


def test_a_method_that_overspends_fails_its_cell():
    with pytest.raises(CellError, match="train on 33 more images; 0 of its budget of 32 are spent"):
        _select(_overspends, "layers", train_images=32)


def test_the_cause_of_a_raising_method_is_kept():
    with pytest.raises(CellError) as raised:
        _select(_raises, "layers")
    assert isinstance(raised.value.__cause__, KeyError)


def test_interrupting_is_not_the_methods_failure():
    def interrupted(context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _select(interrupted, "layers")


def test_unbalanced_norm_groups_fail_the_cell():
    def lopsided(context):
        scores = {unit.name: torch.rand(unit.size) for unit in context.widths()}
        kept = dict(context.plan_widths(scores).kept)
        unit = next(u for u in context.widths() if u.groups > 1 and u.name in kept)
        return Plan(kept={**kept, unit.name: kept[unit.name][1:]})

    with pytest.raises(
        CellError, match="unequal numbers of channels in the 4 normalisation groups"
    ):
        _select(lopsided, "widths", "unet")


def test_branches_and_blocks_both_count_as_units():
    def branches(context):
        return plan_layers(context.model, context.layers("branch"), context.sparsity)

    plan, pruned = _select(branches, "layers", sparsity=0.15)
    assert plan.layers in (("blocks.0.attn", "blocks.0.mlp"), ("blocks.0.attn",))
    assert tiny.output(pruned, "dit").isfinite().all()


def test_calibration_draws_are_the_same_for_all_methods_and_differ_between_seeds():
    first, second, other = (
        tiny.context("dit", method=method, seed=seed).draws(6, 4)
        for method, seed in (("a", 0), ("b", 0), ("a", 1))
    )
    assert all(torch.equal(x.noise, y.noise) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first[0].noise, other[0].noise)


@pytest.mark.parametrize("kind", ["block", "widths", "2:4"])
def test_the_average_of_an_unfinished_training_fits_the_plan(core, kind):
    context = tiny.context(core, train_images=64, settings=tiny.settings(ema=0.9))
    model = copy.deepcopy(context.model)
    context.train(model, 32)
    plan, family = tiny.plan(core, kind), tiny.INSTANCES[core].module
    pruned = surgery.apply(selection.unmetered(model), plan, family)
    average = selection.averaged(context, plan)
    shapes = {name: parameter.shape for name, parameter in pruned.named_parameters()}
    assert {name: tensor.shape for name, tensor in average.items()} == shapes
    for name, mask in plan.masks.items():
        assert not average[name][~mask].any()
    assert any(not torch.equal(average[n], p) for n, p in pruned.named_parameters())
    context.train(model, 32)
    assert selection.averaged(context, plan) == {}


# Memory, of models whose weights are nearly all of it.

TEXTS = {"context": (2, 16), "pooled": (24,), "sizes": (6,)}
LARGE = {
    "flux": ("flux", {
        "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 8, "joint_attention_dim": 16, "pooled_projection_dim": 24,
        "axes_dims_rope": [4, 6, 6],
    }),
    "sdxl": ("conditional_unet", {
        "sample_size": 2, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
        "block_out_channels": [64, 128], "norm_num_groups": 4, "attention_head_dim": [4, 8],
        "transformer_layers_per_block": [1, 2], "cross_attention_dim": 16,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 48, "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }),
}  # fmt: skip
# Copies of the parameters: the dense model, the method's, and what else it needs.
COPIES = {
    "magnitude_layers": (2, {}),
    "laptop_diff": (2, {"draws": 2, "batch": 1}),
    "magnitude_widths": (2, {}),
    "taylor": (3, {"timesteps": 2, "batch": 1}),  # gradients
    "diff_pruning": (3, {"timesteps": 2, "batch": 1, "path": "a", "threshold": 0.0}),
    "magnitude_2_4": (2.25, {}),  # masks of a byte
    # The teacher; then one prediction's activations.
    "ecodiff": (3, {"prompts": 1, "epochs": 1}),
}


class _Texts:
    def of(self, labels):
        generator = torch.Generator().manual_seed(int(labels.sum()))
        return {k: torch.randn(len(labels), *s, generator=generator) for k, s in TEXTS.items()}


def _copies(name: str, method: str, **settings) -> float:
    """Peak of what is allocated while a method selects, in copies of the model's parameters."""
    family, configuration = LARGE[name]
    goal = objective({"name": "flow"} if family == "flux" else {"name": "noise"})
    dense = models.family(family).build(configuration)
    images = torch.zeros(4, 2, 2, 2, dtype=torch.uint8)
    data = loop.Data(images, torch.arange(4), goal, conditions=_Texts())
    found, (_, parameters) = tiny.found_methods()[method], COPIES[method]
    own = {"sampler": "euler" if family == "flux" else "ddim", "steps": 1, "lanes": 1}
    options = {"sparsity": 0.5 if method.endswith("2_4") else 0.2, "seed": 0, "method": method}
    function = methods.load(found)

    def run():
        context = selection.Context(
            dense, models.family(family), configuration, data, **options, meter=BudgetMeter(),
            settings=tiny.settings(activation_checkpointing=True), sampling=own,
        )  # fmt: skip
        return selection.select(context, function, found.kind, parameters)

    run()  # what is made once, such as lazy imports' tensors
    return 1 + cost._cpu_peak(run) / sum(p.nbytes for p in dense.parameters())


@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("large", LARGE)
def test_selection_holds_two_copies_and_gradients(large, method):
    expected, _ = COPIES[method]
    found = _copies(large, method)
    print(large, method, round(found, 2))
    assert found < expected + 0.4


@pytest.mark.parametrize(
    "error", [SystemExit(3), MemoryError("my own"), UserError("of the method"), OSError("disk")]
)
def test_what_a_method_raises_itself_is_its_own_failure(error):
    def broken(context):
        raise error

    with pytest.raises(CellError, match=type(error).__name__):
        _select(broken, "layers")


def test_an_interrupt_is_a_methods_own_only_where_none_can_come_from_outside():
    def broken(context):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(CellError, match="KeyboardInterrupt"):
            _select(broken, "layers")
    finally:
        signal.signal(signal.SIGINT, before)
