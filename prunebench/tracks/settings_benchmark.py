"""What a benchmark track may say: one frozen section each, its defaults and checks beside it.

Checks here concern one section; what must fit between sections is in `checks`. The JSON schema that
editors use is written from these classes (scripts/write_schemas.py).
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from prunebench.assets.made_up import described
from prunebench.assets.registry import Asset, data_set
from prunebench.records.strict import Strict, WrongKeyError
from prunebench.tracks.cells import DEFAULT
from prunebench.tracks.settings import (
    Distinct,
    Fraction,
    Images,
    Name,
    Place,
    Positive,
    Seconds,
    Seed,
    Some,
    Text,
)
from prunebench.training.settings import Batch, Rate, Share
from prunebench.training.settings import Settings as Training

Recovery = Annotated[str, Field(pattern=r"^(none|[a-z][a-z0-9_]*-[a-z0-9]+)$", max_length=100)]
Precision = Literal["fp32", "bf16", "int8"]
LEAST = 10  # images: with fewer, precision and recall have too few neighbours


def one_of(section: Strict, *keys: str) -> None:
    """Refuse a section that has none of the keys, or several."""
    if sum(getattr(section, key) is not None for key in keys) != 1:
        named = " or ".join(repr(key) for key in keys)
        raise WrongKeyError("", f"needs either the key {named}")


class MadeUp(Strict):
    """Images that are made up in the data set's place, for a rehearsal."""

    side: int = Field(ge=8, le=1024)
    train: int = Field(ge=LEAST, le=100_000)
    reference: int = Field(ge=LEAST, le=100_000)


class Dataset(Strict):
    """Images to train on, and those that samples are compared with (`assets.load_dataset`)."""

    name: Text
    limit_train: int | None = Field(None, ge=LEAST, le=10**9)
    limit_reference: int | None = Field(None, ge=LEAST, le=10**9)
    reference: Text = "held_out"
    flip: bool = False
    made_up: MadeUp | None = None

    @property
    def entry(self) -> Asset:
        """What the data set holds."""
        made_up = self.made_up
        return described(self.name, made_up.side) if made_up else data_set(self.name)


class ExtractorTraining(Strict):
    """How the domain classifier is trained."""

    seed: Seed
    epochs: int = Field(ge=1, le=10_000)
    batch: int = Field(ge=2, le=1_000_000)
    learning_rate: Rate


class Extractor(Strict):
    """The feature extractor: the track's own classifier, or a published network."""

    name: Literal["domain", "inception-v3-compat"]
    asset: Text | None = None
    training: ExtractorTraining | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Extractor":
        needed, other = ("training", "asset") if self.name == "domain" else ("asset", "training")
        if getattr(self, needed) is None:
            raise WrongKeyError(needed, f"'{self.name}' needs this key")
        if getattr(self, other) is not None:
            raise WrongKeyError(other, f"'{self.name}' has no use for this key; leave it out")
        return self


class NoiseObjective(Strict):
    """DDPM's (Ho et al. 2020): the network predicts the noise, or the velocity of Salimans & Ho
    (2022); the schedule is diffusers'.
    """

    name: Literal["noise"]
    prediction: Literal["noise", "velocity"] = "noise"
    train_steps: int = Field(1000, ge=2, le=100_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)

    @model_validator(mode="after")
    def _rises(self) -> "NoiseObjective":
        if self.beta_start >= self.beta_end:
            raise WrongKeyError(
                "beta_start", f"{self.beta_start} is not below beta_end, {self.beta_end}"
            )
        return self


class FlowObjective(Strict):
    """SiT's linear interpolant (Ma et al. 2024): the network predicts the velocity."""

    name: Literal["flow"]
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    time_scale: float = Field(1.0, ge=0.001, le=1_000_000)


class DenseTraining(Training):
    """How a dense model is trained, from scratch or from its `weights`."""

    images: Images

    @model_validator(mode="after")
    def _trains(self) -> "DenseTraining":
        if self.images < self.batch:
            raise WrongKeyError("images", f"{self.images} is less than one batch, {self.batch}")
        return self


class Weights(Strict):
    """A released checkpoint. `layout`: by default that of the configuration `config` names."""

    asset: Text | None = None
    file: Place | None = None
    layout: Text | None = None
    classes: int | None = Field(None, ge=1, le=1_000_000)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _one_place(self) -> "Weights":
        one_of(self, "asset", "file")
        return self


class Reference(Strict):
    """The published FID that the dense row must reach."""

    fid: float = Field(ge=0.01, le=1000)
    tolerance: float = Field(ge=0.001, le=100)
    source: Text


class Sampling(Strict):
    """How images are drawn from a model. `guidance_channels`: only the first so many are guided."""

    sampler: Text
    steps: int = Field(ge=1, le=100_000)
    guidance: float = Field(1.0, ge=0, le=1000)
    guidance_channels: int | None = Field(None, ge=1, le=10_000)
    options: dict[str, JsonValue] = Field({}, max_length=100)


