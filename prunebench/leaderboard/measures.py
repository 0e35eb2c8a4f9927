"""The numbers of a row: how each is read from a score, what it means and how it is printed.

Quality comes from the metrics' own entries; sizes, times and budgets are typed attributes of the
record.
"""

from collections.abc import Callable
from dataclasses import dataclass

from prunebench.evaluation import metrics
from prunebench.records.parts import Timing, Variant
from prunebench.records.schema import Score

# Conditions of timing besides the suite's own, where a track asks for them (latency.variants).
VARIANTS = {"compiled": "compiled", "bf16": "bf16", "compiled_bf16": "compiled, bf16"}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a score."""

    read: Callable[[Score], float | None]  # None where there is none
    label: str
    help: str
    better: str = ""  # "lower", "higher" or "" when neither is better
    unit: str = ""
    scale: float = 1.0  # printed value = recorded value x scale
    format: str = ".3f"  # a format specification, or "sig" for three significant digits
    spread: bool = False  # print the standard deviation beside the mean
    null: str = "—"  # how no value reads
    optional: bool = False  # not every board has it


def _quality() -> dict[str, Measure]:
    """A measure per metric, as its entry says."""

    def reader(name: str) -> Callable[[Score], float | None]:
        return lambda score: score.quality[name].value if name in score.quality else None

    words = ("label", "help", "better", "unit", "scale", "format", "spread", "null", "optional")
    return {
        name: Measure(read=reader(name), **{word: getattr(entry, word) for word in words})
        for name, entry in metrics.metrics().items()
    }


def _size(name: str, label: str, help_: str, **words) -> Measure:
    return Measure(
        read=lambda score: getattr(score.size, name), label=label, help=help_,
        **{"better": "lower", "unit": "M", "scale": 1e-6, "format": "sig", **words},
    )  # fmt: skip


def _ratio(read: Callable[[Score], Timing], label: str, help_: str) -> Measure:
    return Measure(
        read=lambda score: read(score).ratio, label=label, help=help_, better="lower",
        unit="× dense", format=".2f",
    )  # fmt: skip


def _images(read: Callable[[Score], int], label: str, help_: str) -> Measure:
    return Measure(
        read=read, label=label, help=help_, better="lower", unit="k images", scale=1e-3,
        format="sig",
    )  # fmt: skip


def _seconds(read: Callable[[Score], float], label: str, help_: str) -> Measure:
    return Measure(read=read, label=label, help=help_, better="lower", unit="s", format="sig")


SIZES = {
    "parameters": _size("parameters", "Params", "Parameters of the denoiser"),
    "nonzero_parameters": _size(
        "nonzero_parameters", "Non-zero", "Parameters that are not zero: the size of a masked model"
    ),
    "sparsity_reached": _size(
        "sparsity_reached", "Reached", "Fraction of the denoiser's parameters that was removed or "
        "zeroed", better="", unit="%", scale=1e2, format=".1f"),
    "macs": _size(
        "macs", "MACs", "Multiply-accumulates of one denoiser forward of one image; masks leave "
        "them as they are"),
    "macs_without_attention_products": _size(
        "macs_without_attention_products", "MACs w/o attn", "The same without the query-key and "
        "attention-value products, as many papers count"),
}  # fmt: skip

TIMES = {
    "forward_batch1_ratio": _ratio(
        lambda score: score.latency.forward_batch1, "Forward, batch 1", "Time of one denoiser "
        "forward of one image relative to dense measured in turns; below 1 is faster"),
    "forward_batch_ratio": _ratio(
        lambda score: score.latency.forward_batch, "Forward, batch n", "Time of one denoiser "
        "forward of a full batch relative to dense; below 1 is faster"),
    "sampling_ms": Measure(
        read=lambda score: score.latency.sampling.ms, label="Latency", help="Measured time of "
        "sampling one image end to end, all steps", better="lower", unit="ms/image", format="sig"),
    "speedup": Measure(
        read=lambda score: score.latency.sampling.ratio**-1, label="Speed-up", help="Sampling time "
        "of the dense model over this row's, measured in turns", better="higher", unit="×",
        format=".2f", spread=True),
    "dense_sampling_ms": Measure(
        read=lambda score: score.latency.sampling.dense_ms, label="Dense latency", help="The same "
        "of the dense model, measured in turns with this row", better="lower", unit="ms/image",
        format="sig"),
    "peak_memory_mb": Measure(
        read=lambda score: score.latency.peak_memory_mb, label="Peak memory", help="Peak memory of "
        "one denoiser forward of a full batch: the model and its activations", better="lower",
        unit="MB", format="sig"),
    "others_cpu": Measure(
        read=lambda score: score.latency.others and score.latency.others.during.cpu,
        label="Others' CPU", help="CPU that other processes used while this row was timed",
        better="lower", unit="cores", format=".2f", optional=True),
    "waited_s": Measure(
        read=lambda score: score.latency.waited_s if score.latency.others else None,
        label="Waited", help="Time that timing waited for other processes to end", unit="s",
        format="sig", optional=True),
}  # fmt: skip

BUDGETS = {
    "student_images": _images(
        lambda score: score.budget.selection.student_forward
        + score.budget.recovery.student_forward,
        "Budget", "Images sent forward through the model, dense or pruned, in selection and "
        "recovery together; the teacher's apart"),
    "selection_images": _images(
        lambda score: score.budget.selection.student_forward, "Selection images", "Images sent "
        "forward through the model to choose what goes"),
    "selection_gradients": _images(
        lambda score: score.budget.selection.student_backward, "Selection gradients", "Images "
        "whose gradient was taken to choose what goes"),
    "recovery_images": _images(
        lambda score: score.budget.recovery.student_forward, "Recovery images", "Images sent "
        "through the pruned model in recovery"),
    "teacher_images": _images(
        lambda score: score.budget.selection.teacher_forward
        + score.budget.recovery.teacher_forward,
        "Teacher images", "Images sent through the dense model as a teacher"),
    "selection_wall_s": _seconds(
        lambda score: score.budget.selection.wall_s, "Selection", "Wall time of choosing what to "
        "remove"),
    "recovery_wall_s": _seconds(
        lambda score: score.budget.recovery.wall_s, "Recovery time", "Wall time of recovery"),
}  # fmt: skip


def _nothing(score: Score) -> None:
    """What no score knows: a board fills it in out of other records."""


ORACLE = {
    "oracle_beaten": Measure(
        read=_nothing, label="Masks beaten", help="Share of all other layer masks of the same "
        "sparsity (or of the number of random ones that oracle.md states) whose FID is worse after "
        "the same recovery", better="higher", unit="%", scale=1e2, format=".0f", spread=True,
        optional=True),
    "oracle_gap": Measure(
        read=_nothing, label="FID above best mask", help="FID minus that of the best of those "
        "masks", better="lower", format=".2f", spread=True, optional=True),
}  # fmt: skip


def _variant_measures(name: str, words: str) -> dict[str, Measure]:
    """Both forwards and the throughput under one variant; not every board or row has them."""

    def timing(size: str) -> Callable[[Score], Timing | None]:
        return lambda score: getattr(score.latency.variants.get(name, Variant()), size)

    def ratio(size: str, batch: str) -> Measure:
        return Measure(
            read=lambda score: (found := timing(size)(score)) and found.ratio,
            label=f"Forward, {batch}, {words}", help=f"Time of one denoiser forward ({words}) "
            "relative to dense under the same conditions", better="lower", unit="× dense",
            format=".2f", optional=True)  # fmt: skip

    return {
        f"forward_batch1_ratio_{name}": ratio("forward_batch1", "batch 1"),
        f"forward_batch_ratio_{name}": ratio("forward_batch", "batch n"),
        f"throughput_{name}": _throughput(timing("forward_batch"), f", {words}"),
    }


def _throughput(timing: Callable[[Score], Timing | None], words: str = "") -> Measure:
    return Measure(
        read=lambda score: (found := timing(score)) and found.images_per_s,
        label=f"Throughput{words}", help="Images of a full batch that one denoiser "
        f"forward{words} takes per second", better="higher", unit="images/s", format="sig",
        optional=True)  # fmt: skip


MEASURES = {
    **_quality(), **SIZES, **TIMES, **BUDGETS, **ORACLE,
    "throughput": _throughput(lambda score: score.latency.forward_batch),
    **{key: measure for variant in VARIANTS.items()
       for key, measure in _variant_measures(*variant).items()},
}  # fmt: skip
