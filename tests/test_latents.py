"""Latent models: encoding once, training on what was encoded, images decoded for scoring."""

import itertools
import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunebench import tracks
from prunebench.diffusion import autoencoder
from prunebench.diffusion.autoencoder import WEIGHTS, Autoencoder
from prunebench.errors import CellError, UserError
from prunebench.models.unet import EARLY
from prunebench.records import artefacts, sealed
from prunebench.stages import dense as stage
from prunebench.stages.inputs import dataset, training_data
from prunebench.stages.sample import IMAGES
from prunebench.training import latents, rows

SMOKE = tiny.smoke()
SCALE, BATCH = 0.5, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random autoencoder of grey images that halves the side, in diffusers' layout."""
    place = tmp_path_factory.mktemp("autoencoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        coder = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            latent_channels=2,
            norm_num_groups=2,
        )
        for parameter in coder.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    coder.save_pretrained(place)
    return place


def _coder(folder: Path, batch: int = BATCH) -> Autoencoder:
    return Autoencoder(folder, SCALE, batch)


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 16, 16), generator=generator).byte()


def _encode(target: Path, folder: Path, images, flip: bool = True, part: int = 16, **identity):
    labels = torch.arange(len(images))
    return latents.encode(target, images, labels, _coder(folder), flip, identity, part)


# The autoencoder.


@torch.no_grad()
def test_an_autoencoder_is_the_one_that_was_saved(folder):
    theirs, images = AutoencoderKL.from_pretrained(folder).eval(), _images(BATCH)
    posterior = theirs.encode(images.float() / 127.5 - 1).latent_dist
    mean, deviation = _coder(folder).moments(images).unbind(1)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(deviation, posterior.std)
    torch.testing.assert_close(_coder(folder).decode(mean * SCALE), theirs.decode(mean).sample)
    assert _coder(folder).latent_shape((1, 16, 16)) == (2, 8, 8) == mean.shape[1:]


@torch.no_grad()
def test_the_first_stage_of_an_ldm_is_read_under_its_official_names(tmp_path, monkeypatch):
    small = {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "num_vq_embeddings": 16}
    monkeypatch.setattr(autoencoder, "VQ_F4", {**autoencoder.VQ_F4, **small})
    theirs = VQModel.from_config(autoencoder.VQ_F4).eval()
    own = theirs.state_dict()
    names = autoencoder.COMPVIS.names(theirs, ())
    stored = {  # attention is stored as 1x1 convolutions
        names[name]: tensor[:, :, None, None] if ".to_" in name and tensor.dim() == 2 else tensor
        for name, tensor in own.items()
    }
    again = convert_ldm_vae_checkpoint(stored, autoencoder.VQ_F4)  # diffusers' own conversion
    assert again.keys() == own.keys() - {"quantize.embedding.weight"}
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.items())
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {**stored, "model.diffusion_model.x": torch.zeros(1)}}, file)
    coder, images = Autoencoder(file, 1.0, 2), torch.randint(0, 256, (2, 3, 16, 16)).byte()
    mean, deviation = coder.moments(images).unbind(1)
    assert mean.shape[1:] == coder.latent_shape((3, 16, 16)) == (3, 4, 4)
    torch.testing.assert_close(mean, theirs.encode(images.float() / 127.5 - 1).latents)
    assert not deviation.any()
    torch.testing.assert_close(coder.decode(mean), theirs.decode(mean).sample)


def test_ldms_first_stage_has_its_published_size():
    with torch.device("meta"):
        module = VQModel.from_config(autoencoder.VQ_F4)
    assert sum(p.numel() for p in module.parameters()) == 55_322_782


def test_what_comes_with_an_image_changes_no_bit_of_it(folder):
    images, coder = _images(BATCH), _coder(folder)
    assert torch.equal(coder.moments(images[:3]), coder.moments(images)[:3])
    z = torch.randn(11, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coder.decode(z)[:5], coder.decode(z[:5]))
    assert torch.equal(coder.decode(z)[8:], coder.decode(z[8:]))


def _changed(folder: Path, target: Path, change) -> Path:
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / WEIGHTS)
    save_file(change(state), target / WEIGHTS)
    return target


def test_the_attention_names_of_the_published_files_are_read(folder, tmp_path):
    def early(state):
        for own, official in EARLY.items():
            state = {name.replace(own, official): tensor for name, tensor in state.items()}
        return state

    old = _changed(folder, tmp_path / "old", early)
    assert any(".query." in name for name in load_file(old / WEIGHTS))
    assert torch.equal(_coder(old).moments(_images(2)), _coder(folder).moments(_images(2)))