class Fitting(Strict):
    """How a network other than a denoiser is trained: AdamW, a cosine to 0, an average."""

    seed: Seed
    images: Images
    batch: Batch
    learning_rate: Rate
    ema: Share = 0.0
    warmup: Share = 0.0

    @model_validator(mode="after")
    def _trains(self) -> "Fitting":
        if self.images < self.batch:
            raise WrongKeyError("images", f"{self.images} is less than one batch, {self.batch}")
        return self

    @property
    def loop(self) -> Training:
        """As the training loop takes it."""
        return Training(**self.model_dump(include=set(Training.model_fields)))


class Decoder(Fitting):
    """A narrower decoder that learns to imitate the autoencoder's (SnapFusion, arXiv 2306.00980).

    `width`: the share of channels that every layer keeps; `draws`: latents of the dense model that
    it learns on, over and over until `images` have gone through it.
    """

    width: Fraction = 0.5
    draws: Images


class Model(Strict):
    """A dense model: architecture, how it is trained or had, recovered and sampled.

    `config` is a family's own settings, or the name of a configuration that its authors published.
    `samplings`: other ways to sample it, by name, for divisions that compare combinations.
    """

    family: Text
    config: dict[str, JsonValue] | Text
    weights: Weights | None = None
    autoencoder: Name | None = None
    decoder: Decoder | None = None
    text_encoder: Name | None = None
    objective: Annotated[NoiseObjective | FlowObjective, Field(discriminator="name")]
    training: DenseTraining | None = None
    recovery: Training
    reference: Reference | None = None
    sampling: Sampling
    samplings: dict[Name, Sampling] = Field({}, max_length=100)

    @model_validator(mode="after")
    def _has_weights(self) -> "Model":
        if self.training is None and self.weights is None:
            raise WrongKeyError(
                "", "needs 'training', 'weights', or both: the weights are fine-tuned"
            )
        if self.training is None and self.weights.classes is not None:
            raise WrongKeyError("weights.classes", "other classes must be learnt; add 'training'")
        return self

    @model_validator(mode="after")
    def _decodes(self) -> "Model":
        if self.decoder and not self.autoencoder:
            raise WrongKeyError("decoder", "only a model with an autoencoder has one")
        return self

    def drawn(self, name: str) -> Sampling:
        """The sampling of a name, "default" or one of `samplings`."""
        return self.sampling if name == DEFAULT else self.samplings[name]

    @property
    def coders(self) -> dict[str, str]:
        """The model's autoencoder and text encoder by kind, of those that it has."""
        named = {"autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        return {kind: name for kind, name in named.items() if name is not None}


Channels = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=10)]


class OwnAutoencoder(Fitting):
    """An AutoencoderKL that the track trains on its own images.

    `channels` of each level, of which every one but the first halves the side; each a multiple of
    `groups`. `kl` is the weight of the posterior's divergence from a standard normal distribution.
    """

    channels: Channels
    latent_channels: int = Field(ge=1, le=1000)
    layers: int = Field(1, ge=1, le=100)
    groups: Positive = 4
    kl: float = Field(1e-4, ge=0, le=1)

    @model_validator(mode="after")
    def _whole_groups(self) -> "OwnAutoencoder":
        if any(count % self.groups for count in self.channels):
            raise WrongKeyError("groups", f"{self.groups} does not divide all of channels")
        return self

    @property
    def factor(self) -> int:
        """What it divides the images' side by."""
        return 2 ** (len(self.channels) - 1)


class OwnTextEncoder(Strict):
    """Text encoders with seeded random weights that know the words of the captions.

    `pipeline` says which, as in a pipeline's model_index.json.
    """

    seed: Seed
    pipeline: Literal["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"] = (
        "StableDiffusionPipeline"
    )
    width: Positive
    layers: int = Field(1, ge=1, le=100)
    heads: Positive = 1
    tokens: int = Field(ge=2, le=1000)

    @model_validator(mode="after")
    def _whole_heads(self) -> "OwnTextEncoder":
        if self.width % self.heads:
            raise WrongKeyError("heads", f"{self.heads} does not divide the width, {self.width}")
        return self


class _Coder(Strict):
    asset: Text | None = None
    folder: Place | None = None
    batch: Positive

    @model_validator(mode="after")
    def _one_place(self) -> "_Coder":
        one_of(self, "asset", "folder", "own")
        return self


class Autoencoder(_Coder):
    """What makes latents of images and back: latents are (encoded - shift) * scale.

    With `own` the track trains it; its latents then have mean 0 and variance 1 by themselves.
    """

    own: OwnAutoencoder | None = None
    scale: float = Field(ge=0.0001, le=1000)
    shift: float = Field(0.0, ge=-1000, le=1000)


class TextEncoder(_Coder):
    """What reads captions. `tokens` of a T5: 512 in FLUX.1-dev; CLIP has its own count.

    With `own` the track makes it.
    """

    own: OwnTextEncoder | None = None
    tokens: int = Field(512, ge=1, le=10_000)


