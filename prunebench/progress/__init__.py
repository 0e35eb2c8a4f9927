"""How far a run is, from what is on disk, in Slurm's queue and in the process table. No torch."""

from prunebench.progress.view import show, watch

__all__ = ["show", "watch"]
