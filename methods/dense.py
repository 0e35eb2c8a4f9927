"""Nothing removed: the reference of every other row."""

from prunebench.pruning.plan import Plan

TITLE = "Dense"
KIND = "none"
CONTROL = True
RECOVERY = "never"


def select(context):
    return Plan()
