"""Where each artefact of a track lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prunebench.tracks.cells import Cell

if TYPE_CHECKING:
    from prunebench.tracks.benchmark import Track

RUNS = Path("runs")


class Layout:
    """Where artefacts lie, as strings. Fields may be Snakemake wildcards such as "{model}"."""

    def __init__(self, track: str, runs: Path = RUNS):
        self.root = f"{runs}/{track}"
        self.assets = f"{self.root}/assets.json"
        self.extractor = f"{self.root}/extractor/extractor.json"

    def trained(self, model: str) -> str:
        return f"{self.root}/{model}/trained/dense.json"

    def latents(self, autoencoder: str) -> str:
        return f"{self.root}/latents/{autoencoder}/latents.json"

    def prompts(self, text_encoder: str) -> str:
        return f"{self.root}/prompts/{text_encoder}/prompts.json"

    def encoded(self, model: Mapping) -> tuple[str, ...]:
        """The latents and prompts that a model of these settings trains on, of those it has."""
        records = {"autoencoder": self.latents, "text_encoder": self.prompts}
        return tuple(record(model[kind]) for kind, record in records.items() if kind in model)

    def selection(
        self, stage: str, model: str, method: str, sparsity: object, seed: object, kind: str
    ) -> str:
        """Record of "select" or "cost"; `kind` is "selection", or names its training budget."""
        return f"{self.root}/{model}/{method}/{sparsity}/{kind}/seed{seed}/{stage}.json"

    def cell(
        self, stage: str, model: str, method: str, sparsity: object, recovery: str, seed: object
    ) -> str:
        """Record of "recover", "sample" or "metrics"."""
        return f"{self.root}/{model}/{method}/{sparsity}/{recovery}/seed{seed}/{stage}.json"

    def shard(
        self,
        index: object,
        count: int,
        model: str,
        method: str,
        sparsity: object,
        recovery: str,
        seed: object,
    ) -> tuple[str, str]:
        """Record and images of one of the `count` shards that a cell is drawn in."""
        name = f"shard{index}of{count}"
        record = self.cell(name, model, method, sparsity, recovery, seed)
        return record, record.removesuffix("json") + "safetensors"

    def results(self, division: str, default: str) -> str:
        """Folder of a division's leaderboard: the default division's is the track's own."""
        folder = f"results/{Path(self.root).name}"
        return folder if division == default else f"{folder}/{division}"

    def oracle(self, model: str, recovery: str, seed: object, mask: object) -> str:
        """Record of one layer mask of the oracle."""
        return f"{self.root}/oracle/{model}/{recovery}/seed{seed}/mask{mask}.json"

    def log(self, stage: str, *fields: object) -> str:
        return "/".join(map(str, (self.root, "logs", stage, *fields))) + ".log"


class Paths:
    """The artefacts of one cell."""

    def __init__(self, track: "Track", cell: Cell, runs: Path = RUNS):
        self.layout = layout = Layout(track.name, runs)
        own = track.method(cell.method).trains or cell.published
        kind = f"selection-{cell.recovery}" if own else "selection"
        shared = (cell.model, cell.method, cell.sparsity)
        self.extractor, self.trained = layout.extractor, layout.trained(cell.model)
        self.select = layout.selection("select", *shared, cell.seed, kind)
        self.cost = layout.selection("cost", *shared, cell.seed, kind)
        self.recover = layout.cell("recover", *shared, cell.recovery, cell.seed)
        self.sample = layout.cell("sample", *shared, cell.recovery, cell.seed)
        self.shards = [  # none where the cell is drawn in one piece
            layout.shard(index, track.shards, *shared, cell.recovery, cell.seed)
            for index in range(track.shards if track.shards > 1 else 0)
        ]
        self.metrics = layout.cell("metrics", *shared, cell.recovery, cell.seed)
        self.checkpoint = self.select if cell.recovery == "none" else self.recover
        self.dense_sample = layout.cell("sample", cell.model, "dense", 0.0, "none", cell.seed)
