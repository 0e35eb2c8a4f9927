"""Learns which layers to drop by sampling them, while low-rank updates make up for the loss.

G. Fang et al., "TinyFusion: Diffusion Transformers Learned Shallow", CVPR 2025, arXiv 2412.01199.
Blocks are split into groups of neighbours, each of which keeps N of M. A group has one learned
logit per way of doing that; every image of a batch draws a way by a straight-through Gumbel
softmax, and the training loss trains the logits together with LoRA updates of all matrices; the
dense weights stay as they are. So a mask is worth how well the network recovers under it. The
likeliest way of every group is the plan; updates are thrown away, and recovery begins at the dense
weights.
"""

import copy
import itertools
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

TITLE = "TinyFusion"
KIND = "layers"
TRAINS = True
RECOVERY = "required"  # without a budget the masks are as good as random
FAITHFUL_TO = "the paper and the authors' code"
FAMILIES = ("dit",)
NOTES = (
    "Logits and low-rank updates train with the track's optimiser and schedule (authors: AdamW at "
    "constant rates, about 10,000 steps); at few steps the masks are nearly random."
)
CHECK = {"share": 0.5}
RECIPE = {"sparsities": (0.5,)}
PAPER = "arXiv 2412.01199"
BIBTEX = """@inproceedings{fang2025tinyfusion,
  title = {{TinyFusion}: Diffusion Transformers Learned Shallow},
  author = {Fang, Gongfan and Li, Kunjun and Ma, Xinyin and Wang, Xinchao},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2025}
}"""
FIRST = 0.02  # of every gate: a uniform distribution


def select(
    context,
    share=0.25,
    merge=1,
    rank=8,
    alpha=16.0,
    scale=100.0,
    hottest=4.0,
    coldest=0.1,
    decay=0.999,
):
    """Learn on `share` of the budget; without one every group draws its way at random.

    Args:
        merge: how many of the smallest groups make one: at half the layers 1 is 1:2, 2 is 2:4.
        rank, alpha: of LoRA: W + alpha / rank * B A.
        scale: logits are this times the gates that are trained.
        hottest, coldest: temperature at the first and the last step; linear between.
        decay: of the moving average of gates that decides.
    """
    layers = context.layers()
    groups = local_groups(len(layers), len(context.plan_layers(layers).layers), merge)
    gates = Gates(groups, scale, (hottest, coldest), decay)
    batch = context.settings.batch
    steps = int(share * context.train_images) // batch
    if steps:
        model, draws = copy.deepcopy(context.model), context.generator()
        prepare(model, layers, gates, steps, rank, alpha, draws)
        context.train(model, steps * batch, adjust=lambda net: net.gates.advance())
        gates.advance()  # it is called before a step, so that the last one's outcome is left
        ways = [logits.argmax().item() for logits in gates.average_logits()]
    else:
        ways = [draw(len(table), context.generator()) for table in gates.tables()]
    kept = {place for group, way in zip(groups, ways, strict=True) for place in group.ways[way]}
    gone = [layer for place, layer in enumerate(layers) if place not in kept]
    return context.plan_layers(gone, **report(gates, groups, steps))


def draw(count, generator):
    """A number below `count`, each as likely."""
    return torch.randint(count, (1,), generator=generator).item()


def report(gates, groups, steps):
    """What was learned: of every group the ways and their probabilities."""
    found = [
        {"ways": [list(way) for way in group.ways], "probabilities": logits.softmax(0).tolist()}
        for group, logits in zip(groups, gates.average_logits(), strict=True)
    ]
    least = min(max(group["probabilities"]) for group in found) if found else 1.0
    patterns = ", ".join(sorted({f"{g.kept}:{len(g.places)}" for g in groups}))
    summary = f"{patterns}; {steps} steps; the least sure group {least:.0%}"
    return {"groups": found, "steps": steps, "summary": summary}


