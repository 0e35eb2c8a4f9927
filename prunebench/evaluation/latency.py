"""Measured speed: pruned and dense take turns, so that both meet the same noise.

On a busy machine the ratio of two separate timings varies by 25-45 %; taking turns and dividing the
medians of the process's own CPU time brings that to 1-3 % (docs/design.md).
"""

import gc
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from prunebench.evaluation import neighbours

log = logging.getLogger(__name__)

THREADS = 1  # with two, every estimator fails on a loaded machine
Timer = Callable[[Callable[[], object]], float]


def interleaved_latency(
    candidate: Callable[[], object],
    dense: Callable[[], object],
    rounds: int,
    warmup: int,
    device: torch.device | str = "cpu",
    timer: Timer | None = None,
) -> dict[str, float]:
    """Time two functions in turns, `rounds` times each, after `warmup` untimed rounds.

    On the CPU one thread runs and the process's CPU time is read, so other processes hardly count;
    on CUDA events bracket the call, which should be alone on the GPU. Gradients are off.

    Args:
        timer: times one call in milliseconds; chosen by the device where None.

    Returns:
        "ms" median and "iqr_ms" interquartile range of candidate, "dense_ms" median of dense,
        "ratio" = ms / dense_ms, below 1 where candidate is faster.
    """
    timer = timer or _timer(device)
    contestants = ((candidate, own := []), (dense, others := []))
    with torch.inference_mode(), _quiet():
        for turn in range(warmup + rounds):
            # Who goes first alternates too: the second finds warmer caches and clocks.
            for function, times in contestants if turn % 2 else reversed(contestants):
                elapsed = timer(function)
                if turn >= warmup:
                    times.append(elapsed)
    ms, dense_ms = statistics.median(own), statistics.median(others)
    low, high = np.percentile(own, [25, 75])
    return {"ms": ms, "iqr_ms": float(high - low), "dense_ms": dense_ms, "ratio": ms / dense_ms}


def median_ms(
    function: Callable[[], object],
    rounds: int,
    warmup: int,
    device: torch.device | str = "cpu",
    timer: Timer | None = None,
) -> float:
    """Median time of one function in milliseconds, alone; otherwise as `interleaved_latency`."""
    timer = timer or _timer(device)
    with torch.inference_mode(), _quiet():
        times = [timer(function) for _ in range(warmup + rounds)]
    return statistics.median(times[warmup:])


def _timer(device: torch.device | str) -> Timer:
    return _cuda_ms if torch.device(device).type == "cuda" else _cpu_ms


def with_throughput(timing: dict[str, float], images: int) -> dict[str, float]:
    """A timing of `interleaved_latency` with "images_per_s", where one call makes `images`."""
    return {**timing, "images_per_s": 1e3 * images / timing["ms"]}


@contextmanager
def conditions(
    device: torch.device | str = "cpu",
    wait: float = 0.0,
    observe: Callable[[], neighbours.Load] | None = None,
) -> Iterator[dict]:
    """Wait up to `wait` seconds for a quiet machine; say how quiet it was while the block ran.

    Args:
        observe: looks at what others use before the block; None: a real look of 0.2 s.

    Yields:
        A dict, complete after the block: "threads"; "device"; "load_average" of the minute before;
        "waited_s"; "others", what other processes used "before" and "during" the block; "alone",
        whether that was nothing to speak of, None where nothing says.
    """
    device = torch.device(device)
    waited, before = neighbours.wait(wait, observe or partial(neighbours.look, device))
    found = {
        "threads": THREADS,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "load_average": round(os.getloadavg()[0], 2),
        "waited_s": waited,
    }
    watch = neighbours.Watch(device)
    yield found
    during = watch.load()
    found["others"] = {"before": asdict(before), "during": asdict(during)}
    found["alone"] = neighbours.alone((before, during), device)
    if found["alone"] is False:
        log.warning("not timed alone: meanwhile %s", during)


def _cpu_ms(function: Callable[[], object]) -> float:
    start = time.process_time_ns()
    function()
    return (time.process_time_ns() - start) / 1e6


def _cuda_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@contextmanager
def _quiet() -> Iterator[None]:
    """A fixed number of threads and no garbage collection while timing; both are put back."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(THREADS)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
