"""Structural similarity (Wang et al. 2004) of pairs of images, mean over pairs.

An 11x11 Gaussian window of sigma 1.5; borders are reflected, which takes SIDE pixels.
"""

from prunebench.evaluation.metrics import Evidence, Metric, Missing

SIDE = 6
METRIC = Metric(
    order=110,
    label="SSIM",
    help="Structural similarity to the dense model's image from the same noise",
    better="higher",
    spread=True,
    refusal=lambda evaluation, side: (
        f"SSIM needs {SIDE} pixels a side, images have {side}" if side < SIDE else None
    ),
)


def compute(evidence: Evidence) -> float | Missing:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    if evidence.dense_images is None:
        return Missing("there are no images of the dense model")
    similarity = StructuralSimilarityIndexMeasure(data_range=1.0)
    for ours, dense in evidence.pairs():
        similarity.update(ours.float() / 255, dense.float() / 255)
    return similarity.compute().item()