class Group:
    """Neighbouring layers of which `kept` stay, and all ways of choosing them."""

    def __init__(self, places, kept):
        self.places, self.kept = tuple(places), kept
        self.ways = tuple(itertools.combinations(self.places, kept))


def local_groups(count, removed, merge=1):
    """Split `count` layers into the smallest groups that lose, or keep, one layer each; merged.

    At half the layers a group is two neighbours (1:2). Where layers do not divide evenly, groups
    differ by one.
    """
    if not removed:
        return []
    number = min(removed, count - removed) or 1
    ends = [count * index // number for index in range(number + 1)]
    alike = [range(start, end) for start, end in itertools.pairwise(ends)]
    groups = []
    for start in range(0, number, merge):
        parts = alike[start : start + merge]
        places = [place for part in parts for place in part]
        fewer = removed <= count - removed
        kept = len(places) - len(parts) if fewer else len(parts) * (removed < count)
        groups.append(Group(places, kept))
    return groups


class Gates(nn.Module):
    """The logits of every group's ways, and the layers' masks for the batch that is under way."""

    def __init__(self, groups, scale, temperatures, decay):
        super().__init__()
        self.sizes, self.scale, self.decay = [len(g.ways) for g in groups], scale, decay
        self.groups, self.temperatures, self.steps = groups, temperatures, 1
        self.gate = nn.Parameter(torch.full((sum(self.sizes),), FIRST))
        self.register_buffer("average", self.gate.detach().clone())
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.masks = {}  # of the batch, [N] by place

    def tables(self):
        """For every group which of its places a way keeps, float [ways, places]."""
        for group in self.groups:
            rows = [[float(place in way) for place in group.places] for way in group.ways]
            yield torch.tensor(rows, device=self.gate.device)

    def average_logits(self):
        return (self.scale * self.average).split(self.sizes)

    def temperature(self):
        """Linear from the first step to the last."""
        done = min(1.0, self.step.item() / max(1, self.steps - 1))
        hottest, coldest = self.temperatures
        return hottest + done * (coldest - hottest)

    def sample(self, count):
        """Draw a way of every group for each of `count` images."""
        self.masks, temperature = {}, self.temperature()
        logits = (self.scale * self.gate).split(self.sizes)
        for group, values, table in zip(self.groups, logits, self.tables(), strict=True):
            chosen = one_hot(values.expand(count, -1), temperature) @ table
            self.masks.update(zip(group.places, chosen.unbind(1), strict=True))

    @torch.no_grad()
    def advance(self):
        """Take the gates as they are into the average; the temperature falls by a step."""
        self.average.lerp_(self.gate, 1 - self.decay)
        self.step += 1


def one_hot(logits, temperature):
    """A straight-through sample of the Gumbel softmax: exactly one-hot, with soft gradients."""
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits.log_softmax(-1) + noise) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


class LowRank(nn.Module):
    """W + alpha / rank * B A of a frozen matrix W; B begins at zero."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(weight.new_empty(rank, columns))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.factor = alpha / rank

    def forward(self, weight):
        return weight + self.factor * self.b @ self.a


def prepare(model, layers, gates, steps, rank, alpha, generator):
    """Freeze a network, add LoRA to its matrices, and let `gates` mask its layers, in place."""
    model.requires_grad_(False)
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        update = LowRank(module.weight.detach(), rank, alpha)
        start = torch.empty(update.a.shape)
        update.a.data.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
        parametrize.register_parametrization(module, "weight", update)
    gates.steps = steps
    model.gates = gates.to(next(model.parameters()).device)
    model.register_forward_pre_hook(lambda net, inputs: net.gates.sample(len(inputs[0])))
    for place, layer in enumerate(layers):

        def mask(_, inputs, output, place=place):
            if place not in gates.masks:
                return output
            kept = gates.masks[place].to(output.dtype).view(-1, *[1] * (output.dim() - 1))
            return kept * output + (1 - kept) * inputs[0]

        model.get_submodule(layer.name).register_forward_hook(mask)
    return model