def test_a_wrong_autoencoder_names_its_first_wrong_key(folder, tmp_path):
    less = _changed(
        folder, tmp_path / "less", lambda s: {k: v for k, v in s.items() if k != "quant_conv.bias"}
    )
    with pytest.raises(UserError, match=r"'quant_conv\.bias' is missing"):
        _ = _coder(less).module
    more = _changed(folder, tmp_path / "more", lambda s: {**s, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match="'extra' is unexpected"):
        _ = _coder(more).module
    (more / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="autoencoder 'UNet2DModel'; known: AutoencoderKL"):
        _coder(more)
    with pytest.raises(UserError, match="no autoencoder of images 3x16x16"):
        _coder(folder).latent_shape((3, 16, 16))


# Encoding and drawing.


def test_draws_are_scaled_samples_of_the_posterior_and_of_both_views(folder, tmp_path):
    images, coder = _images(20), _coder(folder)
    _encode(tmp_path / "z", folder, images)
    encoded = latents.Latents(tmp_path / "z", SCALE)
    assert len(encoded) == 20 and encoded.labels.tolist() == list(range(20))
    views = torch.stack([coder.moments(images[:1]), coder.moments(images[:1].flip(-1))], 1)
    stored = views.half().float()[0]
    assert torch.equal(encoded[0], stored[0, 0] * SCALE)
    assert not torch.allclose(stored[0], stored[1].flip(-1), atol=1e-3)
    drawn = encoded.draw(torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    expected = stored[:, 0].mean(0) * SCALE
    variance = (stored[:, 1].square().mean(0) + stored[:, 0].var(0, unbiased=False)) * SCALE**2
    error = (drawn.mean(0) - expected).abs() / (variance / 4000).sqrt()
    assert error.max() < 5
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=0)
    again = encoded.draw(torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


class _KilledError(Exception):
    pass


class _Counting(Autoencoder):
    """An autoencoder that notes its batches; one beyond `most` fails, as a killed job would."""

    most = 10**9

    def moments(self, images: Tensor) -> Tensor:
        if len(self.batches) == self.most:
            raise _KilledError
        self.batches.append(images)
        return super().moments(images)


def _encoded_batches(target: Path, folder: Path, images, most: int = 10**9, **identity) -> int:
    """Encode, in two batches a part and without flips; how many batches that took."""
    coder = _Counting(folder, SCALE, BATCH)
    coder.batches, coder.most = [], most
    labels = torch.arange(len(images))
    latents.encode(target, images, labels, coder, False, identity, 2 * BATCH)
    return len(coder.batches)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_encoding_goes_on_with_the_part_it_was_at(folder, tmp_path):
    whole, target = _images(44), tmp_path / "z"
    assert _encoded_batches(tmp_path / "whole", folder, whole) == 6
    with pytest.raises(_KilledError):
        _encoded_batches(target, folder, whole, 5)  # dies in the third part
    assert not (target / rows.INDEX).exists()
    assert _encoded_batches(target, folder, whole) == 2
    assert _bytes(target) == _bytes(tmp_path / "whole")
    assert _encoded_batches(target, folder, whole) == 0
    assert _encoded_batches(target, folder, whole, weights="others") == 6


def test_an_encoding_does_not_go_on_over_other_data(folder, tmp_path):
    """Else rows shift against their labels: [0, 1, 4, 5] where the first image is gone."""
    whole, target = _images(48), tmp_path / "z"
    with pytest.raises(_KilledError):
        _encoded_batches(target, folder, whole, 4)  # two parts of three are there
    changed = torch.cat([whole[1:], whole[:1]])
    assert _encoded_batches(target, folder, changed) == 6
    _encoded_batches(tmp_path / "fresh", folder, changed)
    assert _bytes(target) == _bytes(tmp_path / "fresh")
    late = changed.clone()
    late[40] += 1
    assert _encoded_batches(target, folder, late) == 2


def test_a_corrupt_part_is_found_when_it_is_drawn_and_mended_alone(folder, tmp_path):
    whole = _images(40)
    _encode(tmp_path, folder, whole)
    before, part = _bytes(tmp_path), rows.part_file(tmp_path, latents.STEM, 1)
    content = bytearray(part.read_bytes())
    content[-33] ^= 1  # the last image of the second part, before the 32 bytes of its source
    part.write_bytes(content)
    encoded = latents.Latents(tmp_path, SCALE)
    encoded.draw(torch.arange(16), torch.Generator())
    with pytest.raises(UserError, match=r"moments00001\.safetensors is corrupt \(row"):
        encoded.draw(torch.arange(16, 32), torch.Generator())
    _encode(tmp_path, folder, whole)
    assert _bytes(tmp_path) == before
    part.unlink()
    with pytest.raises(UserError, match=r"moments00001\.safetensors is missing; delete it"):
        latents.Latents(tmp_path, SCALE).draw(torch.tensor([20]), torch.Generator())
    part.write_bytes(before[part.name][:100])
    with pytest.raises(UserError, match=r"moments00001\.safetensors is corrupt"):
        latents.Latents(tmp_path, SCALE).draw(torch.tensor([20]), torch.Generator())


def test_latents_that_are_not_finite_are_refused(folder, tmp_path):
    def broken(state):
        return {name: tensor * torch.inf for name, tensor in state.items()}

    with pytest.raises(UserError, match="latents from image 0 on are not finite"):
        _encode(tmp_path / "z", _changed(folder, tmp_path / "inf", broken), _images(4))


def _resident_kb() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])


