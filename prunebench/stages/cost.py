"""Cost: what a pruned architecture costs beside the dense one."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunebench.diffusion.sampling import Sampler
from prunebench.evaluation import cost as counts
from prunebench.evaluation import latency, semi_structured, variants
from prunebench.models import precision
from prunebench.models.conditions import Condition
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.records import sealed
from prunebench.records.parts import Costs, Student
from prunebench.stages.inputs import sampler_for
from prunebench.stages.job import Job
from prunebench.stages.work import check_selected, dense_model
from prunebench.training import parallel


def cost(job: Job) -> None:
    """Measure MACs, memory and latency of the pruned architecture beside the dense one."""
    chosen, dense = job.read("select"), job.read("dense", payload=False)
    sealed.check_made_from(job.path("select"), chosen, dense=dense)
    (pruned, plan), whole = surgery.load(job.path("select").parent), dense_model(job)
    check_selected(job, whole, pruned, plan, chosen)
    pruned, whole = pruned.to(parallel.device()), whole.to(parallel.device())
    own, arithmetic = precision.converted(pruned, job.cell.precision)
    plain, _ = precision.converted(whole, job.track.undisturbed["precision"])
    fast, plain, kernels = _on_kernels(own, plain, plan, job.cell.precision)
    # Only a recovery that leaves fewer steps has a measurement of its own.
    taught = job.read("recover") if job.track.fold(job.cell.method, job.cell.recovery) > 1 else None
    student = taught.student if taught else Student()
    samplers = (
        sampler_for(job, fast, plan, student=student),
        sampler_for(job, plain, Plan(), job.settings.sampling),
    )
    settings = job.track.settings.latency
    sizes = {"forward_batch1": 1, "forward_batch": settings.batch}
    inputs = {name: _inputs(samplers[0], size) for name, size in sizes.items()}
    report = _timed(settings, (fast, plain), samplers, inputs, sizes)
    full = functools.partial(own, *inputs["forward_batch"])
    report |= {"peak_memory_mb": counts.peak_memory(full, own), "kernels": kernels}
    macs = counts.count_macs(pruned, *inputs["forward_batch1"])
    theirs = counts.count_macs(whole, *inputs["forward_batch1"])
    products = {**macs, **{f"dense_{name}": value for name, value in theirs.items()}}
    job.finish(
        [],
        sealed.made_from(select=chosen, dense=dense, **({"recover": taught} if taught else {})),
        latency=report | {"arithmetic": arithmetic},
        size=Costs(**dict(chosen.size), **products),
    )


def _on_kernels(
    pruned: nn.Module, dense: nn.Module, plan: Plan, precision_: str
) -> tuple[nn.Module, nn.Module, dict | None]:
    """Both models with 2:4 kernels where the plan has the pattern; there are none for int8."""
    if precision_ == "int8":
        return pruned, dense, None
    return semi_structured.contestants(pruned, dense, plan)


def _timed(
    settings: dict,
    pair: tuple[nn.Module, nn.Module],
    samplers: tuple[Sampler, Sampler],
    inputs: dict[str, tuple],
    sizes: dict[str, int],
) -> dict:
    """Times of forwards and of whole samplings, pruned and dense in turns, and the conditions."""
    images, device = settings.images, parallel.device()
    timed = functools.partial(
        latency.interleaved_latency,
        rounds=settings.rounds,
        warmup=settings.warmup,
        device=device,
    )
    sampling = [_whole_sampling(sampler, images) for sampler in samplers]
    with latency.conditions(device, settings.wait) as conditions:
        times = {
            name: latency.with_throughput(timed(*_forwards(pair, inputs[name])), size)
            for name, size in sizes.items()
        }
        times["sampling"] = _per_image(timed(*sampling), images)
    report = {**times, "batch": settings.batch, **conditions}
    if settings.variants:
        report["variants"] = variants.measure(settings.variants, pair, inputs, timed)
    return report


def _inputs(sampler: Sampler, size: int) -> tuple[Tensor, Tensor, Condition]:
    """Noise, the noisiest time and conditions of `size` images, as the denoiser takes them."""
    x = torch.randn(size, *sampler.shape, generator=torch.Generator().manual_seed(0))
    time_ = sampler.objective.model_time(sampler.objective.grid(2)[-1:]).expand(size)
    return x.to(sampler.device), time_.to(sampler.device), sampler.asked(range(size))


def _forwards(pair: tuple[nn.Module, nn.Module], inputs: tuple) -> list[Callable[[], Tensor]]:
    return [functools.partial(model, *inputs) for model in pair]


def _whole_sampling(sampler: Sampler, size: int) -> Callable[[], Tensor]:
    x, _, y = _inputs(sampler, size)
    return functools.partial(sampler.denoise, x, y)


def _per_image(timing: dict, images: int) -> dict:
    return {k: v if k == "ratio" else v / images for k, v in timing.items()}
