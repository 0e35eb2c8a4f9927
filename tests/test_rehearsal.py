"""A rehearsal has the cells of its track, and walks them in small."""

import dataclasses

import pytest
import torch

from prunebench import assets, models, tracks
from prunebench.errors import UserError
from prunebench.tracks import files, rehearsal


def benchmark_tracks() -> list[str]:
    return [n for n in files.names() if tracks.load_any(n).kind == "benchmark"]


@pytest.mark.parametrize("own", benchmark_tracks())
def test_every_track_has_a_rehearsal_of_the_same_cells(own, tmp_path):
    track = tracks.load(own)
    small = tracks.load(str(rehearsal.write(track, tmp_path)))
    assert small.name == f"{own}_rehearsal"
    for division in track.divisions:
        theirs = [dataclasses.replace(cell, track="") for cell in small.cells(division)]
        assert theirs == [dataclasses.replace(cell, track="") for cell in track.cells(division)]
    assert small.assets() == []  # nothing to fetch
    for name, model in track.settings.models.items():
        mine = small.model(name)
        taken = [models.config(m.family)(**m.config).takes() for m in (model, mine)]
        for what in ("classes", "no_class", "learns_variance"):
            assert getattr(taken[0], what) == getattr(taken[1], what)
        assert mine.sampling.model_dump(exclude={"steps"}) == model.sampling.model_dump(
            exclude={"steps"}
        )


@pytest.mark.parametrize(("data_set", "classes"), [("imagenet256", 1000), ("celeba64", 1)])
def test_made_up_images_have_the_classes_of_the_data_set(data_set, classes):
    found = assets.made_up(data_set, side=8, train=2000, reference=50)
    assert found.train_images.shape == (2000, 3, 8, 8) and found.train_images.dtype == torch.uint8
    assert found.train_labels.unique().tolist() == list(range(classes))
    again = assets.made_up(data_set, side=8, train=2000, reference=50)
    assert torch.equal(found.train_images, again.train_images)
    assert not torch.equal(found.train_images[:50], found.reference_images)


def test_made_up_captions_number_the_images():
    found = assets.made_up("coco2014", side=8, train=20, reference=10)
    assert found.train_labels.tolist() == list(range(20))
    assert len(found.train_captions) == 20 and len(set(found.train_captions)) > 1


def test_an_efficiency_track_has_nothing_to_rehearse(tmp_path):
    with pytest.raises(UserError, match="efficiency has nothing to rehearse"):
        rehearsal.write(tracks.load_any("efficiency"), tmp_path)
