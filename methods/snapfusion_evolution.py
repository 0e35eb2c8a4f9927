"""Evolves blocks by loss per cost: those of least value go, those of most are copied.

Part A of SnapFusion. A robust training skips blocks at random; then, round by round, each block is
left out alone and gets a value: quality lost per cost saved. While the network is above its
target the blocks of the smallest values go; when it is met, the blocks of the largest are copied
and others have to make room. docs/methods/snapfusion_evolution.md.
"""

import torch

from prunebench.models.copies import without
from prunebench.pruning.plan import Plan
from prunebench.selection.context import digest, seeded
from prunebench.training.loop import own_loss

TITLE = "SnapFusion evolution"
KIND = "layers"
PAPER = "Li et al. 2023, arXiv 2306.00980 (SnapFusion: Text-to-Image Diffusion Model on Mobile)"
BIBTEX = """@inproceedings{li2023snapfusion,
  title = {{SnapFusion}: Text-to-Image Diffusion Model on Mobile Devices within Two Seconds},
  author = {Li, Yanyu and Wang, Huan and Jin, Qing and Hu, Ju and Chemerys, Pavlo and Fu, Yun and
            Wang, Yanzhi and Tulyakov, Sergey and Ren, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""
NOTES = ("Its architecture evolution alone, without its decoder and its step distillation; quality "
         "is the denoising loss instead of the CLIP score, cost is MACs instead of a phone's "
         "latency, and the target is of parameters.")  # fmt: skip
FAITHFUL_TO = "the paper's text; its authors released no code"
TRAINS = True
RECIPE = {"recovery": "finetune"}
CHECK = {"draws": 4, "batch": 4, "removed": 4, "rounds": 1}


def select(
    context,
    draws=64,
    batch=32,
    quality="loss",
    table="macs",
    removed=1,
    copied=1,
    copies=1,
    skip=0.1,
    share=0.5,
    rounds=4,
):
    """Evolve until the target is met and `copies` actions of copying are spent.

    `quality` is "loss", or "output": how far the prediction moves at equal noise. `table` is
    "macs", or "latency", measured. A round removes `removed` blocks or copies `copied`. Of the
    budget the `share` is robust training at the skip probability `skip`, in equal parts ahead of
    the first `rounds` rounds.
    """
    if quality not in ("loss", "output") or table not in ("macs", "latency"):
        raise ValueError(f"quality '{quality}' is loss or output, table '{table}' macs or latency")
    costs = context.latencies("whole") if table == "latency" else context.macs("whole")
    batches, evolution = context.draws(draws, batch), Evolution(context, costs)
    size = context.settings.batch
    part = int(share * context.train_images) // rounds // size * size
    while True:
        if part and context.trained_images < rounds * part:
            robust = skipping(evolution, skip)
            context.train(evolution.model, part, loss=robust, before_removal=True)
        lost = evolution.losses(batches, quality)
        if not evolution.act(lost, removed, copied, copies):
            break
    plan = evolution.plan(log=evolution.log, table=costs, skip=skip if part else 0.0)
    return (plan, evolution.model) if context.trained_images else plan


class Evolution:
    """A network on its way: what went, what was copied, and every action with its reasons."""

    def __init__(self, context, costs):
        self.context, self.costs = context, costs
        self.model = context.pruned(Plan())
        self.sizes = {layer.name: layer.parameters for layer in context.layers("whole")}
        self.copyable = {layer.name for layer in context.layers("whole") if layer.copyable}
        self.gone, self.copied, self.log, self.actions = [], [], [], 0
        total = sum(parameter.numel() for parameter in self.model.parameters())
        self.excess = context.sparsity * total  # parameters that are yet to go

    def plan(self, **notes):
        """What became of the dense model so far."""
        return Plan(layers=tuple(sorted(self.gone)), copies=tuple(self.copied), notes=notes)

    def present(self):
        return [name for name in self.sizes if name not in self.gone]

    @torch.no_grad()
    def losses(self, batches, quality):
        """The quality that is lost without each block that is left: a mean over the draws."""
        context, whole = self.context, [self.measured(self.model, b, quality) for b in batches]
        count, found = sum(len(b.x0) for b in batches), {}
        for name in self.present():
            smaller = without(self.model, context.family, [name])
            changes = [
                len(batch.x0) * self.change(self.measured(smaller, batch, quality), intact).item()
                for batch, intact in zip(batches, whole, strict=True)
            ]
            found[name] = sum(changes) / count
        return found

    def measured(self, model, batch, quality):
        return (self.context.loss if quality == "loss" else self.context.predict)(model, batch)

    @staticmethod
    def change(without, intact):
        """Of losses the difference, of predictions the mean square of it."""
        return without - intact if intact.dim() == 0 else (without - intact).square().mean()

    def act(self, lost, removed, copied, copies):
        """One round: remove a group, or copy one; False where neither is left to do."""
        runs = {name: 1 + self.copied.count(name) for name in lost}
        value = {name: change / (self.costs[name] * runs[name]) for name, change in lost.items()}
        order = sorted(value, key=value.__getitem__)
        names = self.removals(order, removed)
        action = "remove"
        if not names and self.actions < copies:
            names, action = self.to_copy(order, copied), "copy"
            self.actions += 1
        for name in names:
            {"remove": self.remove, "copy": self.copy}[action](name)
        if names:
            cost = sum(self.costs[name] for name in (*self.present(), *self.copied))
            self.log.append({"action": action, "layers": names, "lost": lost, "value": value,
                             "parameters_to_go": self.excess, "cost": cost})  # fmt: skip
            self.context.log.info("%s %s", action, ", ".join(names))
        return bool(names)

    def removals(self, order, count):
        """The blocks of the smallest values that lead towards the target; copied ones stay."""
        names, left = [], self.excess
        for name in order:
            if len(names) < count and name not in self.copied and self.closer(name, left):
                names.append(name)
                left -= self.sizes[name]
        return names

    def closer(self, name, excess):
        return abs(excess - self.sizes[name]) < abs(excess)

    def to_copy(self, order, count):
        """The blocks of the largest values for which others can make room."""
        names, spare = [], set(self.present()) - set(self.copied)
        for name in reversed(order):
            others = sum(self.sizes[other] for other in spare - {name})
            room = others - sum(self.sizes[other] for other in names)
            if len(names) < count and name in self.copyable and room >= self.sizes[name]:
                names.append(name)
                spare -= {name}
        return names

    def remove(self, name):
        self.context.family.remove_layer(self.model, name)
        self.gone.append(name)
        self.excess -= self.sizes[name]

    def copy(self, name):
        self.context.family.copy_layer(self.model, name)
        self.copied.append(name)
        self.excess += self.sizes[name]


def skipping(evolution, skip):
    """The model's own loss with blocks left out at random, the later the likelier, by batch.

    The draw follows from the batch's noise, so that a training that goes on needs no memory of it.
    """

    def loss(model, batch):
        names = evolution.present()
        generator = seeded(digest(batch.noise))
        chances = skip * torch.arange(1, len(names) + 1) / len(names)
        drawn = torch.rand(len(names), generator=generator) < chances
        skipped = [name for name, out in zip(names, drawn.tolist(), strict=True) if out]
        return own_loss(
            without(model, evolution.context.family, skipped) if skipped else model, batch
        )

    return loss
