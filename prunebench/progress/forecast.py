"""What a track would cost before anything runs: hours by stage, disk at its peak, money.

Work is counted exactly where it can be: multiply-accumulates of the dense network on the meta
device, times the images that the track trains on and draws. What a method spends in selection is
what it spent in published records. Rates turn work into hours: a core's as measured in published
records, a GPU's as its maker states it, times a share of it that a real job reaches. Stages whose
work is not known are taken at the time that the track allows them, and said to be so.
"""

import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from prunebench import models
from prunebench import recovery as recoveries
from prunebench.assets.registry import asset
from prunebench.errors import UserError
from prunebench.progress.jobs import Plan as Jobs
from prunebench.progress.jobs import plan as planned
from prunebench.runtime import resources
from prunebench.tracks import Cell, Track
from prunebench.tracks.settings_benchmark import Model, Sampling
from prunebench.tracks.stages import STAGES

RESULTS = Path("results")
BACKWARD = 2  # passes forward that a pass backward costs: one for inputs, one for weights
FLOAT = 4  # bytes
# Multiply-accumulates of one image at 299 pixels (Szegedy et al. 2016, arXiv 1512.00567: "5 billion
# multiply-adds per inference", as counted 5.7).
INCEPTION = 5.7e9
# TFLOP/s that the makers' data sheets state, dense, in fp32 without TF32 and in bf16.
PEAKS = {
    "a100": (19.5, 312),
    "h100": (67, 989),
    "h200": (67, 989),
    "l40s": (91.6, 362),
    "rtx4090": (82.6, 165),
    "v100": (15.7, 125),
}
CORE = 3e10  # FLOP/s of a core where no record says
SCORED = 1e-3  # seconds of scoring an image likewise
UTILISATION = 0.4  # of that peak; PyTorch's own training of transformers reaches a third to a half


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second, and where the figures are from.

    Attributes:
        core: of one CPU core in fp32.
        single, half: of one GPU in fp32 and in bf16.
    """

    core: float
    single: float
    half: float
    source: str

    def of(self, device: str, precision: str = "fp32") -> float:
        if device == "cpu":
            return self.core
        return self.half if precision == "bf16" else self.single


@dataclass
class Line:
    """What all jobs of a stage cost together.

    Attributes:
        gpu_s, cpu_s: seconds of GPUs and of cores.
        disk: bytes of its files.
        basis: "computed", "at most" (the time that the track allows), or both.
    """

    stage: str
    jobs: int = 0
    gpu_s: float = 0.0
    cpu_s: float = 0.0
    disk: float = 0.0
    basis: str = "computed"


@dataclass(frozen=True)
class Forecast:
    """What a track would cost.

    Attributes:
        cells: how many it has.
        lines: a `Line` for each stage.
        assets: bytes of what it downloads, and names of assets whose size is not known.
    """

    track: str
    cells: int
    lines: list[Line]
    rates: Rates
    assets: int
    unsized: tuple[str, ...]

    def total(self, what: str) -> float:
        return sum(getattr(line, what) for line in self.lines)

    @property
    def disk(self) -> float:
        """Bytes at the peak, at the end: nothing but shards is removed on the way."""
        return self.total("disk") + self.assets


def forecast(
    track: Track,
    divisions: Iterable[str],
    runs: Path,
    gpu: str = "a100",
    oracle: bool = False,
    unfinished: bool = False,
) -> Forecast:
    """What the divisions of a track would cost.

    Args:
        gpu: a key of PEAKS.
        unfinished: count only jobs that have left no record yet.
    """
    jobs = planned(track, divisions, runs, oracle)
    counter = _Counter(track, rates(gpu), spent_by_method())
    lines = list(counter.lines(jobs, unfinished))
    sizes = {name: asset(name).size for name in track.assets() if not asset(name).packaged}
    unsized = tuple(name for name, size in sizes.items() if size is None)
    known = sum(size for size in sizes.values() if size)
    return Forecast(track.name, len(jobs.cells), lines, counter.rates, known, unsized)


# ---- rates


def rates(gpu: str) -> Rates:
    """A core's rate as published records measured it, a GPU's as its maker states it."""
    if gpu not in PEAKS:
        raise UserError(f"--gpu: unknown GPU '{gpu}'; known: {', '.join(PEAKS)}")
    single, half = (UTILISATION * 1e12 * peak for peak in PEAKS[gpu])
    found = [rate for rate in map(_core_rate, _published()) if rate]
    core = statistics.median(found) if found else CORE
    known = f"median of {len(found)} published cells" if found else "assumed"
    source = (
        f"a core {core / 1e9:.3g} GFLOP/s ({known}); "
        f"{gpu} {single / 1e12:.3g} TFLOP/s in fp32, {half / 1e12:.3g} in bf16 "
        f"({UTILISATION:.0%} of the peak that its maker states)"
    )
    return Rates(core, single, half, source)


@cache
def _published() -> tuple[Mapping, ...]:
    """The published scores of cells."""
    files = sorted(resources.find(RESULTS).glob("*/raw/**/*.json"))
    contents = [json.loads(file.read_text()) for file in files]
    return tuple(c for c in contents if c.get("status") == "ok" and "sampling" in c and "size" in c)


def _core_rate(score: Mapping) -> float | None:
    """Operations per second of the job that drew a cell's images on one core."""
    stage = score["stages"]["sample"]
    if stage["machine"]["gpu"] or not stage["wall_s"]:
        return None
    drawn = score["sampling"]
    return 2 * score["size"]["macs"] * drawn["count"] * drawn["steps"] / stage["wall_s"]