def test_memory_does_not_grow_with_the_latents(folder, tmp_path):
    count = 4096  # 64 MB of moments
    moments = torch.zeros(count, 1, 2, 4, 32, 32, dtype=torch.float16)
    checks = torch.full((count,), rows.check({"moments": moments[0]}))
    artefacts.write_tensors(
        rows.part_file(tmp_path, latents.STEM, 0), {"moments": moments, "checks": checks}
    )
    index = {"labels": torch.zeros(count).long(), "checks": checks, "part": torch.tensor(count)}
    artefacts.write_tensors(tmp_path / rows.INDEX, index)
    del moments
    encoded, generator = latents.Latents(tmp_path, 1.0), torch.Generator()
    encoded.draw(torch.arange(64), generator)
    before = _resident_kb()
    for start in range(0, count, 64):
        encoded.draw(torch.arange(start, start + 64), generator)
    assert _resident_kb() - before < 16_000


# The stages.


@pytest.fixture
def track(folder) -> tracks.Track:
    """The smoke track's transformer on latents 2x8x8 of 60 images."""
    content = tiny.plain(SMOKE)
    content["dataset"] |= {"limit_train": 60, "limit_reference": 60, "flip": True}
    content["autoencoders"] = {"tiny": {"folder": str(folder), "scale": SCALE, "batch": BATCH}}
    model = content["models"]["dit"]
    model["config"] |= {"resolution": 8, "channels": 2}
    model["training"] |= {"images": 32}
    content["models"] = {"dit": {**model, "autoencoder": "tiny"}}
    content["sampling"] |= {"count": 34, "lanes": 10, "batch": 20}
    return tiny.track("tiny", content, SMOKE.methods)


def _with(track: tracks.Track, shards: int) -> tracks.Track:
    content = tiny.plain(track)
    content["sampling"]["shards"] = shards
    return tiny.track(track.name, content, track.methods)


def test_a_latent_track_runs_through_all_stages(track, tmp_path):
    with pytest.raises(UserError, match=r"encode\.json does not exist"):
        tiny.run("dense", track, tmp_path, model="dit")
    tiny.run("extractor", track, tmp_path)
    record = sealed.read(tiny.run("encode", track, tmp_path, coder="tiny"))
    assert record.count == 60 and list(record.files) == [rows.INDEX]
    tiny.run("dense", track, tmp_path, model="dit")
    dense = track.cell("dit", "dense", 0.0, "none", 0)
    cell = track.cell("dit", "random_layers", 0.25, "finetune-low", 0)
    for one in (dense, cell):
        paths = tiny.run_stages(track, tmp_path, one)
    scored = sealed.read(tiny.run("score", track, tmp_path, cell))
    assert scored.status == "ok" and scored.samples == 34
    assert scored.settings["autoencoder"]["scale"] == SCALE
    drawn = artefacts.read_tensors(Path(paths.sample).parent / IMAGES)["images"]
    assert drawn.shape == (34, 1, 16, 16) and drawn.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in drawn}) == 34
    for shards, batch in itertools.product((1, 2, 4), (1, 13)):
        split = _with(track, shards)
        for index in range(shards if shards > 1 else 0):
            tiny.run("shard", split, tmp_path, cell, shard=index, batch=batch)
        tiny.run("sample", split, tmp_path, cell, batch=batch)
        again = artefacts.read_tensors(Path(paths.sample).parent / IMAGES)["images"]
        assert torch.equal(again, drawn)
    _assert_held_to_its_autoencoder(track, tmp_path, cell)


