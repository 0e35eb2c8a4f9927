"""prunebench: a reproducible benchmark of pruning methods for diffusion and flow models."""

__version__ = "0.1.0"