def spent_by_method() -> dict[str, float]:
    """Of each method the passes forward, in images, that its selection took in published cells.

    A pass backward counts as BACKWARD of them.
    """
    found = defaultdict(list)
    for score in _published():
        cell = score["cell"] if "cell" in score else score["identity"]["cell"]
        spent = score["budget"]["selection"]
        forward = spent["student_forward"] + spent["teacher_forward"]
        found[cell["method"]].append(forward + BACKWARD * spent["student_backward"])
    return {method: statistics.mean(values) for method, values in found.items()}


@cache
def seconds_of_scoring() -> float:
    """Of one image and a classifier of the track's own, on one core: the published median."""
    found = [score["wall_s"] / score["sampling"]["count"] for score in _published()]
    return statistics.median(found) if found else SCORED


# ---- work


class _Counter:
    """Counts the work of a track's jobs."""

    def __init__(self, track: Track, rates_: Rates, spent: Mapping[str, float]):
        self.track, self.rates, self.spent = track, rates_, spent
        side = track.settings.dataset.entry.shape[1]
        entries = track.settings.models.items()
        self.networks = {name: _Network(model, side) for name, model in entries}

    def lines(self, jobs: Jobs, unfinished: bool) -> Iterator[Line]:
        """One for every stage that has jobs, in the order of the work."""
        cells = {record: cell for cell, records in jobs.cells.items() for record in records}
        wanted = {r: j for r, j in jobs.jobs.items() if not (unfinished and Path(r).exists())}
        for stage in STAGES:
            mine = {record: job for record, job in wanted.items() if job.stage == stage}
            line, bases = Line(stage, len(mine)), set()
            for record, job in mine.items():
                bases.add(self._add(line, stage, job.model, cells.get(record)))
            line.basis = " and ".join(sorted(bases, reverse=True))
            if mine:
                yield line

    def _add(self, line: Line, stage: str, model: str, cell: Cell | None) -> str:
        """Add one job to its stage's line; returns how its time is known."""
        line.disk += self._disk(stage, model, cell)
        needs = self.track.needs(stage)
        # Images are drawn where shards are, which may ask for a GPU where gathering them does not.
        gpus = self.track.needs("shard")["gpu"] if stage == "sample" else needs["gpu"]
        work = self._work(stage, model, cell)
        if work is None:
            seconds, basis = 60 * needs["runtime"], "at most"
        else:
            precision = self.track.model(model).recovery.precision if stage == "recover" else "fp32"
            seconds = work / self.rates.of("gpu" if gpus else "cpu", precision)
            basis = "computed"
        if gpus:
            line.gpu_s += seconds
        else:
            line.cpu_s += seconds * (needs["cpus"] if work is None else 1)
        return basis

    def _work(self, stage: str, model: str, cell: Cell | None) -> float | None:
        """Operations of a job, None where they are not known."""
        if not model:
            return None
        if stage == "dense":
            trained = self.track.model(model).training
            return self.networks[model].training(trained.images if trained else 0)
        if stage == "oracle":
            return self._mask(self.networks[model])
        return None if cell is None else self._of_cell(stage, self.networks[model], cell)

    def _of_cell(self, stage: str, network: "_Network", cell: Cell) -> float | None:
        left = self._left(cell)
        image = left * self._image(network, cell)
        work = {
            "recover": left * network.training(self.track.budget(cell)) + self._taught(cell),
            "sample": self.track.settings.sampling.count * image,
            "cost": self._timed(network, left, image),
            "score": self._scored(),
        }
        if stage == "select":
            forwards = self.spent.get(cell.method)
            return None if forwards is None else forwards * network.forward
        return work[stage]

    def _image(self, network: "_Network", cell: Cell) -> float:
        """Drawing one image of a cell with the dense network."""
        way, steps = self.track.model(cell.model).drawn(cell.sampling), 1.0
        if "steps" in self._parts(cell):
            kept = self.track.method(cell.method).steps
            steps = 1 - cell.sparsity if kept is None else kept
        return steps * network.image(way) / self.track.fold(cell.method, cell.recovery)

    def _taught(self, cell: Cell) -> float:
        """A teacher's passes: one an image, of guided recoveries and those of steps more."""
        phases = self.track.phases_of(cell.method, cell.recovery)
        shares = (phase.share or 1.0 for phase in phases if recoveries.entry(phase.module).teacher)
        return sum(shares) * self.track.budget(cell) * self.networks[cell.model].forward

    def _mask(self, network: "_Network") -> float:
        """One mask of the oracle, on average over its recoveries."""
        asked = self.track.settings
        names = asked.oracle.recoveries
        budgets = [asked.budgets.get(name.rpartition("-")[2], 0) for name in names]
        trained = network.training(statistics.mean(budgets))
        drawn = asked.sampling.count * network.image(network.model.sampling)
        return (1 - asked.oracle.sparsity) * (trained + drawn) + self._scored()

    def _scored(self) -> float:
        images = self.track.settings.sampling.count
        if self.track.settings.extractor.name == "domain":
            return images * seconds_of_scoring() * self.rates.core
        return images * 2 * INCEPTION

    def _timed(self, network: "_Network", left: float, image: float) -> float:
        """A measurement of speed: single passes, batches and whole images, dense ones beside."""
        asked = self.track.settings.latency
        rounds = (asked.rounds + asked.warmup) * (1 + left)
        variants = 1 + len(asked.variants)
        passes_ = variants * (1 + asked.batch) * network.forward
        return rounds * passes_ + 2 * (asked.rounds + asked.warmup) * asked.images * image

    def _parts(self, cell: Cell) -> set[str]:
        """What the plans of a cell's method remove."""
        return set(self.track.method(cell.method).kind.split("+"))

    def _left(self, cell: Cell) -> float:
        """What of the dense network a cell's is."""
        return 1 - (cell.sparsity if self._parts(cell) & SMALLER else 0)

    def _disk(self, stage: str, model: str, cell: Cell | None) -> float:
        """Bytes of a job's files, without its record."""
        if stage == "dense":
            return FLOAT * self.networks[model].parameters
        if cell is None:
            return 0
        network = self.networks[model]
        if stage in ("select", "recover"):
            masks = network.parameters / 8 if "weights" in self._parts(cell) else 0
            return FLOAT * self._left(cell) * network.parameters + masks
        if stage == "sample":
            asked = self.track.settings
            channels, height, width = asked.dataset.entry.shape
            pixels = asked.sampling.size**2 if asked.sampling.size else height * width
            return asked.sampling.count * channels * pixels
        return 0


