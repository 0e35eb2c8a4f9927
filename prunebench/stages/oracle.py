"""The oracle: every layer mask of one sparsity, recovered and evaluated like the cells of a track.

With few layers all masks can be run, and a selection's percentile among them is exact. With many, a
stated number of random ones stands for all. Each mask is a job that keeps only its FID.
"""

import copy
import dataclasses
import itertools
import math
from types import ModuleType

import torch
from torch import nn

from prunebench.errors import CellError, UserError, machine_fault
from prunebench.evaluation import frechet
from prunebench.models import precision
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import plan_layers
from prunebench.records import sealed
from prunebench.records.parts import Quality, Student, placeless
from prunebench.stages import extractor, recover
from prunebench.stages.inputs import sampler_for, trained_on
from prunebench.stages.job import Job, shared_settings
from prunebench.stages.work import checkpoints_of, dense_model
from prunebench.tracks import plain
from prunebench.training import parallel
from prunebench.training.budget import BudgetMeter
from prunebench.training.checkpoints import Checkpoints

SEED = 0  # of the random masks, where there are too many for all


def masks(
    model: nn.Module, family: ModuleType, sparsity: float, count: int
) -> tuple[list[tuple[str, ...]], bool]:
    """At most `count` different masks of a sparsity, and whether these are all there are.

    Layers of one size: all subsets of the size that meets the target, or random ones of them.
    Unequal layers: the plans of random orders, as the random-layers control draws them.
    """
    layers = family.layers(model, "block")
    size = len(plan_layers(model, layers, sparsity).layers)
    equal = len({layer.parameters for layer in layers}) == 1
    if equal and math.comb(len(layers), size) <= count:
        names = sorted(layer.name for layer in layers)
        return list(itertools.combinations(names, size)), True
    generator, found = torch.Generator().manual_seed(SEED), {}
    for _ in range(100 * count):
        order = [layers[i] for i in torch.randperm(len(layers), generator=generator)]
        found[plan_layers(model, order, sparsity).layers] = None
        if len(found) == count:
            break
    return list(found), False


def oracle(job: Job) -> None:
    """Recover, sample and evaluate one mask; a training that fails is a mask without a FID."""
    settings, index = job.track.settings.oracle, job.names["mask"]
    dense = dense_model(job).to(parallel.device())
    found, exhaustive = masks(dense, job.family, settings.sparsity, settings.masks)
    if index >= len(found):
        raise UserError(
            f"oracle.masks: model '{job.model}' has only {len(found)} masks; set it to that"
        )
    checkpoints = checkpoints_of(job, job.layout.record("dense", **job.names))
    meter = BudgetMeter()
    try:
        fid = Quality(value=_fid(job, dense, Plan(layers=found[index]), meter, checkpoints))
    except (CellError, RuntimeError) as error:  # as in job.guarded: the mask does not run
        if machine_fault(error):
            raise
        fid = Quality(reason=placeless(str(error)) or type(error).__name__)
    used = job.read("extractor", payload=False)
    made_from = sealed.made_from(dense=job.read("dense", payload=False), extractor=used)
    job.finish(
        [],
        {**made_from, **trained_on(job)},
        checkpoints.earlier_s,
        layers=found[index],
        masks=len(found),
        exhaustive=exhaustive,
        fid=fid,
        settings=shared_settings(job) | {"oracle": plain(settings)},
        extractor=used.extractor.sha256,
        budget=meter.report(),
    )


def _fid(
    job: Job, dense: nn.Module, plan: Plan, meter: BudgetMeter, checkpoints: Checkpoints
) -> float:
    place = {**job.names, "method": "oracle", "sparsity": job.track.settings.oracle.sparsity}
    job = dataclasses.replace(job, names=place)  # as a cell
    pruned = surgery.apply(copy.deepcopy(dense), plan, job.family)
    student = Student()
    if job.cell.recovery != "none":
        left = recover.training_left(job)
        student = recover.train(job, pruned, plan, dense, meter, left, checkpoints).student
    drawn, _ = precision.converted(pruned, job.track.undisturbed["precision"])
    sampler = sampler_for(job, drawn, plan, student=student)
    settings = job.track.settings.sampling
    images = torch.cat(list(sampler.images(job.cell.seed, 0, settings.count, settings.batch)))
    used, reference, _ = extractor.load(job)
    generated = used.extract(images, job.track.settings.evaluation.batch)["features"]
    return frechet.frechet_distance(
        *frechet.statistics(generated), *frechet.reference_statistics(reference)
    )
