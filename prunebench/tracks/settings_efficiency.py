"""What an efficiency track may say, as `settings_benchmark` does it for benchmark tracks."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from prunebench.records.strict import Strict, WrongKeyError
from prunebench.tracks.settings import (
    Distinct,
    Fraction,
    Name,
    Positive,
    Seconds,
    Seed,
    Some,
    Text,
)
from prunebench.tracks.settings_benchmark import Needs

Side = Annotated[int, Field(ge=1, le=1_000_000)]
Shape = Annotated[tuple[Side, ...], Field(min_length=1, max_length=4)]
Layer = Annotated[str, Field(pattern=r"^[a-z]\w*(\.\w+)+$", max_length=200)]


class Network(Strict):
    """A network; `x`, `y`: shapes of one image's latents or pixels and of its text."""

    family: Text
    config: dict[str, JsonValue] | Text
    title: Text | None = None
    x: tuple[Side, Side, Side]
    y: (
        Shape
        | Annotated[dict[Literal["context", "pooled", "sizes"], Shape], Field(min_length=1)]
        | None
    ) = None
    plans: Distinct[Name] | None = None
    batches: Some[Positive]

    @model_validator(mode="after")
    def _begins_with_one(self) -> "Network":
        if self.batches[0] != 1:
            raise WrongKeyError("batches", "begins with 1, the batch that latency is read at")
        return self


class Plan(Strict):
    """What a plan removes: a fraction, named layers, or two of four weights.

    `layers` and `widths` lose that fraction of the parameters, `uniform` that of the channels.
    """

    kind: Literal["layers", "widths", "uniform", "2:4"]
    sparsity: Fraction | None = None
    layers: Some[Layer] | None = None
    models: Some[Name] | None = None

    @model_validator(mode="after")
    def _says_what(self) -> "Plan":
        if self.kind != "layers" and self.layers is not None:
            raise WrongKeyError("layers", f"a plan of kind '{self.kind}' has no layers")
        if self.kind == "2:4" and self.sparsity is not None:
            raise WrongKeyError("sparsity", "a plan of kind '2:4' has no sparsity but its own")
        if self.kind != "2:4" and (self.sparsity is None) == (self.layers is None):
            more = " or 'layers'" if self.kind == "layers" else ""
            raise WrongKeyError("", f"needs either the key 'sparsity'{more}")
        return self


class Condition(Strict):
    """A condition of the track under which a row was measured."""

    precision: Literal["fp32", "bf16", "fp16"]
    mode: Literal["eager", "compiled"]
    batch: Positive


class Claim(Strict):
    """A speed-up that a paper states, and the row and condition that it stands beside."""

    title: Text
    speedup: float = Field(ge=0.01, le=1000)
    paper: Text
    source: Text
    conditions: Text
    model: Name
    plan: Name
    beside: Condition
    differs: Text
    bibtex: Text = ""


class EfficiencySettings(Strict):
    """An efficiency track of prunebench."""

    kind: Literal["efficiency"]
    title: Text
    seed: Seed
    device: Literal["cuda", "cpu"]
    precisions: Some[Literal["fp32", "bf16", "fp16"]]
    modes: Some[Literal["eager", "compiled"]]
    rounds: int = Field(ge=1, le=1_000_000)
    warmup: int = Field(ge=0, le=1_000_000)
    wait: Seconds = 60.0
    needs: dict[str, Needs] = Field({}, max_length=100)
    models: dict[Name, Network] = Field(min_length=1, max_length=1000)
    plans: dict[Name, Plan] = Field(max_length=1000)
    published: Distinct[Claim] = ()
