"""The other kind of track: what networks cost at full size, dense and pruned, without weights.

No dataset, extractor, training or image is involved. A row is a network of a published
configuration and a plan; which channels and blocks a plan picks is drawn, because only shapes cost.
"""
