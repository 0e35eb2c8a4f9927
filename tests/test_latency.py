"""The protocol under a fake clock, and once on real work."""

import gc

import pytest
import torch

from prunebench.evaluation.latency import interleaved_latency


def test_medians_ratio_and_spread_under_a_fake_clock():
    costs = {"candidate": iter([99, 1, 2, 3, 4, 5]), "dense": iter([99, 6, 6, 6, 6, 600])}
    latency = interleaved_latency(
        "candidate", "dense", rounds=5, warmup=1, timer=lambda name: next(costs[name])
    )
    assert latency == {"ms": 3, "iqr_ms": 2, "dense_ms": 6, "ratio": 0.5}


def test_turns_alternate_and_warmup_is_dropped():
    order = []
    interleaved_latency("c", "d", 2, 2, timer=lambda name: order.append(name) or 1.0)
    assert "".join(order) == "dccddccd"


def test_dense_against_itself_keeps_two_sets_of_times():
    clock = iter([1.0, 2.0])
    latency = interleaved_latency("dense", "dense", 1, 0, timer=lambda _: next(clock))
    assert (latency["ms"], latency["dense_ms"], latency["ratio"]) == (2, 1, 2)


def test_timing_runs_on_one_thread_without_gradients_or_collection():
    seen = []
    threads = torch.get_num_threads()

    def look():
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), gc.isenabled()))

    interleaved_latency(look, look, 1, 0)
    assert set(seen) == {(1, False, False)}
    assert torch.get_num_threads() == threads
    assert gc.isenabled()


def test_twice_the_work_takes_about_twice_the_time():
    matrix = torch.randn(192, 192)

    def work(times: int):
        for _ in range(times):
            matrix @ matrix

    latency = interleaved_latency(lambda: work(40), lambda: work(20), rounds=25, warmup=3)
    assert latency["ratio"] == pytest.approx(2, rel=0.25)
