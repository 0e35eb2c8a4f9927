"""Compiled and bf16 timings of tiny models; inductor itself is tried where a compiler exists."""

import copy
import functools
import shutil

import pytest
import tiny
import torch

from prunebench.evaluation import latency, semi_structured, variants

timed = functools.partial(latency.interleaved_latency, rounds=1, warmup=0)
NAMES = ("compiled", "bf16", "compiled_bf16")


class Toy(torch.nn.Linear):
    """Takes what a denoiser takes, and compiles in a moment."""

    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x, t, y):
        return torch.relu(super().forward(x))


TOYS = Toy(), Toy()


def pair(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    dense = copy.deepcopy(tiny.dense(family)).eval()
    return copy.deepcopy(dense), dense


def inputs(family: str) -> dict[str, tuple]:
    shape = tiny.INSTANCES[family].shape
    return {
        name: (torch.randn(size, *shape), torch.full((size,), 500.0), torch.arange(size) % 10)
        for name, size in (("forward_batch1", 1), ("forward_batch", 3))
    }


def test_every_combination_is_timed_at_both_sizes():
    both = variants.measure(["bf16", "compiled"], TOYS, inputs("dit"), timed, "eager")
    assert tuple(sorted(both, key=NAMES.index)) == NAMES
    for report in both.values():
        assert set(report) == {"forward_batch1", "forward_batch", "alone"}, report
        many = report["forward_batch"]
        assert many["images_per_s"] == pytest.approx(3 / (many["ms"] / 1e3))


@pytest.mark.parametrize("family", ["uvit", "unet_attention"])
def test_other_families_run_in_bf16(family):
    found = variants.measure(["bf16"], pair(family), inputs(family), timed)
    assert found["bf16"]["forward_batch"]["ms"] > 0, found


def test_what_is_timed_is_compiled_and_in_bf16():
    seen = []

    def spy(ours, theirs):
        with torch.inference_mode():
            seen.append([run().float() - plain() for run in (ours, theirs)])
        return {"ms": 1.0}

    model, values = tiny.dense("dit").eval(), inputs("dit")["forward_batch"]

    def plain():
        return model(*values)

    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    given = {"forward_batch": values}
    variants.measure(["bf16"], pair("dit"), given, spy)
    (low, _) = seen.pop()
    assert 0 < low.abs().max() < 0.1 and not compiled
    variants.measure(["compiled"], pair("dit"), given, spy, backend=backend)
    (same, _) = seen.pop()
    assert same.abs().max() < 1e-5 and compiled


def test_a_variant_that_fails_costs_only_itself():
    def broken(graph, _):
        raise RuntimeError("no compiler\nhere")

    found = variants.measure(["bf16", "compiled"], TOYS, inputs("dit"), timed, broken)
    assert "no compiler here" in found["compiled"]["failure"]
    assert "forward_batch" in found["bf16"] and "failure" in found["compiled_bf16"]


def test_sparse_kernels_stay_in_their_own_precision():
    both = tuple(semi_structured.Half(model) for model in pair("dit"))
    found = variants.measure(["bf16"], both, inputs("dit"), timed)
    assert found == {"bf16": {"failure": "2:4 kernels are timed in float16"}}


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = {"forward_batch": inputs("dit")["forward_batch"]}
    found = variants.measure(["compiled"], TOYS, given, timed)
    assert found["compiled"]["forward_batch"]["ms"] > 0, found
