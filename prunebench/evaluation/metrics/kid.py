"""Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401), mean over fixed subsets."""

from prunebench.evaluation.metrics import Evidence, Metric

METRIC = Metric(
    order=20,
    label="KID",
    help="Kernel inception distance, unbiased at any sample count",
    better="lower",
    unit="×10⁻³",
    scale=1e3,
    format=".2f",
    spread=True,
    least_images=2,
)
SUBSETS, SUBSET_SIZE = 20, 1000  # images of a subset, as far as there are so many
SEED = 2020  # torch-fidelity's default: the subsets drawn are the same in every cell


def compute(evidence: Evidence) -> float:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    ours, theirs = evidence.generated["features"], evidence.reference["features"]
    found = kid_features_to_metric(
        ours,
        theirs,
        kid_subsets=SUBSETS,
        kid_subset_size=min(SUBSET_SIZE, len(ours), len(theirs)),
        rng_seed=SEED,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN]
