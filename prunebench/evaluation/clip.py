"""CLIP score: how well images show their prompts (Hessel et al., arXiv 2104.08718).

The mean cosine between CLIP's embeddings of image and prompt, neither clipped at zero nor scaled,
as BK-SDM, SnapFusion and EcoDiff print it. Scores of different CLIPs can't be compared.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchvision.transforms.functional import InterpolationMode, normalize, resize

from prunebench.records.artefacts import read_json


@torch.no_grad()
def clip_score(
    folder: Path,
    images: Tensor,
    prompts: Sequence[str],
    batch: int,
    device: torch.device | str = "cpu",
) -> float:
    """Mean cosine of square uint8 images [N, 3, R, R] and their N prompts.

    Args:
        folder: a CLIPModel of transformers, with its tokenizer and preprocessor_config.json.

    Raises:
        UserError: the folder holds no CLIP that can be read.
    """
    from transformers import CLIPModel  # seconds, and few tracks need it

    from prunebench.diffusion.text_encoder import pretrained, tokenizer_of

    scaling = read_json(folder / "preprocessor_config.json")
    model, tokenizer = pretrained(CLIPModel, folder, "CLIP").to(device), tokenizer_of(folder)
    side, found = model.config.vision_config.image_size, []
    for start in range(0, len(images), batch):
        shown = resize(images[start : start + batch], [side, side], InterpolationMode.BICUBIC)
        pixels = normalize(shown.float() / 255, scaling["image_mean"], scaling["image_std"])
        words = tokenizer(
            list(prompts[start : start + batch]),
            padding="max_length",
            max_length=model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        outputs = model(pixel_values=pixels.to(device), **words.to(device))
        found.append(cosine_similarity(outputs.image_embeds, outputs.text_embeds).double().cpu())
    return torch.cat(found).mean().item()
