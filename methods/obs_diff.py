"""Prunes weights one column at a time and solves for those that stay: Optimal Brain Surgeon.

J. Zhu et al., "OBS-Diff: Accurate Pruning For Diffusion Models in One-Shot", ICLR 2026, arXiv
2510.06751. Of every matrix the squared error of its outputs ||(W - W') X||^2 is kept small. With
H = sum of alpha_t x x^T over the inputs x at all timesteps, weights of the smallest w^2 / [H^-1]_jj
go, and those that stay take over what they did (SparseGPT's solver, Frantar & Alistarh 2023).
alpha_t falls from early, noisy timesteps to late ones by a logarithm. Matrices are pruned in
packages, in the order they run; the inputs of a package are measured on the network that the
packages before it left.

Structured, heads and feed-forward neurons go by the columns of the matrix that reads them.
No training: only forward passes. See docs/methods/obs_diff.md.
"""

import copy
import itertools
import math

import torch

from prunebench.errors import CellError
from prunebench.models.units import parameter_count
from prunebench.pruning import surgery
from prunebench.pruning.plan import Plan
from prunebench.pruning.targets import n_and_m, plan_widths
from prunebench.selection.brain_surgeon import Reader, prune, spread
from prunebench.selection.layer_inputs import matrix, order_of_use, patches, unmatrix, watched

TITLE = "OBS-Diff"
KIND = "weights"
UPDATES = "closed form"
FAITHFUL_TO = "the authors' code"
NOTES = (
    "No training: the weights that stay are solved for. Calibrated on noised images, not on the "
    "authors' sampling trajectories; masks bring no speed on dense kernels."
)
CHECK = {"images": 2, "batch": 2, "timesteps": 2, "packages": 2}
PAPER = "arXiv 2510.06751"
BIBTEX = """@inproceedings{zhu2026obsdiff,
  title = {{OBS-Diff}: Accurate Pruning For Diffusion Models in One-Shot},
  author = {Zhu, Junhan and Wang, Hesong and Su, Mingluo and Wang, Zefang and Wang, Huan},
  booktitle = {International Conference on Learning Representations},
  year = {2026}
}"""
VARIANTS = {
    "2_4": {
        "TITLE": "OBS-Diff, 2:4",
        "SPARSITIES": (0.5,),
        "parameters": {"pattern": "2:4"},
    },
    "structured": {
        "TITLE": "OBS-Diff, structured",
        "KIND": "widths",
        "FAMILIES": ("conditional_unet", "dit", "flux", "uvit"),
        "NOTES": "No training: heads and neurons go, and what reads the others is solved for.",
        "parameters": {"pattern": "structured"},
    },
}
CHUNK = 64  # neurons that go between two rankings
FUSION = 60  # of reciprocal rank fusion, where several matrices read a width


def select(
    context,
    images=100,
    batch=50,
    timesteps=25,
    packages=4,
    pattern="unstructured",
    damping=0.01,
    least=0.8,
    most=1.2,
):
    """Calibrate on `images` images, each at `timesteps` times, once per package; prune; solve.

    Args:
        packages: groups of matrices that are calibrated together.
        pattern: "unstructured", "N:M", or "structured".
        damping: share of H's mean diagonal that is added to it.
        least, most: alpha of the last, clean timestep and of the first, noisy one.
    """
    model = copy.deepcopy(context.model)
    batches = calibration(context, images, batch, timesteps, least, most)
    if pattern == "structured":
        return structured(context, model, batches, packages, damping)
    masks, target = {}, quotas(context, pattern)
    if not target:
        raise CellError(f"no weight of this network has the pattern {pattern}")
    for names in grouped(context, model, list(target), batches, packages):
        for name, moment in moments(context, model, names, batches).items():
            weight = model.get_parameter(name)
            solved, kept = prune(matrix(weight).double(), moment, target[name], damping)
            weight.data.copy_(unmatrix(solved, weight.shape))
            masks[name] = unmatrix(kept, weight.shape).cpu()
    dense = sorted(set(context.weights()) - set(masks))
    return Plan(masks=masks, pattern=pattern, notes={"stay_dense": dense}), model


# ---- calibration


def calibration(context, images, batch, timesteps, least, most):
    """Pairs of a batch at one time and that time's alpha, from noisy to clean."""
    times = context.data.objective.grid(timesteps).flip(0)
    alphas = log_decrease(timesteps, least, most)
    return [
        (context.at_time(drawn, t), alpha)
        for drawn in context.draws(images, batch)
        for t, alpha in zip(times, alphas, strict=True)
    ]


def log_decrease(count, least, most):
    """Weights of `count` timesteps from `most` to `least`, slowly at first: ln(count - i)."""
    if count == 1:
        return [most]
    share = (most - least) / math.log(count)
    return [least + share * math.log(count - index) for index in range(count)]


