"""Text-to-image: captions encoded once, then every stage, with tiny random text encoders."""

import copy
import dataclasses
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pipelines
import pytest
import tiny
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from prunebench import assets, models, tracks
from prunebench.assets import datasets, npz, registry, store
from prunebench.diffusion.text_encoder import TextEncoder
from prunebench.errors import UserError
from prunebench.evaluation.clip import clip_score
from prunebench.evaluation.metrics import Evidence
from prunebench.pruning import surgery
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Weights
from prunebench.stages import score as stage
from prunebench.stages.inputs import conditions, dataset, sampler_for
from prunebench.stages.sample import IMAGES
from prunebench.training import prompts, rows

TRAIN, ASKED, SIDE, SEEN = 24, 20, 16, 8  # SEEN: the side of references, and of samples
PROMPTS = ["a cat", "two dogs on a bus", "", "rain"]
_UNET = {
    "sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
    "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2,
    "cross_attention_dim": 8, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
_SDXL = {"cross_attention_dim": 16, "addition_embed_type": "text_time",
         "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}  # fmt: skip
_FLUX = {key: value for key, value in tiny.INSTANCES["flux"].config.items() if key != "classes"}
_NOISE = {"name": "noise", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
          "beta_end": 0.012}  # fmt: skip
MODELS = {
    "StableDiffusionPipeline": {
        "family": "conditional_unet", "config": _UNET, "objective": _NOISE,
        "sampling": {"sampler": "pndm", "steps": 3, "guidance": 7.5},
    },
    "StableDiffusionXLPipeline": {
        "family": "conditional_unet", "config": {**_UNET, **_SDXL}, "objective": _NOISE,
        "sampling": {"sampler": "ddim", "steps": 2, "guidance": 5.0},
    },
    "FluxPipeline": {
        "family": "flux", "config": {**_FLUX, "in_channels": 8}, "objective": {"name": "flow"},
        "sampling": {"sampler": "euler", "steps": 2, "options": {"shift": 1.8776}},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(pipelines.PARTS))
def pipeline(request, tmp_path_factory) -> Path:
    return pipelines.write(tmp_path_factory.mktemp("pipeline"), request.param)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    return pipelines.write(tmp_path_factory.mktemp("sd"), "StableDiffusionPipeline")


def _kind(folder: Path) -> str:
    return artefacts.read_json(folder / "model_index.json")["_class_name"]


# Text encoders.


@torch.no_grad()
def test_conditions_are_those_of_the_pipelines(pipeline):
    texts = ["ab cde", "ghi"]
    found = TextEncoder(pipeline, 4, SIDE, pipelines.TOKENS).encode(texts)
    first = _hidden_of(pipeline, "", texts)
    if _kind(pipeline) == "StableDiffusionPipeline":
        expected = {"context": first.last_hidden_state}
    elif _kind(pipeline) == "FluxPipeline":
        second = _hidden_of(pipeline, "_2", texts)
        expected = {"context": second.last_hidden_state, "pooled": first.pooler_output}
    else:
        second = _hidden_of(pipeline, "_2", texts)
        states = [encoder.hidden_states[-2] for encoder in (first, second)]
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2).float()
        expected = {"context": torch.cat(states, -1), "pooled": second.text_embeds, "sizes": sizes}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def _hidden_of(folder: Path, number: str, texts: list[str]):
    name = artefacts.read_json(folder / f"text_encoder{number}/config.json")["architectures"][0]
    encoder = getattr(transformers, name).from_pretrained(folder / f"text_encoder{number}").eval()
    ids = []
    for text in texts:
        tokens = [t for word in text.split() for t in (*word[:-1], f"{word[-1]}</w>")]
        own = [0, *map(pipelines.VOCABULARY.get, tokens), 1]
        ids.append(own + [1] * (pipelines.TOKENS - len(own)))
    return encoder(torch.tensor(ids), output_hidden_states=True)


def test_a_prompt_does_not_depend_on_what_comes_with_it(pipeline):
    coder = TextEncoder(pipeline, 4, SIDE, pipelines.TOKENS)
    whole, alone = coder.encode(PROMPTS), coder.encode(PROMPTS[1:2])
    for name, value in alone.items():
        assert torch.equal(value[0], whole[name][1])
    empty = [whole[name][2] for name in ("context", "pooled") if name in whole]
    zeros = _kind(pipeline) == "StableDiffusionXLPipeline"
    assert all(bool(value.any()) != zeros for value in empty)


def test_text_encoders_that_are_none_are_refused(stable_diffusion, tmp_path):
    def copied(name: str) -> Path:
        return shutil.copytree(stable_diffusion, tmp_path / name)

    other = copied("other")
    (other / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="pipeline 'KandinskyPipeline'; known: StableDiffusion"):
        TextEncoder(other, 4, SIDE, pipelines.TOKENS)
    less = copied("less")
    file = less / "text_encoder" / "model.safetensors"
    state = load_file(file)
    gone = next(name for name in sorted(state) if "final_layer_norm" in name)
    save_file({k: v for k, v in state.items() if k != gone}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder: the key '.*final_layer_norm.*' is missing"):
        TextEncoder(less, 4, SIDE, pipelines.TOKENS).encode(["a"])
    settings = less / "text_encoder" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "architectures": ["GPT"]}))
    with pytest.raises(UserError, match="text encoder 'GPT'; known: CLIPTextModel"):
        TextEncoder(less, 4, SIDE, pipelines.TOKENS).encode(["a"])


