"""Text encoders of a track's own: a pipeline's folder that `TextEncoder` reads, without downloads.

Text networks with seeded random weights, and tokenizers that know the captions' words.
Random features suffice to tell captions apart, which is all that a frozen encoder is there for;
that it brings unseen captions near to known ones can't be expected.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

BEGIN, END, OTHER = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def write(
    folder: Path,
    captions: Sequence[str],
    *,
    seed: int,
    width: int,
    layers: int,
    heads: int,
    tokens: int,
    pipeline: str = "StableDiffusionPipeline",
) -> tuple[list[Path], int]:
    """Make the text encoders of a pipeline for captions of at most `tokens` words, ends included.

    Args:
        width: of each encoder's tokens, and of the pooled text of SDXL and FLUX.
        pipeline: a key of `text_encoder.PIPELINES`: SDXL has two CLIPs, FLUX a CLIP and a T5.

    Returns:
        their files, and the number of the networks' parameters.
    """
    words = [OTHER, BEGIN, END, *sorted({w for text in captions for w in text.split()})]
    shape = {"words": len(words), "width": width, "layers": layers, "heads": heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = [_clip(transformers.CLIPTextModel, tokens, **shape)]
        if pipeline == "StableDiffusionXLPipeline":
            networks.append(_clip(transformers.CLIPTextModelWithProjection, tokens, **shape))
        if pipeline == "FluxPipeline":
            networks.append(_t5(**shape))
    names = []
    for number, network in zip(("", "_2"), networks, strict=False):
        network.save_pretrained(folder / f"text_encoder{number}")
        _tokenizer(words, tokens).save_pretrained(folder / f"tokenizer{number}")
        names += [f"text_encoder{number}", f"tokenizer{number}"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    parts = [file for name in names for file in (folder / name).iterdir()]
    count = sum(p.numel() for network in networks for p in network.parameters())
    return [folder / "model_index.json", *sorted(parts)], count


def _clip(kind: type, tokens: int, words: int, width: int, layers: int, heads: int) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokens,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return kind(config)


def _t5(words: int, width: int, layers: int, heads: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        pad_token_id=2,
        eos_token_id=2,
    )
    return transformers.T5EncoderModel(config)


def _tokenizer(words: Sequence[str], tokens: int) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words)}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token=OTHER))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [(mark, vocabulary[mark]) for mark in (BEGIN, END)]
    whole.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=marks
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=OTHER,
        model_max_length=tokens,
    )