class Methods(Strict):
    """Which method files run, and with which parameters."""

    folders: Some[Place]
    only: Distinct[Name] | None = None
    exclude: Distinct[Name] = ()
    parameters: dict[Name, dict[str, JsonValue]] = Field({}, max_length=1000)


class Phase(Strict):
    """A module of prunebench/recovery with parameters of its loss, on a share of the images."""

    module: Name
    share: float | None = Field(None, gt=0, le=1)
    parameters: dict[Name, JsonValue] = Field({}, max_length=100)


def _whole(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Shares are equal where none is given, and else all of them are, and are the whole."""
    shares = [phase.share for phase in phases]
    if any(share is not None for share in shares):
        if None in shares or abs(sum(shares) - 1) > 1e-6:
            raise ValueError("give every phase a 'share', 1 in all, or give none")
        return phases
    return tuple(phase.model_copy(update={"share": 1 / len(phases)}) for phase in phases)


Phases = Annotated[tuple[Phase, ...], Field(min_length=1, max_length=20), AfterValidator(_whole)]


class Division(Strict):
    """One leaderboard; `compares` says what differs between the rows that are ranked together.

    With `combinations`, every row is run in each of `precisions` and `samplings`, by default all.
    """

    compares: Literal["selections", "methods", "recoveries", "combinations"]
    recoveries: Some[Recovery]
    methods: Some[Name] | None = None
    precisions: Some[Precision] | None = None
    samplings: Some[Name] | None = None


class Oracle(Strict):
    """Every layer mask of one sparsity, or as many as `masks`."""

    models: Some[Name]
    sparsity: Fraction
    recoveries: Some[Recovery]
    seeds: Some[Seed]
    dense_seeds: Some[Seed] | None = None
    masks: int = Field(ge=2, le=100_000)


class Samples(Strict):
    """The images of a cell: `lanes` go through the network at once, `shards` jobs draw them."""

    count: int = Field(ge=LEAST, le=10_000_000)
    lanes: Positive
    batch: Positive
    size: int | None = Field(None, ge=8, le=8192)
    shards: int = Field(1, ge=1, le=10_000)

    @model_validator(mode="after")
    def _whole_blocks(self) -> "Samples":
        blocks = -(-self.count // self.lanes)
        if self.shards > blocks:
            raise WrongKeyError(
                "shards",
                f"{self.shards} shards, but {self.count} images are {blocks} blocks of "
                f"{self.lanes} (sampling.lanes), which are never split; use at most {blocks}",
            )
        return self


class Latency(Strict):
    """How speed is measured. `wait`: seconds for the machine to become quiet; 0 does not wait."""

    batch: Positive
    rounds: int = Field(ge=1, le=1_000_000)
    warmup: int = Field(ge=0, le=1_000_000)
    images: Positive
    wait: Seconds = 60.0
    variants: Distinct[Literal["compiled", "bf16"]] = ()


class Evaluation(Strict):
    """How images are scored."""

    batch: Positive
    lpips: Literal["none", "domain", "alex", "vgg"]
    clip: Text | None = None


class Needs(Strict):
    """What a job of a rule needs of a cluster; memory in MB, runtime in minutes.

    A job that was given a GPU and can't use it fails, unless `cpu_instead` allows the CPU.
    """

    mem_mb: int | None = Field(None, ge=300, le=100_000_000)
    runtime: int | None = Field(None, ge=1, le=10_000_000)
    gpu: int | None = Field(None, ge=0, le=1024)
    cpus: int | None = Field(None, ge=1, le=100_000)
    cpu_instead: bool | None = None


Budget = Annotated[str, Field(pattern=r"^[a-z0-9]+$", max_length=32)]


class BenchmarkSettings(Strict):
    """A track of prunebench."""

    kind: Literal["benchmark"] = "benchmark"
    title: Text
    dataset: Dataset
    extractor: Extractor
    autoencoders: dict[Name, Autoencoder] = Field({}, max_length=100)
    text_encoders: dict[Name, TextEncoder] = Field({}, max_length=100)
    models: dict[Name, Model] = Field(min_length=1, max_length=1000)
    methods: Methods
    sparsities: Some[Fraction]
    fewer_steps: Some[Fraction]
    recoveries: dict[Name, Phases] = Field({}, max_length=100)
    divisions: dict[Name, Division] = Field(min_length=1, max_length=100)
    oracle: Oracle | None = None
    budgets: dict[Budget, Images] = Field(min_length=1, max_length=100)
    seeds: Some[Seed]
    dense_seeds: Some[Seed] = (0,)
    precisions: Some[Precision] = ("fp32",)
    checkpoint_seconds: Seconds = 300.0
    sampling: Samples
    latency: Latency
    evaluation: Evaluation
    needs: dict[str, Needs] = Field({}, max_length=100)
