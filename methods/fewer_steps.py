"""The dense model with fewer sampling steps: what a pruned model of its speed has to beat."""

from prunebench.pruning.plan import Plan

TITLE = "Dense, fewer steps"
KIND = "steps"
CONTROL = True
RECOVERY = "never"


def select(context):
    return Plan(steps=1 - context.sparsity)
