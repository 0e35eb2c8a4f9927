"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) between pairs of images, mean over pairs.

`evaluation.lpips` names its network; "domain" is the track's own classifier, "none" leaves it out.
"""

from collections.abc import Mapping

from prunebench.evaluation.metrics import Evidence, Metric, Missing

SIDES = {"none": 1, "domain": 4, "alex": 32, "vgg": 16}  # of the smallest images it can take


def refusal(evaluation: Mapping, side: int) -> str | None:
    name = evaluation["lpips"]
    if name not in SIDES:
        return f"evaluation.lpips: unknown network '{name}'; known: {', '.join(SIDES)}"
    if side < SIDES[name]:
        able = ", ".join(known for known, least in SIDES.items() if side >= least)
        return (
            f"evaluation.lpips: '{name}' needs {SIDES[name]} pixels a side, images have {side}; "
            f"take {able}"
        )
    return None


METRIC = Metric(
    order=100,
    label="LPIPS",
    help="Perceptual distance to the dense model's image from the same noise",
    better="lower",
    spread=True,
    weights=lambda evaluation: (
        f"lpips-{evaluation['lpips']}" if evaluation["lpips"] in ("alex", "vgg") else None
    ),
    refusal=refusal,
)


def compute(evidence: Evidence) -> float | Missing:
    import torch

    from prunebench.diffusion.sampling import to_float
    from prunebench.evaluation.perceptual import perceptual_distance

    if evidence.dense_images is None:
        return Missing("there are no images of the dense model")
    name = evidence.settings["lpips"]
    if name == "none":
        return Missing("the track asks for none (evaluation.lpips)")
    distance = perceptual_distance(name, evidence.weights.get("lpips", evidence.extractor))
    total = 0.0
    with torch.no_grad():
        for ours, dense in evidence.pairs():
            total += distance(to_float(ours), to_float(dense)).double().sum().item()
    return total / len(evidence.images)
