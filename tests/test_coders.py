"""A track's own autoencoder and text encoder, and narrow decoders."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import nn

from prunebench import assets, tracks
from prunebench.diffusion import autoencoder, word_encoder
from prunebench.diffusion.autoencoder import Autoencoder
from prunebench.diffusion.narrow_decoder import decoding_by, inputs_of, narrow
from prunebench.diffusion.sampling import to_float
from prunebench.diffusion.text_encoder import TextEncoder
from prunebench.errors import UserError
from prunebench.evaluation.cost import count_parameters
from prunebench.models.configs.conditional_unet import TINY
from prunebench.records import artefacts, sealed
from prunebench.stages import coder as stage
from prunebench.stages import leaderboard
from prunebench.stages.inputs import autoencoder as own_autoencoder
from prunebench.stages.inputs import dataset
from prunebench.stages.sample import IMAGES
from prunebench.tracks.settings_benchmark import OwnAutoencoder
from prunebench.training.autoencoding import Reconstruction, standardise

OWN = {"seed": 0, "images": 160, "batch": 16, "learning_rate": 2e-3, "channels": [4, 8],
       "latent_channels": 2, "groups": 2}  # fmt: skip
WORDS = {"seed": 0, "width": 8, "layers": 1, "heads": 2, "tokens": 8}
DECODER = {"seed": 0, "draws": 40, "images": 80, "batch": 8, "learning_rate": 1e-2}
# Stable Diffusion's autoencoder.
SD = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
      "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
      "layers_per_block": 2, "latent_channels": 4}  # fmt: skip


def _config() -> dict:
    return stage._config(OwnAutoencoder.model_validate_json(json.dumps(OWN)), 1)


def _network() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL.from_config(_config()).eval()


def _images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_standard_latents_decode_to_the_same_images():
    network, images = _network(), _images(40).byte()
    before = network.encode(to_float(images)).latent_dist
    shown = network.decode(before.mean).sample
    standardise(network, images, 16)
    after = network.encode(to_float(images)).latent_dist
    torch.testing.assert_close(network.decode(after.mean).sample, shown, atol=1e-4, rtol=1e-4)
    drawn = after.mean[None] + after.std[None] * torch.randn(500, *after.mean.shape)
    each = drawn.transpose(0, 2).flatten(1)
    torch.testing.assert_close(each.mean(1), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(each.std(1), torch.ones(2), atol=0.01, rtol=0)


def test_an_autoencoder_learns_pixels_and_a_little_divergence():
    network, images = _network(), to_float(_images(4).byte())
    with torch.random.fork_rng():
        loss = Reconstruction(network, 0.0)(images)
        torch.manual_seed(1)
        plain = Reconstruction(network, 0.0)(images)
        torch.manual_seed(1)
        both = Reconstruction(network, 0.5)(images)
    assert loss.shape == (4,)
    posterior = network.encode(images).latent_dist
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    own = torch.distributions.Normal(posterior.mean, posterior.std)
    divergence = torch.distributions.kl_divergence(own, normal).flatten(1).mean(1)
    torch.testing.assert_close(both - plain, 0.5 * divergence, atol=1e-4, rtol=1e-4)


def test_a_text_encoder_of_its_own_tells_captions_apart(tmp_path):
    captions = assets.data_set("fashion_mnist_16").captions
    files, count = word_encoder.write(tmp_path / "a", captions, **WORDS)
    again, _ = word_encoder.write(tmp_path / "b", captions, **WORDS)
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]
    other, _ = word_encoder.write(tmp_path / "c", captions, **{**WORDS, "seed": 1})
    assert [f.read_bytes() for f in files] != [f.read_bytes() for f in other]
    coder = TextEncoder(tmp_path / "a", 12, 16, 8)
    assert count == sum(map(count_parameters, coder.encoders.values()))
    found = coder.encode(["", *captions, "a photo of a cloud"])["context"]
    assert found.shape == (12, 8, WORDS["width"])
    between = torch.cdist(found.flatten(1), found.flatten(1)) + torch.eye(12)
    assert between.min() > 0.1


def test_a_half_decoder_of_stable_diffusion_has_a_quarter_of_its_parameters():
    with init_empty_weights(include_buffers=False):
        whole = AutoencoderKL.from_config(SD).decoder
        half = narrow(SD, 0.5)
        vq = narrow(autoencoder.VQ_F4, 0.5)
    assert count_parameters(whole) == 49_490_179  # counted by hand from diffusers' layers
    assert count_parameters(half) == 12_387_459
    widths = {
        name: (module.out_channels, half.get_submodule(name).out_channels)
        for name, module in whole.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert widths.pop("conv_out") == (3, 3)
    assert all(all_ == 2 * kept for all_, kept in widths.values())
    assert vq.conv_in.out_channels == 256
    with pytest.raises(UserError, match=r"leaves \[38, 77, 154, 154\] channels.* 32 groups"):
        narrow(SD, 0.3)


def test_what_the_decoder_reads_is_what_it_is_called_with(tmp_path):
    network = _network()
    artefacts.write_json(tmp_path / "config.json", _config())
    artefacts.write_tensors(tmp_path / autoencoder.WEIGHTS, network.state_dict())
    coder = Autoencoder(tmp_path, 0.5, 4, shift=0.1)
    drawn = torch.randn(6, 2, 8, 8)
    own = coder.module.decoder
    torch.testing.assert_close(own(inputs_of(coder, drawn)), coder.decode(drawn))
    assert coder.module.decoder is own
    with decoding_by(coder, _network().decoder):  # the same weights
        torch.testing.assert_close(own(inputs_of(coder, drawn)), coder.decode(drawn))


@pytest.fixture
def track() -> tracks.Track:
    """The smoke track with one model: text to image on latents, all of it made by the track."""
    content = tiny.plain(tiny.smoke())
    content["autoencoders"] = {"small": {"own": OWN, "scale": 1.0, "batch": 20}}
    content["text_encoders"] = {"words": {"own": WORDS, "batch": 10}}
    config = {k: v for k, v in TINY["ldm"].config.items() if k != "classes"}
    model = content["models"]["dit"] | {
        "family": "conditional_unet",
        "config": config | {"in_channels": 2, "out_channels": 2},
        "autoencoder": "small",
        "decoder": DECODER,
        "text_encoder": "words",
    }
    model["training"]["class_dropout"] = 0.1
    model["sampling"]["guidance"] = 1.5
    content["models"] = {"text": model}
    content["seeds"] = [0]
    content["oracle"] = None
    content["divisions"] = {"matched": {"compares": "selections", "recoveries": ["none"]}}
    return tiny.track("own", content, tiny.smoke().methods)


def test_text_on_latents_runs_through_all_stages_without_downloads(track, tmp_path):
    runs = tmp_path / "runs"
    made = {name: sealed.read(tiny.run("coder", track, runs, coder=name)) for name in OWNED}
    assert made["small"].psnr > 5 and made["small"].budget.student_backward == OWN["images"]
    assert made["words"].loss is None and "tokenizer/tokenizer.json" in made["words"].files
    tiny.run("extractor", track, runs)
    for name, count in OWNED.items():
        record = sealed.read(tiny.run("encode", track, runs, coder=name))
        assert record.count == count
        assert sealed.made_from(coder=made[name]).items() <= record.inputs.items()
    tiny.run("dense", track, runs, model="text")
    whole = track.cell("text", "dense", 0.0, "none", 0)
    paths = tiny.run_stages(track, runs, whole)
    scored = tiny.run("score", track, runs, whole)
    drawn = artefacts.read_tensors(Path(paths.sample).with_name(IMAGES))
    assert drawn["labels"].tolist() == [i % 10 for i in range(40)]
    record = sealed.read(tiny.run("decoder", track, runs, model="text"))
    _assert_half(track, runs, record, sealed.read(scored))
    tiny.run("select", track, runs, track.cell("text", "random_layers", 0.25, "none", 0))
    leaderboard.leaderboard(tiny.job("leaderboard", track, runs, partial=True))
    board = runs / "own/leaderboard/matched"
    assert "| text | 0 | 50% |" in (board / "decoders.md").read_text()
    assert (board / "raw/text/decoder.json").exists()


OWNED = {"small": 1000, "words": 21}  # what is encoded: images; ten captions twice, and nothing


def _assert_half(track, runs, record, scored):
    """The decoder's record holds what can be had in another way."""
    coder = own_autoencoder(tiny.job("decoder", track, runs, model="text"), "small")
    assert record.whole_parameters == count_parameters(coder.module.decoder)
    assert record.whole_fid == scored.quality["fid"]  # the same images
    assert 0 < record.psnr.value < 60 and record.samples == 40
    half = narrow(coder.config, 0.5)
    file = runs / "own/text/decoder/decoder.safetensors"
    half.load_state_dict(artefacts.read_tensors(file))
    assert record.parameters == count_parameters(half) < record.whole_parameters / 2


def test_a_track_says_what_of_its_own_coders_is_wrong(track, tmp_path):
    assert dataset(tiny.job("dense", track, tmp_path, model="text")).train_captions[4] == (
        "a photo of a coat"
    )
    wrong = tiny.plain(track)
    wrong["text_encoders"]["words"]["own"]["tokens"] = 5
    short = tiny.track("own", wrong, track.methods)
    with pytest.raises(UserError, match=r"text_encoders\.words\.own\.tokens: 5, but .* takes 8"):
        tiny.run("coder", short, tmp_path, coder="words")
