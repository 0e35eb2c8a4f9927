"""Where each artefact of a track lies. The tree stands as literal paths in the Snakefile too."""

from collections.abc import Mapping
from pathlib import Path

from prunebench.tracks.cells import RECIPE, Cell, as_dict
from prunebench.tracks.settings_benchmark import Model
from prunebench.tracks.stages import LOGS, STAGES

RUNS = Path("runs")


class Layout:
    """Where the records of a track lie, as strings; what a record vouches for lies beside it."""

    def __init__(self, track, runs: Path = RUNS):
        self.track, self.root = track, f"{runs}/{track.name}"
        self.assets, self.extractor = self.record("assets"), self.record("extractor")

    def record(self, stage: str, **names: object) -> str:
        """Record of a stage that is called with `names`; see Stage.names.

        An axis that is not named has the track's first value.
        """
        return f"{self.root}/{STAGES[stage].record.format_map(self.wildcards(stage, names))}"

    def wildcards(self, stage: str, names: Mapping[str, object]) -> dict[str, object]:
        """The wildcards of a record's path, which `names_of` reads back."""
        axes = {
            axis: self._folder(axis, names.get(axis, values[0]))
            for axis, values in self.track.axes.items()
        }
        found = {**names, **axes, "shards": self.track.shards}
        if "selection" in STAGES[stage].wildcards:
            recovery = str(names["recovery"])
            own = self.track.method(names["method"]).trains or recovery.startswith(f"{RECIPE}-")
            # Its cost is that of the steps that it leaves.
            own |= stage == "cost" and self.track.fold(names["method"], recovery) > 1
            found["selection"] = f"selection-{recovery}" if own else "selection"
        return found

    def names_of(self, wildcards: Mapping[str, str]) -> dict[str, object]:
        """What a stage is called with, by the wildcards of its record's path.

        An axis that the path knows nothing of has the track's first value.
        """
        names: dict[str, object] = dict(wildcards)
        for axis, values in self.track.axes.items():
            names[axis] = wildcards.get(axis, "").removeprefix(f"/{axis}-") or values[0]
        if "selection" in names:  # which names a recovery only where it depends on it
            names["recovery"] = names.pop("selection").removeprefix("selection").lstrip("-")
            names["recovery"] = names["recovery"] or "none"
        return names

    def _folder(self, axis: str, value: object) -> str:
        """Nothing where the track has one value of an axis."""
        return "" if len(self.track.axes[axis]) == 1 else f"/{axis}-{value}"

    def coder(self, name: str) -> tuple[str, ...]:
        """What an autoencoder or text encoder rests on: its record, where the track makes it."""
        own = self.track.coder(name)[1].own
        return (self.record("coder", coder=name),) if own else ()

    def encode(self, coder: str) -> str:
        return self.record("encode", coder=coder)

    def encoded(self, model: Model) -> tuple[str, ...]:
        """The latents and prompts that a model of these settings trains on, of those it has."""
        return tuple(map(self.encode, model.coders.values()))

    def dense(self, model: str, dense_seed: int) -> str:
        return self.record("dense", model=model, dense_seed=dense_seed)

    def leaderboard(self, division: str) -> str:
        """Folder of a division's leaderboard."""
        return str(Path(self.record("leaderboard", division=division)).parent)

    def log(self, record: str) -> str:
        """Where the output of the job goes that writes a record."""
        return f"{self.root}/{LOGS}{record[len(self.root) :].rpartition('.')[0]}.log"


class Paths:
    """The records of one cell and those that it rests on, by the names of their stages."""

    def __init__(self, track, cell: Cell, runs: Path = RUNS):
        self.layout = layout = Layout(track, runs)
        names = as_dict(cell)

        def record(stage: str, **more: object) -> str:
            return layout.record(stage, **names, **more)

        self.extractor, self.dense = layout.extractor, record("dense")
        self.select, self.cost, self.recover = map(record, ("select", "cost", "recover"))
        self.sample, self.score = record("sample"), record("score")
        # Records and images; none where the cell is drawn in one piece.
        shards = range(track.shards if track.shards > 1 else 0)
        self.shards = [(r, images_of(r)) for r in (record("shard", shard=i) for i in shards)]
        self.checkpoint = self.select if cell.recovery == "none" else self.recover
        names |= track.undisturbed
        self.dense_sample = record("sample")


def images_of(shard: str) -> str:
    """The images beside the record of a shard."""
    return shard.removesuffix("json") + "safetensors"
