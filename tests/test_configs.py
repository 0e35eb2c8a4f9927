"""What a track may say of a network: refused by key before a network is built."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from prunebench import models

INSTANCES = models.instances()
PUBLISHED = {
    f"{family}/{name}": (family, entry)
    for family in models.family_names()
    for name, entry in models.published(family).items()
}


@pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES)
def test_tiny_instances_are_accepted(instance):
    takes = models.config(instance.family)(**instance.config).takes()
    shape = instance.image or (takes.channels, takes.side, takes.side)
    assert shape[0] == takes.channels and shape[1] % takes.multiple == 0


@pytest.mark.parametrize(("family", "entry"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_are_accepted(family, entry):
    takes = models.config(family)(**entry.config).takes()
    assert takes.classes == entry.config.get("classes")
    assert takes.channels in (3, 4, 16)


def test_every_key_of_the_wrong_type_is_refused_by_its_name():
    for instance in INSTANCES.values():
        for key in instance.config:
            for value in ("wrong", float("nan"), {"a": 1}, -1, 10**12):
                with pytest.raises(ValidationError) as caught:
                    models.config(instance.family)(**{**instance.config, key: value})
                assert key in {error["loc"][0] for error in caught.value.errors()}, (key, value)


@pytest.mark.parametrize(
    ("which", "changes", "key", "message"),
    [
        ("dit", {"heads": 5}, "heads", "5 does not divide width, which has 32"),
        ("dit", {"patch": 3}, "patch", "3 does not divide resolution, which has 8"),
        ("dit", {"width": 34}, "width", "34 is no multiple of 4"),
        ("dit", {"widht": 32}, "widht", "Extra inputs are not permitted"),
        ("uvit", {"depth": 3}, "depth", "3 is odd"),
        ("uvit", {"context": [3, 8]}, "context", "has classes; leave out one of them"),
        ("unet", {"norm_num_groups": 3}, "norm_num_groups", "3 does not divide block_out_channels"),
        ("unet", {"block_out_channels": [8]}, "down_block_types", "has 2 entries, .* has 1"),
        ("unet", {"sample_size": 9}, "sample_size", "9 is no multiple of 2"),
        ("unet", {"out_channels": 3}, "out_channels", "3 is neither in_channels, 1, nor twice"),
        ("unet_attention", {"attention_head_dim": 64}, "attention_head_dim", "does not divide 32"),
        ("ldm", {"attention_head_dim": [2, 3]}, "attention_head_dim", "3 heads do not divide 16"),
        ("sdxl", {"addition_embed_type": None}, "projection_class_embeddings_input_dim", "goes"),
        ("flux", {"axes_dims_rope": [2, 2, 2]}, "axes_dims_rope", "add up to .*head_dim, 8"),
        ("flux", {"axes_dims_rope": [1, 3, 4]}, "axes_dims_rope", "1 is odd"),
        ("flux", {"attention_head_dim": 16}, "axes_dims_rope", "add up to .*head_dim, 16"),
        ("flux", {"in_channels": 6}, "in_channels", "6 is no multiple of 4"),
        ("flux", {"out_channels": 3}, "out_channels", "3 is no multiple of 4"),
        ("flux", {"patch_size": 2}, "patch_size", "Input should be 1"),
        ("flux", {"guidance_embeds": False, "guidance_scale": 3.5}, "guidance_scale", "needs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_key(which, changes, key, message):
    instance = INSTANCES[which]
    with pytest.raises(ValidationError, match=message) as caught:
        models.config(instance.family)(**{**instance.config, **changes})
    assert key in {error["loc"][0] for error in caught.value.errors()}


def test_planning_reads_settings_without_torch():
    code = "import sys; from prunebench import models; models.instances(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "timm"} & set(done.stdout.split())
