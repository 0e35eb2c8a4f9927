"""How to train: the settings of the loop, free of torch, so that tracks check them as they load."""

from typing import Annotated, Literal

from pydantic import Field

from prunebench.records.strict import Strict

Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=1e-8, le=1)]
Batch = Annotated[int, Field(ge=1, le=1_000_000)]


class Settings(Strict):
    """Settings of one training.

    Attributes:
        batch: images of a step.
        learning_rate: of AdamW.
        muon_learning_rate: of Muon (Jordan et al. 2024), which takes the prunable matrices where
            this is not 0.
        ema: decay of the averaged weights, which are kept; 0 keeps the last ones.
        warmup: share of the steps with rising learning rate; a cosine to 0 after it.
        class_dropout: share of classes or prompts replaced by none.
        precision: "bf16": autocast forward and loss; weights stay fp32.
        activation_checkpointing: blocks' activations are computed again, not kept.
    """

    batch: Batch
    learning_rate: Rate
    muon_learning_rate: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=10)
    ema: Share = 0.0
    warmup: Share = 0.0
    clip_norm: float = Field(1.0, gt=0, le=1_000_000)
    class_dropout: Share = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