def grouped(context, model, names, batches, packages):
    """The names in the order they run, in `packages` groups of nearly equal number."""
    with torch.no_grad():
        first, _ = batches[0]
        one = first.rows(range(1))
        order = order_of_use(model, names, lambda: context.predict(model, one))
    count = min(packages, len(order))
    ends = [len(order) * index // count for index in range(count + 1)]
    return [order[start:end] for start, end in itertools.pairwise(ends)]


@torch.no_grad()
def moments(context, model, names, batches):
    """H = 2 sum(alpha x x^T) / sum(alpha), the sums over images, of every named weight's inputs."""
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    sums = {name: no_moment(layer.weight) for name, layer in layers.items()}
    total = sum(alpha * len(drawn.x0) for drawn, alpha in batches)
    for drawn, alpha in batches:

        def take(name, inputs, share=2 * alpha / total):
            rows = patches(layers[name], inputs).double()
            sums[name].addmm_(rows.T, rows, alpha=share)

        with watched(model, names, take):
            context.predict(model, drawn)
    return sums


def no_moment(weight):
    """Zeros, float64 [columns, columns]."""
    columns = weight[0].numel()
    return torch.zeros(columns, columns, dtype=torch.float64, device=weight.device)


# ---- unstructured and N:M


def quotas(context, pattern):
    """What every weight loses: a number of its entries, in all what the target asks for; or N:M."""
    weights = context.weights()
    if pattern != "unstructured":
        n, m = n_and_m(pattern) or (0, 0)
        if not 0 < n < m:
            raise CellError(f"pattern '{pattern}' is none of unstructured, N:M, structured")
        return {name: (n, m) for name, w in weights.items() if w.shape[1] % m == 0}
    count = round(context.sparsity * parameter_count(context.model))
    sizes = [weight.numel() for weight in weights.values()]
    if count > sum(sizes):
        raise CellError(f"{count} weights have to go but only {sum(sizes)} can be masked")
    return dict(zip(weights, spread(count, sizes), strict=True))


# ---- structured


def structured(context, model, batches, packages, damping):
    """Remove heads and neurons at one ratio; the matrices that read the others are solved for."""
    units = {u.name: u for u in context.widths() if read_by_matrices(u, model)}
    context.check_reachable(list(units.values()), one_stays=True)
    plain = {name: torch.zeros(unit.size) for name, unit in units.items()}
    plan = plan_widths(model, list(units.values()), plain, context.sparsity)
    readers = {r: None for name in plan.kept for r in reading(units[name])}
    kept, found = {}, {}
    for names in grouped(context, model, list(readers), batches, packages):
        for name, moment in moments(context, model, names, batches).items():
            found[name] = Reader(model.get_parameter(name), moment, damping)
        for name in [name for name in plan.kept if name not in kept]:
            if reading(units[name]).keys() <= found.keys():
                kept[name] = shrink(units[name], len(plan.kept[name]), found)
        waiting = {r for name in plan.kept if name not in kept for r in reading(units[name])}
        for name in found.keys() - waiting:  # their inverses take more memory than the network
            found.pop(name).write()
    plan = Plan(kept={name: kept[name] for name in plan.kept}, notes={"readers": list(readers)})
    return plan, surgery.apply(model, plan, context.family, context.widths())


def reading(unit):
    """The matrices that read a width, with the columns [size, k] of its channels."""
    return {m.tensor: m.index for m in unit.members if m.axis == 1}


def read_by_matrices(unit, model):
    """Whether only linear layers read a width: heads and feed-forward neurons."""
    found = [model.get_submodule(name.removesuffix(".weight")) for name in reading(unit)]
    return bool(found) and all(isinstance(layer, torch.nn.Linear) for layer in found)


def shrink(unit, size, readers):
    """The channels of a width that stay, `size` of them: heads go one by one, neurons in chunks."""
    columns = {name: index.to(readers[name].weight.device) for name, index in reading(unit).items()}
    left = list(range(unit.size))
    while len(left) > size:
        one = 1 if any(index.shape[1] > 1 for index in columns.values()) else CHUNK
        places = fused([readers[name].order(index[left]) for name, index in columns.items()])
        gone = [left[place] for place in places[: min(one, len(left) - size)]]
        for name, index in columns.items():
            readers[name].remove(index[gone].flatten())
        left = [channel for channel in left if channel not in gone]
    return tuple(left)


def fused(orders):
    """One order of several: by the sum of 1 / (60 + rank), the highest first."""
    scores = {}
    for order in orders:
        for rank, place in enumerate(order, start=1):
            scores[place] = scores.get(place, 0) + 1 / (FUSION + rank)
    return sorted(scores, key=lambda place: -scores[place])
