#!/usr/bin/env python3
"""FID between two halves of CIFAR-10's training set: checks data, extractor and distance together.

    python scripts/fid_of_halves.py --count 2048

Both halves are draws from one distribution, so all that is left is FID's bias, which is about
proportional to 1 / count. docs/real_data.md has what was measured.
"""

import argparse
import json

import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from prunebench import assets
from prunebench.evaluation.features import Extractor, load_extractor
from prunebench.evaluation.metrics import Evidence, Missing, evaluate


def compare_halves(images: torch.Tensor, count: int, extractor: Extractor) -> dict:
    """Metrics of the first `count` images of the first half against as many of the second.

    "fid_torch_fidelity" is torch-fidelity's distance of the same features.

    Args:
        images: uint8 [N, C, H, W], N >= 2 count.
    """
    middle = len(images) // 2
    first, second = (extractor.extract(images[i : i + count]) for i in (0, middle))
    theirs = [fid_features_to_statistics(half["features"]) for half in (first, second)]
    found = evaluate(Evidence(generated=first, reference=second))
    values = {name: value for name, value in found.items() if not isinstance(value, Missing)}
    distance = fid_statistics_to_metric(*theirs, verbose=False)
    return {**values, "fid_torch_fidelity": distance[KEY_METRIC_FID]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2048, help="images of each half")
    count = parser.parse_args().count
    extractor = load_extractor("inception-v3-compat", assets.locate("inception"))
    images = assets.load_dataset("cifar10").train_images
    print(json.dumps(compare_halves(images, count, extractor), indent=2))


if __name__ == "__main__":
    main()
