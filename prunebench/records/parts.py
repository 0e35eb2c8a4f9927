"""What records are made of: identities, counts, timings and where a result comes from.

Everything is frozen and refuses unknown keys, other types (an integer does for a real number), NaN
and infinity, so that what is written can be read and what is read means what this file says.
"""

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

LONGEST = 4000  # letters of a text that are kept
# Bidirectional controls reorder what a reader sees, and some letters have no width.
UNSEEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
FOLDERS = re.compile(r"(?<![\w/.:])/(?:[\w.+@-]+/)+")  # of an absolute path


def tidy(text: str) -> str:
    """Without control letters (but line breaks and tabs) and bidirectional ones, and not endless.

    A method's texts go into pages, papers and terminals.
    """
    kept = "".join(c for c in text if unicodedata.category(c) != "Cc" or c in "\n\t")
    kept = UNSEEN.sub("", kept)
    return kept if len(kept) <= LONGEST else f"{kept[: LONGEST - 1]}…"


def placeless(text: str) -> str:
    """`tidy` and without the folders of absolute paths, which say who ran it and where."""
    return tidy(FOLDERS.sub("…/", text))


Text = Annotated[str, AfterValidator(tidy)]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=200)]
PARTS = "layers|widths|weights|steps"  # that a plan may remove
Kind = Annotated[str, StringConstraints(pattern=rf"^(none|({PARTS})(\+({PARTS}))*)$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Json = dict[str, Any]  # of a method or a track: kept as it was given, JSON types only


class Part(BaseModel):
    """A frozen part of a record."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


# Identities: which result of a track a record is.


class Identity(Part):
    """Which result of which track: the stage that made it, and for most stages more names."""

    stage: Name
    track: Name

    def __str__(self) -> str:
        names = self.model_dump(exclude={"stage", "track"})
        return f"{self.stage} of {'/'.join(map(str, (self.track, *names.values())))}"


class CoderIdentity(Identity):
    """Of encoded images or captions."""

    coder: Name
    """Autoencoder or text encoder of the track."""


class ModelIdentity(Identity):
    """Of a dense model."""

    model: Name
    dense_seed: Count
    """Seed of the dense training."""


class SelectionIdentity(ModelIdentity):
    """Of what cells with one selection share: the selection itself and its cost."""

    method: Name
    sparsity: Share
    selection: Name
    """"selection", or with a recovery's name where the selection trains on the cell's budget."""
    seed: Count


class CostIdentity(SelectionIdentity):
    """Of a measurement of speed."""

    precision: Name
    sampling: Name


class CellIdentity(ModelIdentity):
    """Of a cell, one row of a leaderboard and one seed."""

    method: Name
    sparsity: Share
    recovery: Name
    """"none", or "<recovery>-<budget>"."""
    precision: Name
    sampling: Name
    seed: Count


class RecoveryIdentity(ModelIdentity):
    """Of what cells with one recovered model share."""

    method: Name
    sparsity: Share
    recovery: Name
    seed: Count


class ShardIdentity(CellIdentity):
    """Of a part of a cell's images."""

    shard: Count
    shards: Annotated[int, Field(ge=2)]


class MaskIdentity(ModelIdentity):
    """Of one layer mask of the oracle."""

    sparsity: Share
    recovery: Name
    seed: Count
    mask: Count


class RowIdentity(Identity):
    """Of a row of an efficiency track."""

    model: Name
    plan: Name


# Where, when and by what a record was made.


class Machine(Part):
    """What a stage ran on."""

    cpu: str
    cores: int
    gpu: str | None


class Provenance(Machine):
    """Code, configuration, machine and library versions of a stage's run."""

    commit: str | None
    """None outside of a git checkout."""
    dirty: bool
    """Whether tracked files differed from the commit."""
    code: str
    """SHA-256 of the package's sources."""
    config: str
    """SHA-256 of the track."""
    date: str
    memory_gb: float
    """Of the machine."""
    os: str
    python: str
    packages: dict[str, str | None]


class Stage(Part):
    """A stage that a score rests on."""

    wall_s: Seconds
    date: str
    code: str
    machine: Machine


class Failure(Part):
    """Why a cell has no result."""

    stage: Name
    error: Annotated[str, AfterValidator(placeless)]
    log: str | None


# What was spent and measured.


class Quality(Part):
    """A number, or the reason why there is none."""

    value: float | None = None
    reason: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Quality":
        if (self.value is None) != bool(self.reason):
            raise ValueError("a quality is a value, or else the reason why there is none")
        return self


class Budget(Part):
    """Images sent through a model, and the time it took."""

    student_forward: Count
    student_backward: Count
    teacher_forward: Count
    teacher_backward: Count = 0
    """Gradients of the teacher's output by its input; its weights are never trained."""
    wall_s: Seconds


class Training(Part):
    """How a stage trained."""

    batch: Count | None = None
    """Images of a step."""
    micro_batch: Count | None
    """Images that are in memory at a time; None where nothing was trained."""
    processes: Annotated[int, Field(ge=1)]
    resumed: Count
    """How often it went on from a checkpoint."""
    held: Count = 0
    """Steps at a constant learning rate that removals followed; its cosine spans those after."""


class Loss(Part):
    """Training loss at both ends of a recovery."""

    first: float
    last: float


class Student(Part):
    """How a recovered model is to be sampled, where its recovery changed that."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Sampling steps that it was taught; None: the track's."""
    prediction: Literal["noise", "velocity"] | None = None
    """What its network predicts; None: what the dense model's does."""


class Phase(Part):
    """One of the trainings of a recovery, which follow each other."""

    module: Name
    """Of prunebench/recovery."""
    images: Count
    """That the student was trained on."""
    parameters: Json
    """Of the module, defaults included."""


class Sizes(Part):
    """Parameters of the pruned and the dense denoiser."""

    parameters: Count
    nonzero_parameters: Count
    dense_parameters: Count
    sparsity_reached: Annotated[float, Field(le=1)]
    """Share of the dense model's parameters that was removed or zeroed."""


class Costs(Sizes):
    """The same with multiply-accumulates of one forward of one image."""

    macs: Count
    macs_without_attention_products: Count
    dense_macs: Count
    dense_macs_without_attention_products: Count


class Arithmetic(Part):
    """In which number format a network computed, where it was not as its weights are stored."""

    weights: Name
    """Format of the converted layers' weights."""
    activations: Name
    """Format of what these layers are given."""
    how: str
    converted: Count
    """Layers that are products with a matrix or a kernel."""
    of: Count
    left: dict[str, str]
    """Layer -> why it is as it was."""


class Timing(Part):
    """Two models timed in turns."""

    ms: Positive
    """Median of the pruned model."""
    iqr_ms: Seconds
    """Interquartile range of the same, in milliseconds."""
    dense_ms: Positive
    ratio: Positive
    """Pruned over dense: below 1 is faster."""
    images_per_s: Positive | None = None


class Load(Part):
    """What other processes used."""

    cpu: Seconds
    """Cores."""
    gpu_processes: Count | None = None
    gpu_utilisation: float | None = None
    """Percent."""


class Others(Part):
    """What other processes used before and during a timing."""

    before: Load
    during: Load


class Kernels(Part):
    """Which matrices ran on 2:4 kernels."""

    pattern: str
    device: str
    accelerated: Count
    of: Count
    dense: dict[str, str]
    """Layer -> why it stays dense."""
    reason: str | None
    """Why none has a kernel."""
    precision: str | None = None


class Variant(Part):
    """One forward under other conditions, or why it could not be timed."""

    forward_batch1: Timing | None = None
    forward_batch: Timing | None = None
    alone: bool | None = None
    failure: str | None = None


class Latency(Part):
    """Time and memory of the pruned model beside the dense one."""

    forward_batch1: Timing
    """One forward of one image."""
    forward_batch: Timing
    """One forward of `batch` images."""
    sampling: Timing
    """One image end to end, all steps."""
    batch: Count
    threads: Count
    device: str
    peak_memory_mb: float
    """Of one forward of `batch` images."""
    kernels: Kernels | None
    load_average: float
    waited_s: Seconds
    others: Others | None
    alone: bool | None
    """Whether nothing else computed meanwhile; None where nothing says."""
    variants: dict[str, Variant] = Field(default_factory=dict)
    arithmetic: Arithmetic | None = None
    """Of the pruned model; dense is in the track's first precision, with its default sampling."""


class Sampling(Part):
    """How images were drawn."""

    sampler: str
    steps: Annotated[int, Field(ge=1)]
    lanes: Count
    count: Count
    options: Json = Field(default_factory=dict)
    """Whatever else the track sets: guidance, the sampler's own options, the size."""
    arithmetic: Arithmetic | None = None


class Plan(Part):
    """What was removed (see prunebench.pruning.plan); masks are beside the weights."""

    layers: tuple[str, ...]
    copies: tuple[str, ...] = ()
    kept: dict[str, tuple[int, ...]]
    pattern: str | None
    steps: float
    notes: Json


class Labels(Part):
    """What is printed of a method and a model."""

    family: Name
    objective: Text
    recovered_by: Text
    """Module of prunebench/recovery that trained the cell, or "none"."""
    kind: Kind
    """What is removed; parts of a plan that removes several kinds are joined by "+"."""
    control: bool
    reconstruction: bool
    guessed: Text = ""
    """What is assumed of the criterion where no publication states it: the row is not ranked."""
    title: Text
    paper: Text
    bibtex: Text
    notes: Text
    idea: Text


class Weights(Part):
    """Weights from outside and what they hash to."""

    name: str
    sha256: Sha256 | dict[str, Sha256]
    """Of the file, or of each where there are several."""
    place: str = ""
    """Where they lay on the machine."""
    given: Json = Field(default_factory=dict)
    """What the track says of them."""


class Expected(Part):
    """A published FID that the dense model has to reach first."""

    fid: float
    tolerance: Positive
    source: str


class Extractor(Part):
    """The feature extractor that quality is measured with."""

    name: str
    sha256: Sha256
    dimensions: Count | None = None
    """Of its features."""
    accuracy: float | None = None
    """On the reference set, where it is a classifier of the data set."""
    weights: str = ""
    """Where its weights lie."""


class Spent(Part):
    """Budgets of both stages that may train."""

    selection: Budget
    recovery: Budget


class Trained(Part):
    """Images trained on in both stages."""

    selection: Count
    recovery: Count
