"""The record of every stage: what it holds, of which type, and how it identifies itself.

Fields are in the order in which they are written. `docs/records.md` is generated from here.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from prunebench.records import parts
from prunebench.records.parts import Count, Name, Part, Seconds, Sha256

VERSION = 2  # of every record; 1 had no identity, no inputs and no checksum

AnyIdentity = (
    parts.ShardIdentity
    | parts.CellIdentity
    | parts.CostIdentity
    | parts.RecoveryIdentity
    | parts.SelectionIdentity
    | parts.MaskIdentity
    | parts.ModelIdentity
    | parts.CoderIdentity
    | parts.RowIdentity
    | parts.Identity
)


RECORDS: dict[str, type["Sealed"]] = {}  # by the name of the stage, in the order of this file


class Sealed(Part):
    """What every record holds, and a saved training too; both are filled in when it is written."""

    STAGE: ClassVar[str] = ""

    files: dict[str, Sha256] = Field(default_factory=dict)
    """Payload beside the record -> SHA-256."""
    checksum: str = ""
    """SHA-256 of all the rest."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        if cls.STAGE:
            RECORDS[cls.STAGE] = cls


class Record(Sealed):
    """What the record of every stage holds."""

    version: Literal[2] = VERSION
    identity: AnyIdentity
    """Which result of which track it is."""
    status: Literal["ok", "failed"]
    failure: parts.Failure | None = None
    """Why it failed; None where it did not."""
    wall_s: Seconds
    """Time that the stage took."""
    training: parts.Training | None = None
    """How it trained, where it did."""
    provenance: parts.Provenance
    """Code, configuration, machine and versions."""
    fingerprint: str = ""
    """Hash of the track's settings that the stage depends on."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """What it was made from -> SHA-256, such as "dense/model.safetensors" or "method"."""

    @model_validator(mode="after")
    def _of_its_stage(self) -> "Record":
        if self.STAGE and self.identity.stage != self.STAGE:
            raise ValueError(f"identity.stage is '{self.identity.stage}', not '{self.STAGE}'")
        return self

    @model_validator(mode="after")
    def _failed_or_not(self) -> "Record":
        if (self.status == "failed") != (self.failure is not None):
            raise ValueError("a record is ok, or else failed and says why")
        return self


class Failed(Record):
    """In place of a cell's record where its method or its training broke."""

    status: Literal["failed"] = "failed"
    wall_s: Seconds = 0.0
    labels: parts.Labels


class Done(Record):
    """A stage that went well."""

    status: Literal["ok"] = "ok"


class Assets(Sealed):
    """assets.json: the files that a track reads from outside, as they were when fetched."""

    STAGE = "assets"
    version: Literal[2] = VERSION
    identity: parts.Identity
    assets: dict[str, dict[str, Sha256]]
    """Asset -> its files -> SHA-256."""


class Checkpoint(Sealed):
    """What an unfinished training saved of itself, beside it."""

    version: Literal[2] = VERSION
    identity: parts.Json | None
    """What the training depends on; a training of another identity does not go on from it."""


class FeatureExtractor(Done):
    """extractor.json: the feature extractor, and the features of the reference images."""

    STAGE = "extractor"
    identity: parts.Identity
    extractor: parts.Extractor


class Coder(Done):
    """coder.json: an autoencoder that the track trained, or a text encoder that it made."""

    STAGE = "coder"
    identity: parts.CoderIdentity
    kind: Literal["autoencoder", "text_encoder"]
    parameters: Count
    budget: parts.Budget
    loss: float | None = None
    """Mean of the training's last tenth; None where nothing was trained: random weights."""
    psnr: float | None = None
    """In dB, of the reference images after encoding and decoding, by the posteriors' means."""


class Encode(Done):
    """encode.json: the training images as latents, or the captions as embeddings."""

    STAGE = "encode"
    identity: parts.CoderIdentity
    kind: Literal["autoencoder", "text_encoder"]
    weights: parts.Weights
    count: Count
    """Images or captions that were encoded."""


class Dense(Done):
    """dense.json: a dense model, trained or taken as it was released."""

    STAGE = "dense"
    identity: parts.ModelIdentity
    budget: parts.Budget
    loss: float | None
    """Mean of the training's last tenth; None where nothing was trained."""
    weights: parts.Weights | None
    """The checkpoint it began from."""


class Select(Done):
    """select.json: what a method chose to remove."""

    STAGE = "select"
    identity: parts.SelectionIdentity
    budget: parts.Budget
    trained_images: Count
    size: parts.Sizes


class Recover(Done):
    """recover.json: a pruned model after its recovery."""

    STAGE = "recover"
    identity: parts.RecoveryIdentity
    budget: parts.Budget
    trained_images: Count
    """Images trained on, in all phases; `budget` counts every pass."""
    phases: tuple[parts.Phase, ...]
    student: parts.Student
    size: parts.Sizes
    loss: parts.Loss | None


