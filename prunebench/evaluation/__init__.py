"""Judging a cell: features, quality, consistency with dense, static cost and latency."""
