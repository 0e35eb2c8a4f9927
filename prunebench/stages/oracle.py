"""The oracle: every layer mask of one sparsity, recovered and evaluated like the cells of a track.

With few layers all masks can be run, and a selection's percentile among them is exact. With many, a
stated number of random ones stands for all. Each mask is a job that keeps only its FID.
"""

import copy
import itertools
import math
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from prunebench import models
from prunebench.errors import CellError, UserError, machine_fault
from prunebench.evaluation import features, frechet
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import plan_layers
from prunebench.records import artefacts
from prunebench.stages import common as stages
from prunebench.stages.score import FEATURES
from prunebench.tracks import Cell, Layout, Track
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


def evaluate(
    track: Track, layout: Layout, model: str, recovery: str, seed: int, index: int
) -> None:
    """Recover, sample and evaluate mask `index`; a training that fails is a mask without a FID."""
    start, settings = time.perf_counter(), track.content["oracle"]
    artefacts.read_record(layout.trained(model))
    dense, _ = surgery.load(Path(layout.trained(model)).parent)
    dense = dense.to(parallel.device())
    family = models.family(track.model(model)["family"])
    found, exhaustive = masks(dense, family, settings["sparsity"], settings["masks"])
    if index >= len(found):
        raise UserError(
            f"oracle.masks: model '{model}' has only {len(found)} masks; set it to that"
        )
    cell = Cell(track.name, model, "oracle", settings["sparsity"], recovery, seed)
    file, inputs = layout.oracle(model, recovery, seed, index), (layout.trained(model),)
    checkpoints = stages.checkpoints_of(track, file, "oracle", model, cell, inputs)
    meter, failure, fid = BudgetMeter(), None, None
    try:
        plan = Plan(layers=found[index])
        fid = _fid(track, layout, cell, dense, plan, meter, checkpoints)
    except (CellError, RuntimeError) as error:  # as in stages.guarded: the mask does not run
        if machine_fault(error):
            raise
        failure = {"stage": "oracle", "error": str(error), "log": None}
    place = {"track": track.name, "model": model, "sparsity": settings["sparsity"],
             "recovery": recovery, "seed": seed, "mask": index}  # fmt: skip
    record = {"schema": 1, "cell": place, "layers": list(found[index]), "masks": len(found),
              "exhaustive": exhaustive, "fid": fid, "failure": failure,
              "settings": stages.shared_settings(track, model) | {"oracle": settings},
              "extractor": artefacts.read_record(layout.extractor)["extractor"]["sha256"],
              "budget": meter.report()}  # fmt: skip
    stages.finish(file, track, start - checkpoints.earlier_s, [], **record)


def _fid(
    track: Track,
    layout: Layout,
    cell: Cell,
    dense: nn.Module,
    plan: Plan,
    meter: BudgetMeter,
    checkpoints: Checkpoints,
) -> float:
    family = models.family(track.model(cell.model)["family"])
    pruned = surgery.apply(copy.deepcopy(dense), plan, family)
    if cell.recovery != "none":
        left = stages.training_left(track, cell)
        data = stages.training_data(track, layout, cell.model)
        stages.heal(track, cell, pruned, plan, dense, data, meter, left, checkpoints)
    sampler = stages.sampler_for(track, layout, cell.model, pruned, plan)
    images = torch.cat(list(sampler.images(
        cell.seed, 0, track.content["sampling"]["count"], track.content["sampling"]["batch"]
    )))  # fmt: skip
    used = artefacts.read_record(layout.extractor)["extractor"]
    extractor = features.load_extractor(used["name"], Path(used["weights"]))
    generated = extractor.extract(images, track.content["evaluation"]["batch"])["features"]
    reference = artefacts.read_tensors(Path(layout.extractor).parent / FEATURES)
    return frechet.frechet_distance(
        *frechet.statistics(generated), *frechet.reference_statistics(reference)
    )
