"""What every layer adds to a forward pass: counted, or measured on the machine at hand."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from prunebench.evaluation import cost, latency
from prunebench.models.conditions import each
from prunebench.models.copies import rebuilt, without
from prunebench.models.units import Layer


def macs(
    model: nn.Module, family: ModuleType, layers: Sequence[Layer], inputs: tuple
) -> dict[str, int]:
    """Multiply-accumulates that go with each layer, exactly: with it, less without it.

    Counted without memory, on the meta device, once per type and shapes; attention products count.

    Args:
        inputs: x, t and y of one image.
    """
    bare = rebuilt(model, lambda tensor: tensor.to("meta"))
    x, t, y = (each(lambda v: v.to("meta"), value) for value in inputs)

    def counted(network: nn.Module) -> int:
        return cost.count_macs(network, x, t, y)["macs"]

    names = [layer.name for layer in layers]
    given = _given(bare, names, lambda: bare(x, t, y))
    whole, table, found = counted(bare), {}, {}
    for name in names:
        key = _shapes(bare.get_submodule(name), *given[name])
        if key not in table:
            table[key] = whole - counted(without(bare, family, [name]))
        found[name] = table[key]
    return found


def latencies(
    model: nn.Module,
    names: Sequence[str],
    forward: Callable[[], object],
    bare: nn.Module,
    rounds: int,
    warmup: int,
) -> dict[str, float]:
    """Milliseconds of each layer alone, measured once per type and shapes.

    Args:
        forward: one pass through `model`, which shows what the layers are given.
        bare: `model` as no meter watches it; its layers are timed.
    """
    given = _given(model, names, forward)
    device, table, found = next(model.parameters()).device, {}, {}
    for name in names:
        module, (inputs, named) = bare.get_submodule(name), given[name]
        key = _shapes(module, inputs, named)
        if key not in table:

            def call(module: nn.Module = module, inputs=inputs, named=named) -> object:
                return module(*inputs, **named)

            table[key] = latency.median_ms(call, rounds, warmup, device)
        found[name] = table[key]
    return found


def _given(
    model: nn.Module, names: Sequence[str], forward: Callable[[], object]
) -> dict[str, tuple[tuple, dict]]:
    """What the named modules are called with in one pass: arguments by place and by name."""
    given = {}

    def watch(name: str) -> Callable:
        def before(_: nn.Module, inputs: tuple, named: dict) -> None:
            given.setdefault(name, (inputs, named))

        return before

    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return given


def _shapes(module: nn.Module, inputs: tuple, named: dict) -> tuple:
    """What layers of equal latency have in common: type, and shapes of weights and inputs."""
    weights = tuple(tuple(parameter.shape) for parameter in module.parameters())
    tensors = [v for v in (*inputs, *named.values()) if isinstance(v, Tensor)]
    return type(module).__name__, weights, tuple(tuple(tensor.shape) for tensor in tensors)
