"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well images show their prompts."""

from prunebench.evaluation.metrics import Evidence, Metric, Missing

METRIC = Metric(
    order=80,
    label="CLIP",
    help="Mean cosine of CLIP's embeddings of image and prompt",
    better="higher",
    format=".4f",
    spread=True,
    optional=True,
    weights=lambda evaluation: evaluation.get("clip"),
)


def compute(evidence: Evidence) -> float | Missing:
    from prunebench.evaluation.clip import clip_score

    if evidence.prompts is None:
        return Missing("the images were asked for by no prompt")
    if "clip_score" not in evidence.weights:
        return Missing("the track names no CLIP (evaluation.clip)")
    return clip_score(
        evidence.weights["clip_score"],
        evidence.images,
        evidence.prompts,
        evidence.settings["batch"],
        evidence.device,
    )