SMALLER = {"layers", "widths"}  # parts of plans that leave a smaller network
TOKENS = 77  # of a prompt, CLIP's; few of a network's operations depend on it


class _Network:
    """A dense network of a track.

    Args:
        side: of the data set's images; taken where the network takes any.
    """

    def __init__(self, model: Model, side: int):
        self.model, self.side = model, side

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """Parameters, and multiply-accumulates of one pass of one image."""
        for entry in models.published(self.model.family).values():
            if _same(self.model, entry.config):
                return entry.parameters, entry.macs
        return _counted(self.model, self.side)

    @property
    def parameters(self) -> int:
        return self._counts[0]

    @property
    def forward(self) -> float:
        """Operations of one pass of one image."""
        return 2.0 * self._counts[1]

    def image(self, way: Sampling) -> float:
        """Operations of drawing one image."""
        return self.forward * way.steps * (1 if way.guidance == 1 else 2)

    def training(self, images: float) -> float:
        again = self.model.recovery.activation_checkpointing
        return images * self.forward * (1 + BACKWARD + again)


def _same(model: Model, config: Mapping) -> bool:
    """Whether a model has a published configuration."""
    settings = models.config(model.family)
    return settings(**model.config) == settings(**config)


def _counted(model: Model, side: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one pass of one image, counted without memory."""
    import torch
    from accelerate import init_empty_weights

    from prunebench.evaluation.cost import count_macs, count_parameters

    taken = models.config(model.family)(**model.config).takes()
    with init_empty_weights(include_buffers=False):
        network = models.family(model.family).build(model.config).eval()
    network, side = network.to("meta"), taken.side or side
    with torch.device("meta"):
        x, t = torch.zeros(1, taken.channels, side, side), torch.zeros(1)
        y = torch.zeros(1, dtype=torch.long)
        if taken.text is not None:
            y = {"context": torch.zeros(1, TOKENS, taken.text), "sizes": torch.zeros(1, 6)}
            y |= {"pooled": torch.zeros(1, taken.pooled)} if taken.pooled else {}
    return count_parameters(network), count_macs(network, x, t, y)["macs"]


# ---- in words


def report(found: Forecast, price: float | None = None) -> str:
    """A table by stage, the totals and the rates, as lines of text.

    Args:
        price: of one GPU for an hour, in any currency.
    """
    rows = [("stage", "jobs", "GPU hours", "core hours", "disk", "how known")]
    for line in found.lines:
        hours = [f"{seconds / 3600:,.1f}" for seconds in (line.gpu_s, line.cpu_s)]
        rows.append((line.stage, f"{line.jobs:,}", *hours, size(line.disk), line.basis))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(word.ljust(w) for word, w in zip(row, widths, strict=True)) for row in rows]
    unsized = f"; of unknown size: {', '.join(found.unsized)}" if found.unsized else ""
    return "\n".join(
        [
            *map(str.rstrip, text),
            "",
            in_one_line(found, price),
            f"Assets: {size(found.assets)}{unsized}",
            f"Rates: {found.rates.source}",
            "At most: the time that the track allows its jobs (needs.<stage>.runtime).",
        ]
    )


def in_one_line(found: Forecast, price: float | None = None) -> str:
    """The totals in a sentence."""
    gpu, core = (found.total(what) / 3600 for what in ("gpu_s", "cpu_s"))
    cost = f", {gpu * price:,.0f} at {price:g} per GPU hour" if price is not None else ""
    jobs = sum(line.jobs for line in found.lines)
    return (
        f"{found.track}: {found.cells:,} cells, {jobs:,} jobs, about {gpu:,.1f} GPU hours, "
        f"{core:,.1f} core hours and {size(found.disk)} of disk{cost}"
    )


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB"


def check_disk(found: Forecast, folder: Path) -> None:
    """Refuse a run that the disk can't hold.

    Raises:
        UserError: what is needed and what is free.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if found.disk > free:
        raise UserError(
            f"track {found.track} needs about {size(found.disk)}, and {size(free)} are free in "
            f"{place}; put `runs` on a larger disk (a link will do), or add `--config disk=any`"
        )
