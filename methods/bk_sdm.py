"""Removes blocks of Stable Diffusion's UNet by fixed patterns: Base, Small and Tiny.

B.-K. Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", ECCV 2024,
arXiv 2305.15798. Base: of every level's pairs of a ResNet block and a transformer the encoder keeps
the first, the decoder the first and the last. Small is Base without the mid block, Tiny is Small
without the innermost level. The weights that stay are the dense model's.

On transformers the variant `bk_sdm_halves` is TinyFusion's "Oracle (BK-SDM)" (VainF/TinyFusion): of
every two blocks the first half of the network keeps the first, the second half the second.
"""

from prunebench.errors import CellError
from prunebench.models.units import parameter_count
from prunebench.pruning.plan import Plan

TITLE = "BK-SDM"
KIND = "layers"
FAITHFUL_TO = "the authors' code"
FAMILIES = ("conditional_unet",)
SPARSITIES = (0.33, 0.44, 0.62)
NOTES = (
    "Base, Small and Tiny of Stable Diffusion lose 33, 44 and 62 %; on another UNet the nearest "
    "pattern within one unit is taken, which may be the same for two targets; the row says which."
)
RECIPE = {"recovery": "feature_kd"}
PAPER = "arXiv 2305.15798"
BIBTEX = """@inproceedings{kim2024bksdm,
  title = {{BK-SDM}: A Lightweight, Fast, and Cheap Version of Stable Diffusion},
  author = {Kim, Bo-Kyeong and Song, Hyoung-Kyu and Castells, Thibault and Choi, Shinkook},
  booktitle = {European Conference on Computer Vision},
  year = {2024}
}"""
VARIANTS = {
    "halves": {
        "TITLE": "BK-SDM's pattern on transformers",
        "FAITHFUL_TO": "TinyFusion's code",
        "FAMILIES": ("dit", "uvit"),
        "SPARSITIES": (0.5,),
        "NOTES": "Every other block, by TinyFusion's reading of a pattern that is about UNets.",
        "RECIPE": {"recovery": "finetune"},
        "parameters": {"halves": True},
    },
}


def select(context, halves=False):
    """Take the pattern whose share of the parameters is nearest to the target.

    Args:
        halves: one of every two blocks of a transformer, instead of a UNet's patterns.
    """
    if halves:
        layers = context.layers()
        gone = [layer.name for layer in layers if layer.name not in kept_of_halves(layers)]
        return Plan(layers=tuple(sorted(gone)), notes={"pattern": "halves"})
    units = {unit.name: unit.parameters for unit in context.layers("stage")}
    total = parameter_count(context.model)
    shares = {
        name: sum(units[unit] for unit in removed) / total
        for name, removed in patterns(units).items()
    }
    name = min(shares, key=lambda pattern: abs(shares[pattern] - context.sparsity))
    if abs(shares[name] - context.sparsity) > max(units.values()) / total:
        told = ", ".join(f"{pattern} {share:.2f}" for pattern, share in shares.items())
        raise CellError(f"no pattern removes about {context.sparsity} of this UNet: {told}")
    notes = {"pattern": name, "shares": shares, "summary": f"pattern {name}"}
    return Plan(layers=tuple(sorted(patterns(units)[name])), notes=notes)


def patterns(units):
    """The stages that each pattern removes, without patterns that this network does not have."""
    pairs = [name for name in units if ".pairs." in name]
    last = {name.rpartition(".")[0]: name for name in pairs if name.startswith("up_blocks")}
    inner = [name for name in pairs if name not in last.values()]
    level = [name for name in units if name.startswith("stages.")]
    found = {"base": inner, "small": [*inner, "mid_block"]}
    if level:
        place = int(level[0].rpartition(".")[2])
        outer = [n for n in inner if not n.startswith((f"down_blocks.{place}.", "up_blocks.0."))]
        found["tiny"] = [*outer, "mid_block", *level]
    return {name: removed for name, removed in found.items() if removed}


def kept_of_halves(layers):
    """Names of the blocks that stay: one of every two, the outer one of each pair.

    The middle one of an odd number, such as U-ViT's, is of no pair and goes.
    """
    names = [layer.name for layer in layers]
    if len(names) % 2:
        del names[len(names) // 2]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    return {pair[2 * place >= len(pairs)] for place, pair in enumerate(pairs)}
