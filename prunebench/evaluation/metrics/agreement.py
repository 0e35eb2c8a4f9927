"""Share of images whose largest logit is the class that was asked for."""

from prunebench.evaluation.metrics import Evidence, Metric, Missing

METRIC = Metric(
    order=60,
    label="Agreement",
    help="Share of generated images that a classifier assigns to the class they were generated for",
    better="higher",
    spread=True,
)


def compute(evidence: Evidence) -> float | Missing:
    logits, labels = evidence.generated.get("logits"), evidence.labels
    if logits is None:
        return Missing("the feature extractor does not know the data set's classes")
    if labels is None:
        return Missing("the images were asked for no class")
    return (logits.argmax(1) == labels).double().mean().item()