def _assert_held_to_its_autoencoder(track: tracks.Track, runs: Path, cell: tracks.Cell) -> None:
    """Its files are those that encoded what the model trained on, or nothing is decoded by them."""
    folder = Path(track.coder("tiny")[1].folder)
    for file in (folder / "config.json", folder / WEIGHTS):
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        try:
            for stage_name in ("cost", "sample"):
                with pytest.raises(UserError, match=f"{folder} is not the autoencoder that"):
                    tiny.run(stage_name, track, runs, cell)
        finally:
            file.write_bytes(before)
    sampled = sealed.read(tracks.Paths(track, cell, runs).sample)
    assert {name for name in sampled.inputs if name.startswith("autoencoder/")} == {
        "autoencoder/config.json", f"autoencoder/{WEIGHTS}"}  # fmt: skip


def test_latent_training_data_are_latents(track, tmp_path):
    record = tiny.run("encode", track, tmp_path, coder="tiny")
    job = tiny.job("dense", track, tmp_path, model="dit")
    data = training_data(job)
    batch = data.draw(6, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert batch.x0.shape == batch.noised.shape == (6, 2, 8, 8) and batch.y.shape == (6,)
    assert torch.equal(data.labels, dataset(job).train_labels)
    record.with_name(rows.INDEX).write_bytes(b"")
    with pytest.raises(UserError, match=r"index\.safetensors is corrupt"):
        training_data(job)


def test_a_training_does_not_go_on_with_other_latents(track, tmp_path, monkeypatch):
    inputs = []

    def begun(*_, checkpoints, **__):
        inputs.append(checkpoints.identity["inputs"])
        raise CellError("killed")

    monkeypatch.setattr(stage.loop, "train", begun)
    for scale in (SCALE, 2 * SCALE):
        content = tiny.plain(track)
        content["autoencoders"]["tiny"]["scale"] = scale
        track = tiny.track(track.name, content, track.methods)
        record = tiny.run("encode", track, tmp_path, coder="tiny")
        for _ in range(2):
            with pytest.raises(UserError, match="killed"):
                tiny.run("dense", track, tmp_path, model="dit")
    assert inputs[0] == inputs[1] != inputs[2] == inputs[3]
    assert [*inputs[0]] == [str(record)]


# Tracks.


def test_what_a_track_says_of_autoencoders_is_checked(tmp_path):
    def loaded(change) -> tracks.Track:
        content = tiny.plain(SMOKE)
        content["methods"]["folders"] = [str(tiny.ROOT / "methods")]
        change(content)
        file = tmp_path / "mine.yaml"
        file.write_text(json.dumps(content))
        return tracks.load(str(file))

    entry = {"asset": "sd_vae_ft_ema", "scale": 0.18215, "batch": 4}

    def good(content):
        content["autoencoders"] = {"sd": entry}
        content["models"]["dit"]["autoencoder"] = "sd"

    def unknown(content):
        content["models"]["dit"]["autoencoder"] = "sd"

    def neither(content):
        content["autoencoders"] = {"sd": {"scale": 1, "batch": 1}}

    def reads(content):
        content["text_encoders"] = {"sd": {"asset": "sd15", "batch": 4}}
        content["models"]["unet"]["config"].pop("classes", None)
        content["models"]["unet"]["text_encoder"] = "sd"

    def variance(content):
        learned = {"variance_type": "learned_range"}
        content["models"]["dit"]["sampling"] = {"sampler": "ddpm", "steps": 4, "options": learned}

    track = loaded(good)
    assert "sd_vae_ft_ema" in track.assets()
    prints = [track.fingerprint("sample", model=model) for model in ("dit", "sit")]
    entry["scale"] = 0.2
    other = loaded(good)
    assert other.fingerprint("sample", model="dit") != prints[0]
    with pytest.raises(UserError, match="unknown coder 'none' in track mine; known: sd"):
        track.coder("none")
    for change, words in (
        (
            unknown,
            r"models\.dit\.autoencoder: unknown autoencoder 'sd' in autoencoders; known: none",
        ),
        (neither, r"autoencoders\.sd: needs either the key 'asset' or 'folder' or 'own'"),
        (reads, r"models\.unet\.text_encoder: the network reads no text"),
        (
            variance,
            r"models\.dit\.sampling\.options\.variance_type: the model predicts no variance",
        ),
    ):
        with pytest.raises(UserError, match=words):
            loaded(change)