class Sample(Done):
    """sample.json: the images of a cell."""

    STAGE = "sample"
    identity: parts.CellIdentity
    sampling: parts.Sampling
    shards: Annotated[int, Field(ge=1)]


class Shard(Done):
    """shard<i>of<n>.json: a part of the images of a cell."""

    STAGE = "shard"
    identity: parts.ShardIdentity
    sampling: parts.Sampling


class Cost(Done):
    """cost.json: size, multiply-accumulates, memory and latency."""

    STAGE = "cost"
    identity: parts.CostIdentity
    latency: parts.Latency
    size: parts.Costs


class Score(Done):
    """score.json: everything that a leaderboard shows of a cell."""

    STAGE = "score"
    identity: parts.CellIdentity
    labels: parts.Labels
    quality: dict[str, parts.Quality]
    """Metric -> its value or the reason why there is none; names as in evaluation/metrics."""
    samples: Count
    """Images that were scored."""
    reference_samples: Count
    size: parts.Costs
    latency: parts.Latency
    budget: parts.Spent
    trained: parts.Trained
    phases: tuple[parts.Phase, ...] = ()
    """Of the recovery; none where it was recorded before there were several."""
    student: parts.Student = parts.Student()
    trainings: dict[Name, parts.Training]
    """Stage -> how it trained."""
    sampling: parts.Sampling
    extractor: parts.Extractor
    text_encoder: parts.Weights | None = None
    clip: parts.Weights | None = None
    expected: parts.Expected | None = None
    """What the dense model's FID has to be; None where nothing was published or asked for."""
    released: bool
    """Whether the dense model is as it was released, not trained by the suite."""
    plan: parts.Plan
    parameters: parts.Json
    """What the method was called with."""
    settings: parts.Json
    """What of the track made the cell."""
    stages: dict[Name, parts.Stage]


class Oracle(Done):
    """oracle.json: one layer mask of the oracle, recovered and scored like a cell."""

    STAGE = "oracle"
    identity: parts.MaskIdentity
    layers: tuple[str, ...]
    """What the mask removes."""
    masks: Count
    """How many there are of its kind."""
    exhaustive: bool
    """Whether these are all that there are."""
    fid: parts.Quality
    budget: parts.Budget
    extractor: Sha256
    settings: parts.Json


class Asked(Part):
    """A plan as an efficiency track asks for it."""

    kind: str
    sparsity: float | None = None
    layers: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None


class ForwardTiming(Part):
    """One forward of a row under one condition, or why it was not timed."""

    precision: str
    mode: str
    batch: Count
    ms: parts.Positive | None = None
    iqr_ms: Seconds | None = None
    dense_ms: parts.Positive | None = None
    ratio: parts.Positive | None = None
    images_per_s: parts.Positive | None = None
    peak_memory_mb: float | None = None
    dense_peak_memory_mb: float | None = None
    alone: bool | None = None
    kernels: parts.Kernels | None = None
    failure: str | None = None

    @model_validator(mode="after")
    def _timed_or_not(self) -> "ForwardTiming":
        if (self.ms is None) != bool(self.failure):
            raise ValueError("a timing is a time, or else the reason why there is none")
        return self


class Decoder(Done):
    """decoder.json: a narrow decoder that imitates an autoencoder's on what a dense model draws."""

    STAGE = "decoder"
    identity: parts.ModelIdentity
    width: parts.Share
    """Share of the channels that every layer has."""
    draws: Count
    """Latents that it learnt on."""
    budget: parts.Budget
    loss: float
    """Mean of the training's last tenth."""
    parameters: Count
    whole_parameters: Count
    """Of the autoencoder's own decoder."""
    macs: Count
    """Multiply-accumulates of one image."""
    whole_macs: Count
    timing: ForwardTiming
    """Decoding alone; "dense" stands for the autoencoder's own decoder."""
    samples: Count
    """Images that quality is of: the dense model's, in each decoder's version."""
    psnr: parts.Quality
    """In dB, between the two versions of an image."""
    fid: parts.Quality
    whole_fid: parts.Quality


class Efficiency(Record):
    """efficiency.json: a row of an efficiency track, counted and, on a GPU, measured."""

    STAGE = "efficiency"
    identity: parts.RowIdentity
    title: str
    asked: Asked
    seed: Count
    settings: parts.Json
    layers: tuple[str, ...] = ()
    left: dict[str, tuple[Count, Count]] = Field(default_factory=dict)
    """Width -> channels that are left, and of how many."""
    size: parts.Costs | None = None
    timings: tuple[ForwardTiming, ...] = ()
    not_measured: str | None = None

    @model_validator(mode="after")
    def _counted_or_failed(self) -> "Efficiency":
        if (self.status == "failed") != (self.size is None):
            raise ValueError("a row has a size, or else status 'failed' and the reason")
        return self
