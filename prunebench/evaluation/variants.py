"""Latency of compiled and bf16 models, beside the eager single precision that every row has."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from prunebench.evaluation import latency
from prunebench.models.precision import Half

log = logging.getLogger(__name__)

REASON = 200  # letters of a compiler's complaint that are kept
Timed = Callable[[Callable, Callable], dict[str, float]]


def measure(
    wanted: Sequence[str],
    pair: tuple[nn.Module, nn.Module],
    inputs: Mapping[str, tuple[Tensor, ...]],
    timed: Timed,
    backend: str = "inductor",
) -> dict[str, dict]:
    """Time one forward of the pruned and the dense model under every combination of variants.

    Args:
        wanted: of "compiled" and "bf16".
        pair: the pruned and the dense model, eager; float32 or, with 2:4 kernels, float16.
        inputs: by name, what both models are called with; the first axis counts images.
        timed: times two functions in turns, as `latency.interleaved_latency` does.
        backend: of `torch.compile`.

    Returns:
        For "compiled", "bf16" and "compiled_bf16", as far as wanted: the timing of each input with
        its "images_per_s", and "alone" (see `latency.conditions`). A variant that can't be built or
        run is {"failure": reason}, for the row stands without it.
    """
    report = {}
    for number in range(1, len(wanted) + 1):
        for names in combinations(sorted(wanted, reverse=True), number):
            key = "_".join(sorted(names, reverse=True))
            build = partial(_variants, pair, names, backend)
            report[key] = attempt(key, lambda build=build: compare(build(), inputs, timed))
    return report


def attempt(what: str, run: Callable[[], dict]) -> dict:
    """What `run` returns, or {"failure": reason} where it can't be compiled, run or held."""
    try:
        return run()
    except RuntimeError as error:  # what dynamo, its compilers and CUDA raise
        reason = " ".join(str(error).split())[:REASON]
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"out of memory: {reason}"
        log.warning("no latency of %s: %s", what, reason)
        return {"failure": reason}


def _variants(pair: Iterable[nn.Module], names: Iterable[str], backend: str) -> list[nn.Module]:
    return [_variant(model, names, backend) for model in pair]


def _variant(model: nn.Module, names: Iterable[str], backend: str) -> nn.Module:
    if "bf16" in names:
        if isinstance(model, Half):
            raise RuntimeError("2:4 kernels are timed in float16")
        model = Half(model, torch.bfloat16)
    return compiled(model, backend) if "compiled" in names else model


def compiled(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compiled by `torch.compile` for every batch size anew.

    Not dynamic: the second batch size would get slower kernels that fit any size.
    """
    return torch.compile(model, backend=backend, dynamic=False)


def compare(
    pair: Sequence[nn.Module], inputs: Mapping, timed: Timed, wait: float = 0.0
) -> dict[str, object]:
    """The timing of each input, by its name, and "alone"; see `measure` and `conditions`."""
    runs = {name: [partial(m, *values) for m in pair] for name, values in inputs.items()}
    device = next(iter(inputs.values()))[0].device
    torch._dynamo.reset()  # the limit of recompilations is per function, and models share theirs
    # Beyond that limit dynamo would go on eagerly and say nothing.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for run in runs.values():  # compiles, with compilers that must not count as neighbours
            latency.interleaved_latency(*run, rounds=1, warmup=0, device=device)
        with latency.conditions(device, wait) as conditions:
            times = {name: timed(*run) for name, run in runs.items()}
    sizes = {name: len(values[0]) for name, values in inputs.items()}
    found = {name: latency.with_throughput(time, sizes[name]) for name, time in times.items()}
    return {**found, "alone": conditions["alone"]}
