"""Frozen text encoders of released pipelines, in diffusers' layout: prompts -> conditions.

What each pipeline makes of a prompt follows diffusers' own, which the releases are sampled with.
Prompts go through in batches of one fixed size, so that none depends on what comes with it.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from prunebench.errors import UserError
from prunebench.records.artefacts import read_json, sha256

ENCODERS = {
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
    "T5EncoderModel": transformers.T5EncoderModel,
}


class TextEncoder:
    """The text encoders of a pipeline.

    Args:
        place: its folder, with model_index.json, tokenizer(_2) and text_encoder(_2).
        batch: prompts that go through at once.
        side: of the images in pixels, which SDXL is told.
        tokens: T5's, for FLUX.
        device: where they do.

    Raises:
        UserError: the pipeline is of no known class.
    """

    def __init__(
        self,
        place: Path,
        batch: int,
        side: int,
        tokens: int,
        device: torch.device | str = "cpu",
    ):
        self.place, self.batch, self.side = Path(place), batch, side
        self.tokens, self.device = tokens, device
        self.config = read_json(self.place / "model_index.json")
        if self.config.get("_class_name") not in PIPELINES:
            raise UserError(
                f"{self.place / 'model_index.json'}: pipeline '{self.config.get('_class_name')}'; "
                f"known: {', '.join(PIPELINES)}"
            )

    def sha256(self) -> dict[str, str]:
        """Hashes of the weights' and the tokenisers' files."""
        files = [f for name in self._folders() for f in (self.place / name).iterdir()]
        return {str(f.relative_to(self.place)): sha256(f) for f in sorted(files)}

    def _folders(self) -> list[str]:
        wanted = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
        return [name for name in wanted if (self.place / name).is_dir()]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the network takes for prompts (at most `batch`), float32 [N, ...]."""
        full = [*prompts, *[""] * (self.batch - len(prompts))]
        encoded = PIPELINES[self.config["_class_name"]](self, full)
        return {name: value[: len(prompts)].float().cpu() for name, value in encoded.items()}

    @functools.cached_property
    def encoders(self) -> dict[str, nn.Module]:
        """The encoders by folder; read strictly."""
        return {name: self._encoder(name) for name in self._folders() if "encoder" in name}

    def _encoder(self, name: str) -> nn.Module:
        folder = self.place / name
        kind = (read_json(folder / "config.json").get("architectures") or ["?"])[0]
        if kind not in ENCODERS:
            raise UserError(f"{folder}: text encoder '{kind}'; known: {', '.join(ENCODERS)}")
        return pretrained(ENCODERS[kind], folder, "text encoder").to(self.device)

    @functools.cached_property
    def tokenizers(self) -> dict[str, object]:
        names = [name for name in self._folders() if name.startswith("tokenizer")]
        return {name: tokenizer_of(self.place / name) for name in names}

    def run(self, number: str, prompts: Sequence[str], tokens: int | None = None) -> object:
        """What an encoder ("" or "_2") returns for its tokens of prompts, cut or filled up."""
        tokenizer = self.tokenizers[f"tokenizer{number}"]
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokens or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        encoder = self.encoders[f"text_encoder{number}"]
        return encoder(ids.to(self.device), output_hidden_states=True)


def pretrained(kind: type, folder: Path, what: str) -> nn.Module:
    """A model of transformers, frozen and in single precision; a missing key is a UserError."""
    try:
        module, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: no {what} can be read from it: {error}") from error
    if report["missing_keys"]:
        raise UserError(f"{folder}: the key '{min(report['missing_keys'])}' is missing")
    return module.eval().requires_grad_(False)


def tokenizer_of(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer whose files lie in a folder; UserError where there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be read from it: {error}") from error


def _stable_diffusion(coder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"context": coder.run("", prompts).last_hidden_state}


def _sdxl(coder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Both encoders' last but one states, the second's pooled text, and sizes without a crop."""
    first, second = coder.run("", prompts), coder.run("_2", prompts)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = second.text_embeds
    if coder.config.get("force_zeros_for_empty_prompt", True):
        asked = torch.tensor([prompt != "" for prompt in prompts], device=pooled.device)
        context, pooled = context * asked.view(-1, 1, 1), pooled * asked.view(-1, 1)
    sizes = [coder.side, coder.side, 0, 0, coder.side, coder.side]
    return {
        "context": context,
        "pooled": pooled,
        "sizes": torch.tensor(sizes).expand(len(prompts), -1),
    }


def _flux(coder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """T5's tokens and CLIP's pooled text."""
    context = coder.run("_2", prompts, coder.tokens).last_hidden_state
    return {"context": context, "pooled": coder.run("", prompts).pooler_output}


PIPELINES: dict[str, Callable[[TextEncoder, Sequence[str]], dict[str, Tensor]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
    "FluxPipeline": _flux,
}