# Prompts on disk.


class _KilledError(Exception):
    pass


def test_a_killed_encoding_of_prompts_goes_on(stable_diffusion, tmp_path, monkeypatch):
    told = [f"{'abc'[i % 3]} {'xyz'[i // 3 % 3]}" for i in range(9)], ["one", "two"]

    def encoded(folder: Path, most: int) -> int:
        coder, calls = TextEncoder(stable_diffusion, 2, SIDE, pipelines.TOKENS), []
        own = coder.encode

        def counted(texts):
            if len(calls) == most:
                raise _KilledError
            calls.append(texts)
            return own(texts)

        monkeypatch.setattr(coder, "encode", counted)
        prompts.encode(folder, *told, coder, {"weights": "a"}, part=4)
        return len(calls)

    assert encoded(tmp_path / "whole", 100) == 6
    with pytest.raises(_KilledError):
        encoded(tmp_path / "killed", 3)
    assert encoded(tmp_path / "killed", 100) == 4
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
    trained, asked = (prompts.Prompts(tmp_path / "whole", flag) for flag in (True, False))
    assert (len(trained), len(asked)) == (9, 2)
    coder = TextEncoder(stable_diffusion, 2, SIDE, pipelines.TOKENS)
    for some, texts in ((trained, told[0]), (asked, told[1])):
        expected = coder.encode(texts[:2])["context"].half().float()
        assert torch.equal(some.of(torch.tensor([0, 1]))["context"], expected)
    nothing = asked.nothing(asked.of(torch.tensor([1, 1])), None)["context"]
    assert torch.equal(nothing[1], coder.encode([""])["context"][0].half().float())
    with monkeypatch.context() as patch:  # guidance asks for it at every step: it is kept
        patch.setattr(rows.Rows, "__getitem__", None)
        assert torch.equal(asked.nothing({"context": nothing}, None)["context"], nothing)
    part = rows.part_file(tmp_path / "whole", prompts.STEM, 1)
    content = bytearray(part.read_bytes())
    content[-33] ^= 1  # of its last row; the 32 bytes after it are the hash of its source
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts00001\.safetensors is corrupt \(row"):
        prompts.Prompts(tmp_path / "whole", True).of(torch.arange(9))


# Data sets with captions.


def _jpeg(value: int, size: tuple[int, int] = (640, 480)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (value, 20, 30)).save(content, "JPEG")
    return content.getvalue()


def _coco(folder: Path, compression: int = zipfile.ZIP_STORED) -> list[Path]:
    """COCO 2014 of three training and two validation pictures, two captions each."""
    folder.mkdir(parents=True)
    annotations = folder / "annotations_trainval2014.zip"
    files = [annotations, folder / "train2014.zip", folder / "val2014.zip"]
    with zipfile.ZipFile(annotations, "w") as archive:
        for split, count, file in (("train", 3, files[1]), ("val", 2, files[2])):
            names = {100 - i: f"COCO_{split}2014_{100 - i:012}.jpg" for i in range(count)}
            told = {
                "images": [{"id": i, "file_name": name} for i, name in names.items()],
                "annotations": [
                    {"id": 1000 * turn + i, "image_id": i, "caption": f"{word} {split}\n  {i} é"}
                    for turn, word in ((2, "second"), (1, "first"))
                    for i in names
                ],
            }
            archive.writestr(f"annotations/captions_{split}2014.json", json.dumps(told))
            with zipfile.ZipFile(file, "w", compression) as pictures:
                pictures.writestr(f"{split}2014/", "")
                for i, name in names.items():
                    pictures.writestr(f"{split}2014/{name}", _jpeg(2 * i))
    return files


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


def _placed(mirror: Path, name: str) -> Path:
    place = mirror / "datasets" / f"{name}.npz"
    place.parent.mkdir(exist_ok=True)
    return place


def test_coco_is_an_index_with_the_first_caption_of_every_picture(mirror):
    files, place = _coco(mirror / "coco2014_original"), _placed(mirror, "coco2014")
    datasets.convert("coco", files, place)
    store.note(place, artefacts.sha256(place))
    found = assets.load_dataset("coco2014")
    assert found.train_captions == tuple(f"first train {i} é" for i in (98, 99, 100))
    assert found.reference_captions == tuple(f"first val {i} é" for i in (99, 100))
    assert found.train_labels.tolist() == [0, 1, 2]
    picture = found.train_images[torch.tensor([2])]
    assert picture.shape == (1, 3, 512, 512) and abs(int(picture[0, 0, 0, 0]) - 200) < 4
    seen = list(found.reference_images.split(1))
    assert [part.shape for part in seen] == [(1, 3, 256, 256)] * 2
    assert [abs(int(part[0, 0, 9, 9]) - 2 * i) < 4 for part, i in zip(seen, (99, 100), strict=True)]
    limited = assets.load_dataset("coco2014", limit_reference=1, limit_train=2)
    assert len(limited.reference_images) == len(limited.reference_captions) == 1
    assert len(limited.train_images) == len(limited.train_captions) == 2
    with pytest.raises(UserError, match="is compressed; unpack"):
        datasets.convert("coco", _coco(mirror / "again", zipfile.ZIP_DEFLATED), mirror / "x.npz")


def test_gcc_leaves_out_pictures_that_could_not_be_had(mirror):
    root = mirror / "pictures"
    for folder, numbers in (("train", (0, 2)), ("val", (1,))):
        (root / folder).mkdir(parents=True)
        for number in numbers:
            (root / folder / f"{number}.jpg").write_bytes(_jpeg(50 * number))
    tables = [mirror / name for name in ("train.tsv", "val.tsv", "folder.txt")]
    for table in tables[:2]:  # other characters at which Python splits lines are in captions
        told = f"{table.stem} {{}}\u2028\x1c\x85é\thttp\n"
        table.write_text("".join(told.format(n) for n in range(3)))
    tables[2].write_text(f"{root}\n")
    place = _placed(mirror, "gcc")
    datasets.convert("gcc_folder", tables, place)
    store.note(place, artefacts.sha256(place))
    found = assets.load_dataset("gcc")
    assert found.train_captions == ("train 0\u2028\x1c\x85é", "train 2\u2028\x1c\x85é")
    assert found.reference_captions == ("val 1\u2028\x1c\x85é",)
    assert abs(int(found.train_images[torch.tensor([1])][0, 0, 5, 5]) - 100) < 4
    (root / "val").rename(root / "validation")
    with pytest.raises(UserError, match="pictures/val is no folder"):
        datasets.convert("gcc_folder", tables, place)
    tables[2].write_text("/nowhere")
    with pytest.raises(UserError, match="/nowhere is no folder"):
        datasets.convert("gcc_folder", tables, place)


# The stages.


def _words(count: int, start: int) -> np.ndarray:
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = (
        f"{letters[i % 26]} {letters[i // 26]}{letters[i % 7]}" for i in range(start, start + count)
    )
    return np.array([text.encode() for text in texts])


@pytest.fixture
def track(pipeline, mirror, monkeypatch, tmp_path) -> tracks.Track:
    """The smoke track on tiny captioned images, with a tiny model of the pipeline's kind."""
    return _track(pipeline, mirror, monkeypatch, tmp_path)


def _track(pipeline: Path, mirror: Path, monkeypatch, tmp_path: Path) -> tracks.Track:
    generator, arrays = np.random.default_rng(0), {}
    for split, count, start, side in (("train", TRAIN, 0, SIDE), ("reference", ASKED, 100, SEEN)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 3, side, side), np.uint8)
        arrays |= {f"{split}_labels": np.arange(count), f"{split}_captions": _words(count, start)}
    place = _placed(mirror, "coco2014")
    npz.write_npz(place, arrays)
    store.note(place, artefacts.sha256(place))
    small = dataclasses.replace(registry.ASSETS["coco2014"], shape=(3, SIDE, SIDE))
    monkeypatch.setitem(registry.ASSETS, "coco2014", small)
    model = copy.deepcopy(MODELS[_kind(pipeline)])
    network = models.family(model["family"]).build(model["config"])
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    content = tiny.plain(tiny.smoke())
    content["dataset"] = {"name": "coco2014"}
    entry = {"folder": str(pipeline), "batch": 8}
    content["autoencoders"] = {"tiny": {**entry, "scale": 0.4, "shift": 0.1}}
    content["text_encoders"] = {"tiny_text": {**entry, "tokens": pipelines.TOKENS}}
    recovery = {"batch": 8, "learning_rate": 1e-3, "class_dropout": 0.3}
    model |= {
        "weights": {"file": str(tmp_path / "model.safetensors"), "layout": "suite"},
        "recovery": {**recovery, "activation_checkpointing": True},
        "autoencoder": "tiny",
        "text_encoder": "tiny_text",
    }
    content["models"] = {"tiny": model}
    content["budgets"] = {"low": 16}
    content["sampling"] |= {"count": 24, "lanes": 4, "batch": 20, "size": SEEN}
    return tiny.track("text", content, tiny.smoke().methods)


