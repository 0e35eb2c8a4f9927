"""What is measured of a cell: features, metrics, static cost and latency."""
