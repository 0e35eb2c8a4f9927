"""2:4 kernels: which layers have one, what is reported, and what `measure` makes of it."""

import copy
from types import SimpleNamespace

import examples
import pytest
import tiny
import torch
from torch import nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse import _semi_structured_conversions as conversions

from prunebench.evaluation import semi_structured
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.records import sealed
from prunebench.stages import cost
from prunebench.tracks import settings_benchmark

SIZES = (8, 16, 24, 32, 48, 64, 96, 128)
CPU_REASON = "no 2:4 kernels on this CPU: the pattern brings no speed"
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="2:4 kernels exist on CUDA only; there is no GPU here"
)


def _masked(name: str) -> tuple[nn.Module, Plan]:
    plan = tiny.plan(name, "2:4")
    return surgery.apply(tiny.dense(name), plan, tiny.INSTANCES[name].module), plan


# Which layers have a kernel.


@pytest.mark.parametrize("cutlass", [False, True])
def test_the_shapes_are_those_that_torch_accepts(cutlass, monkeypatch):
    """Against torch's own check of a tensor, which runs on the GPU only, on a stand-in for one."""
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    backend = SparseSemiStructuredTensorCUTLASS if cutlass else SparseSemiStructuredTensorCUSPARSELT
    answers = set()
    for rows in SIZES:
        for columns in SIZES:
            fits = semi_structured.obstacle(nn.Linear(columns, rows)) is None
            assert fits == _torch_accepts(backend, (rows, columns)), (rows, columns)
            answers.add(fits)
    assert answers == {True, False}


def _torch_accepts(backend: type, shape: tuple[int, int]) -> bool:
    tensor = SimpleNamespace(
        is_cuda=True,
        dim=lambda: 2,
        is_contiguous=lambda: True,
        dtype=semi_structured.DTYPE,
        shape=shape,
    )
    try:
        backend._validate_device_dim_dtype_shape(tensor)
    except RuntimeError:
        return False
    return True


def test_what_has_no_kernel_says_why():
    assert semi_structured.obstacle(nn.Linear(64, 64)) is None
    assert semi_structured.obstacle(nn.Linear(20, 64)) == "64x20 is not a multiple of 16x16"
    assert semi_structured.obstacle(nn.Linear(64, 10)) == "10x64 is not a multiple of 16x16"
    for kernel in (1, 3):
        reason = semi_structured.obstacle(nn.Conv2d(64, 64, kernel))
        assert reason == "Conv2d: kernels exist for matrices only"


def test_the_masks_hold_the_pattern_of_the_kernels():
    """Compressing loses nothing along the inputs, and does along the outputs."""
    score = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)).half() + 1
    along_inputs = score * targets.n_of_m_mask(score, 2, 4)
    along_outputs = score * targets.n_of_m_mask(score.T, 2, 4).T
    for weight, lossless in ((along_inputs, True), (along_outputs, False)):
        compressed = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        again = conversions.sparse_semi_structured_to_dense_cutlass(*compressed)
        assert torch.equal(again, weight) == lossless


# On a CPU.


def test_a_cpu_runs_the_model_as_it_is(name):
    model, plan = _masked(name)
    same, report = semi_structured.accelerate(model, plan)
    assert same is model
    assert report == {
        "pattern": "2:4",
        "device": "cpu",
        "precision": "float32",
        "accelerated": 0,
        "of": len(plan.masks),
        "dense": {},
        "reason": CPU_REASON,
    }
    dense = tiny.dense(name)
    ours, theirs, again = semi_structured.contestants(model, dense, plan)
    assert ours is model and theirs is dense and again == report


@pytest.mark.parametrize("kind", ["none", "block", "widths", "unstructured"])
def test_other_plans_have_no_report(kind):
    plan, model, dense = tiny.plan("dit", kind), tiny.dense("dit"), tiny.dense("dit")
    ours, theirs, report = semi_structured.contestants(model, dense, plan)
    assert ours is model and theirs is dense and report is None


