"""Peak signal-to-noise ratio of pairs of images.

Of the squared error pooled over all images, so that one unchanged image does not make it infinite.
"""

import math

from prunebench.evaluation.metrics import Evidence, Metric, Missing

METRIC = Metric(
    order=120,
    label="PSNR",
    help="Peak signal-to-noise ratio to the dense model's image from the same noise; infinite for "
    "dense itself",
    better="higher",
    unit="dB",
    format=".1f",
    spread=True,
    null="∞",
)


def compute(evidence: Evidence) -> float | Missing:
    from torchmetrics.image import PeakSignalNoiseRatio

    if evidence.dense_images is None:
        return Missing("there are no images of the dense model")
    ratio = PeakSignalNoiseRatio(data_range=1.0)
    for ours, dense in evidence.pairs():
        ratio.update(ours.float() / 255, dense.float() / 255)
    decibels = ratio.compute().item()
    return decibels if math.isfinite(decibels) else Missing("infinite: the images are dense's own")
