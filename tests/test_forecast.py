"""`prunebench plan`: what a track would cost, against sums by hand and published counts."""

import shutil

import pytest

from prunebench import cli, models, tracks
from prunebench.errors import UserError
from prunebench.progress import forecast

MACS = {"dit_xl_2_256": 118_621_421_568}  # as fvcore counts DiT-XL/2, attention products included


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    track = tracks.load("imagenet256")
    return track, forecast.forecast(track, ["matched"], tmp_path_factory.mktemp("runs"), "a100")


def line(found, stage):
    return next(each for each in found.lines if each.stage == stage)


def test_images_of_released_models_cost_what_their_papers_steps_cost(imagenet):
    """The dense rows of four models, by hand: 50,000 images, guided, at the stated rate."""
    track, _ = imagenet
    counter = forecast._Counter(track, forecast.rates("a100"), {})
    steps = {"dit": 2 * 250, "sit": 2 * 125, "uvit": 2 * 50, "ldm": 2 * 250}
    for name, network in counter.networks.items():
        family = track.model(name).family
        macs = max(e.macs for e in models.published(family).values()
                   if forecast._same(track.model(name), e.config))  # fmt: skip
        assert network.image(network.model.sampling) == 2 * macs * steps[name]
    assert counter.networks["dit"].forward == 2 * MACS["dit_xl_2_256"]


def test_counts_of_a_network_that_nobody_published_are_its_own():
    model = tracks.load("smoke").model("dit")
    network = forecast._Network(model, 16)
    built = models.family("dit").build(model.config)
    assert network.parameters == sum(p.numel() for p in built.parameters())
    width, depth, tokens, patch = 32, 4, 16, 16
    block = 12 * width * width * tokens + 2 * tokens * tokens * width + 6 * width * width
    ends = tokens * width * (patch + patch) + 2 * width * width
    assert network.forward / 2 == pytest.approx(depth * block + ends, rel=0.1)


def test_training_costs_three_passes_and_a_fourth_where_activations_are_computed_again():
    network = forecast._Network(tracks.load("smoke").model("dit"), 16)
    assert network.training(10) == 30 * network.forward
    again = forecast._Network(tracks.load("text2image").model("sd15"), 512)
    assert again.training(10) == 40 * again.forward


def test_every_job_is_counted_once_and_finished_ones_not(imagenet, tmp_path):
    track, found = imagenet
    cells = track.cells("matched")
    assert found.cells == line(found, "sample").jobs == line(found, "score").jobs == len(cells)
    assert line(found, "dense").jobs == len(track.settings.models)
    assert line(found, "sample").disk == len(cells) * 50_000 * 3 * 256 * 256
    done = tmp_path / "imagenet256" / "dit" / "dense" / "dense.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    left = forecast.forecast(track, ["matched"], tmp_path, unfinished=True)
    assert line(left, "dense").jobs == len(track.settings.models) - 1


def test_a_disk_that_is_too_small_is_refused_with_both_figures(imagenet, monkeypatch, tmp_path):
    _, found = imagenet
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 10**9))
    with pytest.raises(
        UserError, match=r"needs about [\d,.]+ GB, and 1\.0 GB are free in .*disk=any"
    ):
        forecast.check_disk(found, tmp_path / "not" / "yet")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 10**15))
    forecast.check_disk(found, tmp_path)


def test_the_command_prints_rates_and_money(capsys):
    assert cli.main(["plan", "celeba64", "--division", "matched", "--price", "3"]) == 0
    text = capsys.readouterr().out
    assert "Rates: a core" in text and "at 3 per GPU hour" in text and "at most" in text
    assert cli.main(["plan", "celeba64", "--gpu", "abacus"]) == 2
    assert "unknown GPU 'abacus'; known: a100" in capsys.readouterr().err


@pytest.mark.parametrize("own", ["embedded", "embedded_more", "text2image_flux", "celeba64_uvit"])
def test_tracks_of_every_size_can_be_planned(own, tmp_path):
    track = tracks.load(own)
    found = forecast.forecast(track, track.divisions, tmp_path, oracle=True)
    assert found.total("gpu_s") + found.total("cpu_s") > 0


def test_without_published_records_rates_are_assumed_and_said_to_be(monkeypatch):
    monkeypatch.setattr(forecast, "_published", tuple)
    assert "(assumed)" in forecast.rates("h100").source
