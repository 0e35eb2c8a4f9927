"""How often EntPruner's vote repeats when its batches are drawn anew, for some numbers of them.

    python scripts/vote_repeats.py releases/embedded/dit-0

The condition number of the tangent kernel is computed on many batches, of the network and of those
without its first and first two layers by CED. Batches are then resampled: a line per number of
batches says for which share of the draws the smaller network has the lower mean, arithmetic and
geometric. A vote repeats where that is near 0 or 1.
"""

import argparse
from pathlib import Path

import torch

from prunebench import tracks
from prunebench.pruning import surgery
from prunebench.selection.context import Context
from prunebench.selection.proxies import ntk_condition
from prunebench.stages.inputs import training_data
from prunebench.stages.job import Job
from prunebench.tracks import methods
from prunebench.training.budget import BudgetMeter

TRACK = "embedded_releases"  # whose recipes made the released models
METHOD = "entpruner"
DRAWS = 20_000
COUNTS = (2, 4, 8, 16, 32, 64)


def context_of(folder: Path) -> Context:
    """What the method is given for a released model; the folder is named model-seed."""
    job = Job("select", tracks.load(TRACK), {"model": folder.name.rpartition("-")[0]})
    return Context(
        surgery.load(folder)[0],
        job.family,
        job.settings.config,
        training_data(job),
        sparsity=0.25,
        seed=0,
        method=METHOD,
        meter=BudgetMeter(),
        settings=job.settings.recovery,
    )


def conditions(context: Context, batches: int, batch: int) -> torch.Tensor:
    """The condition number on every batch, of 0, 1 and 2 layers removed, [3, batches]."""
    select = methods.load(tracks.load(TRACK).method(METHOD)).__globals__
    order, _ = select["ranked"](
        context, context.model, context.layers(), context.draws(500, 100), False
    )
    names = [layer.name for layer in order]
    networks = [select["without"](context, context.model, names[:count]) for count in range(3)]
    drawn = context.draws(batches * batch, batch)
    rows = [[ntk_condition(n, [one], context.predict) for one in drawn] for n in networks]
    return torch.tensor(rows, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    found = conditions(context_of(asked.folder), asked.batches, asked.batch)
    generator = torch.Generator().manual_seed(0)
    for count in COUNTS:
        chosen = torch.randint(asked.batches, (DRAWS, count), generator=generator)
        lower = {
            name: (values[1:] < values[:-1]).double().mean(1)
            for name, values in (
                ("arithmetic", found[:, chosen].mean(-1)),
                ("geometric", found.log()[:, chosen].mean(-1)),
            )
        }
        told = [f"{name} mean {one:.3f} {two:.3f}" for name, (one, two) in lower.items()]
        print(f"{count} batches: {'; '.join(told)}")


if __name__ == "__main__":
    main()
