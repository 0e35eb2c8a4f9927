"""A text encoder of a track's own: a pipeline's folder that `TextEncoder` reads, without downloads.

CLIP's text network with seeded random weights, and a tokenizer that knows the captions' words.
Random features suffice to tell captions apart, which is all that a frozen encoder is there for;
that it brings unseen captions near to known ones can't be expected.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
) -> tuple[list[Path], int]:
    """Make a text encoder for captions of at most `tokens` words, begin and end included.

    Returns:
        its files, and the number of the network's parameters.
    """
    words = [OTHER, BEGIN, END, *sorted({w for text in captions for w in text.split()})]
    _tokenizer(words, tokens).save_pretrained(folder / "tokenizer")
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokens,
        projection_dim=width,
        **marks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.CLIPTextModel(config)
    network.save_pretrained(folder / "text_encoder")
    kind = {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(kind))
    parts = [file for name in ("tokenizer", "text_encoder") for file in (folder / name).iterdir()]
    count = sum(parameter.numel() for parameter in network.parameters())
    return [folder / "model_index.json", *sorted(parts)], count


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
