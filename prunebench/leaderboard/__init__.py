"""The leaderboard: a pure function of score.json files and the grid.png beside them."""

from prunebench.leaderboard.site import build

__all__ = ["build"]