@pytest.mark.parametrize(
    ("capability", "kernels"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_which_gpus_have_kernels(capability, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    reason = semi_structured.missing_kernels(torch.device("cuda"))
    assert (reason is None) == kernels
    assert kernels or "below compute capability 8.0; this GPU has (7, 5)" in reason
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert semi_structured.missing_kernels(torch.device("cuda")) is not None


# The way to the kernels, with a stand-in for the kernels themselves.


@pytest.fixture
def stand_in(monkeypatch) -> list[torch.Tensor]:
    """Pretends that the CPU has kernels; the weights that were handed to them."""
    given = []
    monkeypatch.setattr(semi_structured, "missing_kernels", lambda _: None)
    monkeypatch.setattr(
        semi_structured, "to_sparse_semi_structured", lambda w: given.append(w) or w.clone()
    )
    return given


def test_every_masked_layer_is_accelerated_or_has_a_reason(name, stand_in):
    model, plan = _masked(name)
    before = copy.deepcopy(model.state_dict())
    fast, report = semi_structured.accelerate(model, plan)
    tiny.assert_same(model.state_dict(), before)  # a copy was made; this one stays fp32
    layers = {weight.removesuffix(".weight") for weight in plan.masks}
    fit = {n for n in layers if semi_structured.obstacle(model.get_submodule(n)) is None}
    assert report["accelerated"] == len(stand_in) == len(fit)
    assert bool(fit) == any(isinstance(model.get_submodule(n), nn.Linear) for n in layers)
    assert report["of"] == len(layers)
    assert report["dense"].keys() == layers - fit
    assert (report["precision"], report["reason"]) == ("float16", None)
    assert fast.null_class == model.null_class
    for weight in stand_in:
        assert weight.dtype == torch.float16 and weight.is_contiguous()
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all()


def test_the_accelerated_model_predicts_the_same_within_half_precision(name, stand_in):
    model, plan = _masked(name)
    fast, _ = semi_structured.accelerate(model, plan)
    seen = []
    for layer in fast.modules():
        if layer._forward_pre_hooks:
            layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous()))
    x, t, y = tiny.inputs(name)
    t = t.half().to(t)  # FLUX rounds its times to the type of its latents
    with torch.no_grad():
        output, expected = fast(x, t, y), model(x, t, y)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2 * expected.std().item())
    assert len(seen) == len(stand_in) and all(seen), "the kernels need contiguous inputs"


def test_dense_is_timed_in_the_same_precision(stand_in):
    (model, plan), dense = _masked("dit"), tiny.dense("dit")
    ours, theirs, report = semi_structured.contestants(model, dense, plan)
    for network in (ours, theirs):
        assert {p.dtype for p in network.parameters()} == {torch.float16}
    assert report["precision"] == "float16"
    assert {p.dtype for p in dense.parameters()} == {torch.float32}


def test_a_model_without_any_fitting_layer_keeps_its_precision(stand_in):
    model, plan = _masked("unet")
    convolutions = {n: m for n, m in plan.masks.items() if m.dim() == 4}
    plan = Plan(masks=convolutions, pattern="2:4")
    ours, theirs, report = semi_structured.contestants(model, model, plan)
    assert ours is model and theirs is model
    assert (report["accelerated"], report["precision"]) == (0, "float32")
    assert len(report["dense"]) == report["of"] == len(convolutions)


# The kernels compute what the masked matrices say.


@needs_cuda
@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256)])
@pytest.mark.parametrize("rows", [1, 33])
def test_a_kernel_computes_the_masked_product(shape, rows):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    layer.weight.data = torch.randn(shape, generator=generator) * 0.1
    layer.weight.data *= targets.n_of_m_mask(layer.weight.data.abs(), 2, 4)
    layer = layer.cuda().half()
    x = torch.randn(rows, 4, shape[1], generator=generator).cuda().half()
    with torch.inference_mode():
        expected = layer(x)
    semi_structured._compress(layer)
    with torch.inference_mode():
        output = layer(x.transpose(0, 1)).transpose(0, 1)  # an input that is not contiguous
    assert isinstance(layer.weight, SparseSemiStructuredTensor)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


@needs_cuda
def test_an_accelerated_model_predicts_the_same_on_the_gpu(name):
    model, plan = _masked(name)
    model, inputs = model.cuda(), [value.cuda() for value in tiny.inputs(name)]
    fast, report = semi_structured.accelerate(model, plan)
    assert report["accelerated"] + len(report["dense"]) == report["of"]
    with torch.inference_mode():
        output, expected = fast(*inputs), model(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2 * expected.std().item())


# The record.


@pytest.mark.parametrize("kind", ["2:4", "unstructured"])
def test_measure_records_the_kernels(kind, tmp_path, monkeypatch):
    track, plan = tiny.smoke(), tiny.plan("dit", kind)
    instance = tiny.INSTANCES["dit"]
    images = SimpleNamespace(shape=instance.shape, classes=tiny.CLASSES)
    monkeypatch.setattr(settings_benchmark, "data_set", lambda _: images)
    monkeypatch.setattr(cost, "check_selected", lambda *_: None)  # the record's sizes are made up
    monkeypatch.setattr(cost.parallel, "device", lambda: torch.device("cpu"))
    cell = track.cell("dit", "magnitude_2_4", 0.5, "none", 0)
    made_from = {}
    for stage, removed in (("dense", Plan()), ("select", plan)):
        job = tiny.job(stage, track, tmp_path, cell)
        model = surgery.apply(tiny.dense("dit"), removed, instance.module)
        files = surgery.save(job.record.parent, model, removed, "dit", instance.config)
        record = sealed.read(examples.write(job, files, inputs=made_from))
        made_from = sealed.made_from(dense=record)
    content = tiny.plain(track)
    content["latency"]["variants"] = ["bf16"]
    track = tiny.track(track.name, content, track.methods)
    found = sealed.read(tiny.run("cost", track, tmp_path, cell)).latency
    assert found.forward_batch1.ratio > 0 and found.peak_memory_mb > 0
    assert found.variants["bf16"].forward_batch.images_per_s > 0
    assert found.alone in (True, False) and found.others.during.cpu >= 0
    if kind == "2:4":
        assert found.kernels.reason == CPU_REASON
        assert found.kernels.of == len(plan.masks)
    else:
        assert found.kernels is None