def _drawn(paths: tracks.Paths) -> dict[str, torch.Tensor]:
    return artefacts.read_tensors(Path(paths.sample).parent / IMAGES)


def test_text_to_image_runs_through_all_stages(track, mirror, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    tiny.run("extractor", track, runs)
    tiny.run("encode", track, runs, coder="tiny")
    record = sealed.read(tiny.run("encode", track, runs, coder="tiny_text"))
    assert record.count == 1 + TRAIN + ASKED
    assert any("tokenizer/vocab.json" in name for name in record.weights.sha256)
    # Nothing after this holds a text encoder.
    monkeypatch.setattr(TextEncoder, "__init__", None)
    tiny.run("dense", track, runs, model="tiny")
    tiny.run_stages(track, runs, track.cell("tiny", "dense", 0.0, "none", 0))
    cell = track.cell("tiny", "random_layers", 0.25, "finetune-low", 0)
    paths = tiny.run_stages(track, runs, cell)
    drawn = _drawn(paths)
    assert drawn["images"].shape == (24, 3, SEEN, SEEN) and drawn["images"].dtype == torch.uint8
    assert drawn["labels"].tolist() == [i % ASKED for i in range(24)]
    assert len({image.numpy().tobytes() for image in drawn["images"]}) == 24
    for shards, batch in ((1, 1), (3, 7)):
        content = tiny.plain(track)
        content["sampling"] |= {"shards": shards}
        split = tiny.track(track.name, content, track.methods)
        where = tracks.Paths(split, cell, runs)
        for index in range(shards if shards > 1 else 0):
            tiny.run("shard", split, runs, cell, shard=index, batch=batch)
            drawn_from = sealed.read(where.shards[index][0]).inputs
            assert sealed.made_from(prompts=record).items() <= drawn_from.items()
        tiny.run("sample", split, runs, cell, batch=batch)
        tiny.assert_same(_drawn(where), drawn)
    scored = sealed.read(tiny.run("score", track, runs, cell))
    assert scored.text_encoder == record.weights.model_copy(update={"place": ""})
    assert scored.clip is None and scored.samples == 24
    assert "names no CLIP" in scored.quality["clip_score"].reason


def test_prompts_decide_what_is_drawn_and_a_clip_scores_it(
    stable_diffusion, mirror, monkeypatch, tmp_path
):
    track = _track(stable_diffusion, mirror, monkeypatch, tmp_path)
    runs, job = tmp_path / "runs", tiny.job("dense", track, tmp_path / "runs", model="tiny")
    with pytest.raises(UserError, match=r"encode\.json does not exist"):
        conditions(job, training=True)
    for coder in ("tiny", "tiny_text"):
        tiny.run("encode", track, runs, coder=coder)
    record = tiny.run("dense", track, runs, model="tiny")
    network, plan = surgery.load(record.parent)
    sampler = sampler_for(job, network, plan)
    images = torch.cat(list(sampler.images(0, 0, 4, 4)))
    told = sampler.conditions.of
    monkeypatch.setattr(sampler.conditions, "of", lambda labels: told(labels.clamp(max=2)))
    other = torch.cat(list(sampler.images(0, 0, 4, 4)))
    assert [torch.equal(a, b) for a, b in zip(images, other, strict=True)] == [True] * 3 + [False]
    # CLIP's: of the images and of exactly their own prompts.
    clip = pipelines.write_clip(tmp_path / "clip")
    content = tiny.plain(track)
    content["evaluation"]["clip"] = "clip_vit_b16"
    track = tiny.track(track.name, content, track.methods)
    monkeypatch.setattr(
        stage, "located", lambda job, name: clip if "clip" in name else store.locate(name)
    )
    drawn = {"images": images, "labels": torch.arange(4)}
    settings = tracks.plain(track.settings.evaluation)
    evidence = Evidence(
        generated={"features": torch.randn(4, 2)},
        reference={"features": torch.randn(4, 2)},
        images=images,
        prompts=stage._prompts(job, drawn["labels"]),
        settings=settings,
        weights=stage._weights(job, settings),
    )
    found = stage._qualities(evidence)
    texts = dataset(job).reference_captions[:4]
    assert found["clip_score"].value == pytest.approx(_by_hand(clip, images, texts), abs=1e-5)
    assert found["clip_score"].value == clip_score(clip, images, texts, 500)
    sha256 = artefacts.sha256(clip / "model.safetensors")
    assert stage._clip(evidence) == Weights(name="clip_vit_b16", sha256=sha256)
    with pytest.raises(UserError, match=r"preprocessor_config\.json does not exist"):
        clip_score(tmp_path, images, texts, 4)
    (clip / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no CLIP can be read"):
        clip_score(clip, images, texts, 4)


def test_samples_must_have_the_size_of_the_references(
    stable_diffusion, mirror, monkeypatch, tmp_path
):
    track = _track(stable_diffusion, mirror, monkeypatch, tmp_path)
    content = tiny.plain(track)
    del content["sampling"]["size"]
    track = tiny.track(track.name, content, track.methods)
    words = "sampling.size: samples would have 16 pixels a side, the references have 8"
    with pytest.raises(UserError, match=words):
        tiny.run("extractor", track, tmp_path / "runs")


@torch.no_grad()
def _by_hand(clip: Path, images: torch.Tensor, texts: tuple[str, ...]) -> float:
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pixels = (images.float() / 255 - mean) / std  # they have CLIP's size already
    total = 0.0
    for row, text in zip(pixels, texts, strict=True):
        tokens = [t for word in text.split() for t in (*word[:-1], f"{word[-1]}</w>")]
        ids = torch.tensor([[0, *map(pipelines.VOCABULARY.get, tokens), 1]])
        output = model(pixel_values=row[None], input_ids=ids)
        a, b = output.image_embeds[0], output.text_embeds[0]
        total += (a @ b / a.norm() / b.norm()).item()
    return total / len(texts)


# Tracks.


@pytest.mark.parametrize("track_name", ["text2image", "text2image_xl", "text2image_flux"])
def test_the_tracks_fit_the_released_models(track_name):
    track = tracks.load(str(tiny.ROOT / "config" / f"{track_name}.yaml"))
    assert track.cells()
    for model, settings in track.settings.models.items():
        batch = track.coder(settings.autoencoder)[1].batch
        assert track.settings.sampling.lanes % batch == 0, "it would decode padding"
        coder = track.coder(settings.autoencoder)[1].asset
        reader = track.coder(settings.text_encoder)[1].asset
        paths = {f.path.partition("/")[2] for f in assets.asset(coder).files}
        assert {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} <= paths
        paths = {f.path.partition("/")[2] for f in assets.asset(reader).files}
        assert {"model_index.json", "text_encoder/config.json"} <= paths
        assert reader == settings.weights.asset
        names = {"model": model, "dense_seed": 0}
        assert track.fingerprint("dense", **names) != track.fingerprint("encode")


def test_what_a_track_says_of_text_encoders_is_checked(tmp_path):
    def loaded(change) -> tracks.Track:
        content = copy.deepcopy(tiny.plain(tracks.load(str(tiny.ROOT / "config/text2image.yaml"))))
        content["methods"]["folders"] = [str(tiny.ROOT / "methods")]
        change(content)
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(content))
        return tracks.load(str(file))

    def without(content):
        del content["models"]["sd15"]["text_encoder"]
        content["models"]["sd15"]["recovery"]["class_dropout"] = 0
        content["models"]["sd15"]["sampling"]["guidance"] = 1

    def unknown(content):
        content["models"]["sd15"]["text_encoder"] = "t5"

    def classes(content):
        content["models"]["sd15"]["config"]["classes"] = 3

    def neither(content):
        del content["text_encoders"]["sd15_text"]["asset"]

    track = loaded(lambda content: content["evaluation"].update(clip="clip_vit_g14"))
    assert "clip_vit_g14" in track.assets()
    with pytest.raises(UserError, match="unknown coder 'no' in track mine; known: sd15, sd21"):
        track.coder("no")
    before = track.fingerprint("encode", coder="sd15_text")
    changed = loaded(lambda content: content["text_encoders"]["sd15_text"].update(batch=3))
    assert changed.fingerprint("encode", coder="sd15_text") != before
    for change, words in (
        (without, r"models\.sd15\.text_encoder: coco2014 has captions, not classes"),
        (unknown, r"models\.sd15\.text_encoder: unknown text encoder 't5' in text_encoders; known"),
        (classes, r"models\.sd15\.text_encoder: the model has classes"),
        (neither, r"text_encoders\.sd15_text: needs either the key 'asset' or 'folder'"),
    ):
        with pytest.raises(UserError, match=words):
            loaded(change)
