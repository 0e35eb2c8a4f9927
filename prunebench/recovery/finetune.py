"""Plain fine-tuning with the model's own loss: the recovery of the matched division."""

from prunebench.recovery import Teaching
from prunebench.training.loop import Loss, own_loss

TEACHER = False


def loss(_: Teaching | None) -> Loss:
    """The loss the dense model was trained with. Nothing passes through the teacher."""
    return own_loss
