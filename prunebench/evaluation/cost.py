"""What a model costs on paper: parameters, multiply-accumulates, peak memory."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop, bmm_flop

aten = torch.ops.aten


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once, zeros count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Number of parameters that are not exactly zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def count_macs(model: nn.Module, *inputs, **keywords) -> dict[str, int]:
    """Multiply-accumulates of `model(*inputs, **keywords)` in both conventions papers use.

    Attention products are the batched products of two activations (query-key, attention-value);
    fvcore, thop and their kin miss them inside PyTorch's fused attention. Zeroed weights count:
    only an architecture that shrank costs less. Works on the meta device too.

    Returns:
        "macs" and "macs_without_attention_products".
    """
    weights = {_storage(parameter) for parameter in model.parameters()}
    attention = 0

    def count_products(formula: Callable) -> Callable:
        def flops(*operands: Tensor, **rest) -> int:
            nonlocal attention
            count = formula(*operands, **rest)
            # A linear layer on a strided input runs as a batched product with its expanded weight.
            if weights.isdisjoint(_storage(operand) for operand in operands):
                attention += count
            return count

        flops._get_raw = True  # have the counter hand over tensors, not their shapes
        return flops

    formulas = {aten.bmm: bmm_flop, aten.baddbmm: baddbmm_flop}
    mapping = {product: count_products(formula) for product, formula in formulas.items()}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Fused attention has no formula on every backend; the plain one decomposes into products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs, **keywords)
    total = counter.get_total_flops()
    return {"macs": total // 2, "macs_without_attention_products": (total - attention) // 2}


def peak_memory(run: Callable[[], object], model: nn.Module) -> float:
    """Peak memory of one call of `run` in MB (10^6 bytes): the model and what the call allocates.

    Other tensors that are alive (a dense model beside the pruned one) are not counted. On CUDA the
    peak is the allocator's. On the CPU it is the peak of the running sum of PyTorch's allocations
    as its profiler records them: reproducible to the byte, unlike the resident set, but blind to
    what libraries allocate behind PyTorch's back.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device
    with torch.inference_mode():  # gradients would keep every activation
        allocated = _cuda_peak(run, device) if device.type == "cuda" else _cpu_peak(run)
    return (sum(map(_bytes, tensors)) + allocated) / 1e6


def _bytes(tensor: Tensor) -> int:
    """Of a 2:4 weight that is stored for sparse kernels: what it is packed into."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _cuda_peak(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(run: Callable[[], object]) -> int:
    # A CUDA build without a driver would log an error about the missing GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # an identity that the meta device has as well
