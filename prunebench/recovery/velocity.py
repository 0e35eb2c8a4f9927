"""To velocity prediction: the model's own loss, with v = a noise - s x0 for its target.

SnapFusion (Li et al., NeurIPS 2023, arXiv 2306.00980), eq. 6: what a noise-predicting model is
fine-tuned to before its steps are distilled, because an image has to follow from a prediction where
there is hardly any in the input. v is Salimans & Ho's (arXiv 2202.00512, appendix D).
"""

from prunebench.recovery import Teaching
from prunebench.training.loop import Loss, own_loss

FAITHFUL_TO = "SnapFusion's paper"
TEACHER = False
PREDICTS = "velocity"


def loss(_: Teaching | None) -> Loss:
    """The model's own loss; the batch's target is the velocity."""
    return own_loss
