"""Everything the suite needs from outside: where it comes from, its hash, its licence.

`registry.yaml` lists it, `store` finds and verifies files, `fetch` gets what is missing by
`download` or makes it by a reader of `datasets`, `load` loads data sets. Only `download` ever uses
the network.
Importing the package is free of torch.
"""

from prunebench.assets.load import Dataset, load_dataset
from prunebench.assets.made_up import made_up
from prunebench.assets.registry import ASSETS, Asset, File, asset, data_set
from prunebench.assets.store import DATA, hashes, locate

__all__ = [
    "ASSETS",
    "DATA",
    "Asset",
    "Dataset",
    "File",
    "asset",
    "data_set",
    "hashes",
    "load_dataset",
    "locate",
    "made_up",
]
