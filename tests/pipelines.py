"""Tiny random pipelines in diffusers' layout: autoencoder, tokenizers and text encoders."""

import json
import string
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL

WIDTH, TOKENS = 8, 12
_LETTERS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
VOCABULARY = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *_LETTERS])}
_TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "intermediate_size": 16,
         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": TOKENS,
         "projection_dim": WIDTH, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": 1}  # fmt: skip
_T5 = {"vocab_size": len(VOCABULARY), "d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2,
       "num_heads": 2, "pad_token_id": 1, "eos_token_id": 1}  # fmt: skip
PARTS = {
    "StableDiffusionPipeline": ["CLIPTextModel"],
    "StableDiffusionXLPipeline": ["CLIPTextModel", "CLIPTextModelWithProjection"],
    "FluxPipeline": ["CLIPTextModel", "T5EncoderModel"],
}


def write_tokenizer(folder: Path) -> None:
    """CLIP's, with letters for tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = {"bos_token": "<|startoftext|>"}
    marks |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **marks}
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _random(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def write(folder: Path, kind: str) -> Path:
    """A pipeline of a class of PARTS; returns its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, suffix in zip(PARTS[kind], ("", "_2"), strict=False):
            if name == "T5EncoderModel":
                encoder = transformers.T5EncoderModel(transformers.T5Config(**_T5))
            else:
                encoder = getattr(transformers, name)(transformers.CLIPTextConfig(**_TEXT))
            _random(encoder).save_pretrained(folder / f"text_encoder{suffix}")
            write_tokenizer(folder / f"tokenizer{suffix}")
        coder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            latent_channels=2,
            norm_num_groups=2,
        )
        _random(coder).save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def write_clip(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sees = {"image_size": 8, "patch_size": 4, "hidden_size": WIDTH, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
        config = transformers.CLIPConfig(
            text_config=_TEXT, vision_config=sees, projection_dim=WIDTH
        )
        _random(transformers.CLIPModel(config)).save_pretrained(folder)
    write_tokenizer(folder)
    scaling = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling))
    return folder
