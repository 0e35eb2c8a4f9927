"""Number formats: half-precision weights, and networks that are sampled in bf16 or int8."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from prunebench import tracks
from prunebench.models import precision
from prunebench.pruning import surgery
from prunebench.records import artefacts, parts, sealed
from prunebench.selection import scores
from prunebench.stages.sample import IMAGES


def _half(name: str) -> nn.Module:
    return nn.Module.to(tiny.dense(name), torch.bfloat16)


@pytest.mark.parametrize("name_", tiny.SHAPES)
def test_networks_take_and_return_single_precision(name_):
    whole, (x, t, y) = tiny.dense(name_), tiny.inputs(name_)
    if name_ == "flux":  # as released, it rounds its time and guidance
        t = (t.bfloat16() * 1000).float() / 1000
        whole.guidance_scale = (torch.tensor(3.5).bfloat16() * 1000).item() / 1000
    with torch.no_grad():
        found, expected = tiny.output(_half(name_), name_), whole(x, t, y)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    x, t, y = tiny.inputs(name_)
    with torch.no_grad():
        assert _half(name_)(x.bfloat16(), t, y).dtype == torch.bfloat16


@pytest.mark.parametrize("name_", ["dit", "unet", "flux"])
def test_scores_are_sums_in_single_precision(name_):
    context = tiny.context(name_, _half(name_))
    used = scores.accumulate_gradients(context, 40, 2)
    context, summed = tiny.context(name_, _half(name_)), context.model
    single = {name: 0.0 for name, _ in summed.named_parameters()}
    (batch,) = context.draws(2, 2)
    for t in context.data.objective.grid(40):
        context.model.zero_grad()
        context.loss(context.model, context.at_time(batch, t)).backward()
        for name, parameter in context.model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.bfloat16
                single[name] = single[name] + parameter.grad.float()
    assert used == 40
    matrices = scores.matrices(summed)
    for name, parameter in summed.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            same = parameter.grad, single[name]  # but for norms, which compute in single precision
            assert name in matrices or torch.allclose(*same, rtol=0.02, atol=1e-3), name
            assert name not in matrices or torch.equal(*same), name
    terms = scores.taylor_terms(matrices)
    assert terms and {term.dtype for term in terms.values()} == {torch.float32}


def test_short_memory_halves_what_is_scored_at_once(monkeypatch):
    context, short = tiny.context("dit"), tiny.context("dit")
    seen, own = [], short.loss

    def loss(model, batch):
        seen.append(len(batch.x0))
        if len(batch.x0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, batch)

    monkeypatch.setattr(short, "loss", loss)
    for threshold in (0.0, 0.9):
        used = [scores.accumulate_gradients(c, 5, 8, threshold) for c in (context, short)]
        assert used[0] == used[1]
        for one, other in zip(context.model.parameters(), short.model.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)
    assert seen[:6] == [8, 4, 2, 2, 2, 2]


def _track(tmp_path: Path, **weights) -> tracks.Track:
    content = yaml.safe_load((tiny.ROOT / "config" / "smoke.yaml").read_text())
    model = content["models"]["dit"]
    file = tmp_path / "model.safetensors"
    if not file.exists():
        network = tiny.models.family("dit").build(model["config"])
        save_file({n: v + 0.02 * torch.randn_like(v) if "pos" not in n else v
                   for n, v in network.state_dict().items()}, file)  # fmt: skip
    del model["training"], content["oracle"]
    model["weights"] = {"file": str(file), "layout": "suite", **weights}
    content |= {"models": {"dit": model}, "divisions": {
        "matched": {"compares": "selections", "recoveries": ["none"]}}}  # fmt: skip
    content["methods"]["folders"] = [str(tiny.ROOT / "methods")]
    place = tmp_path / "track.yaml"
    place.write_text(yaml.safe_dump(content))
    return tracks.load(str(place))


@pytest.mark.parametrize("method", ["magnitude_2_4", "taylor"])
def test_a_track_prunes_and_samples_weights_in_half_precision(tmp_path, method):
    track, runs = _track(tmp_path, dtype="bfloat16"), tmp_path / "runs"
    names = {"model": "dit", "dense_seed": 0}
    assert track.fingerprint("dense", **names) != _track(tmp_path).fingerprint("dense", **names)
    dense = tiny.run("dense", track, runs, **names)
    assert sealed.read(dense).weights.given["dtype"] == "bfloat16"
    sparsity = 0.5 if method == "magnitude_2_4" else 0.25
    cell = track.cell("dit", method, sparsity, "none", 0)
    paths = tiny.run_stages(track, runs, cell)
    for record in (dense, paths.select):
        state = load_file(Path(record).parent / surgery.WEIGHTS)
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    drawn = artefacts.read_tensors(Path(paths.sample).parent / IMAGES)["images"]
    assert drawn.dtype == torch.uint8 and len(drawn.unique()) > 20


# Cells in other precisions.


@pytest.mark.parametrize("name_", tiny.SHAPES)
@pytest.mark.parametrize("format_", ["bf16", "int8"])
def test_a_converted_network_predicts_nearly_the_same(name_, format_):
    network = tiny.dense(name_).eval()
    with torch.inference_mode():
        whole = tiny.output(network, name_)
        other, report = precision.converted(network, format_)
        found = tiny.output(other, name_)
        assert torch.equal(tiny.output(network, name_), whole)  # what was converted is a copy
    assert found.dtype == torch.float32
    distance = (found - whole).norm() / whole.norm()
    rounded_times = name_ == "flux" and format_ == "bf16"  # as released; rounding moves them
    assert 1e-4 < distance < (0.5 if rounded_times else 0.05)
    parts.Arithmetic(**report)
    assert report["converted"] + len(report["left"]) == report["of"]
    weights = {type(m.weight).__name__ for m in other.modules() if isinstance(m, nn.Linear)}
    assert ("Int8Tensor" in weights) == (format_ == "int8")


def test_in_single_precision_a_network_is_itself():
    network = tiny.dense("dit")
    assert precision.converted(network, "fp32") == (network, None)


def test_what_int8_leaves_says_why():
    network = tiny.dense("unet").eval()
    _, report = precision.converted(network, "int8")
    convolutions = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions <= set(report["left"])
    assert "matrices only" in report["left"]["conv_in"]
    assert precision.int8_obstacle(nn.Linear(16, 8)) is None
    # What a width's pruning may leave: no int8 product of a GPU takes it.
    assert precision.int8_obstacle(nn.Linear(0, 8)) == "no channel is left of it"
    assert precision.int8_obstacle(nn.Linear(16, 13)) == "13x16 is not a multiple of 8x8"


def test_int8_rounds_weights_by_row_and_keeps_zeros():
    network = tiny.dense("dit").eval()
    plan = tiny.plan("dit", "unstructured", 0.5)
    for name, mask in plan.masks.items():
        network.get_parameter(name).data.mul_(mask)
    other, report = precision.converted(network, "int8")
    checked = 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and name not in report["left"]:
            rounded = other.get_submodule(name).weight.dequantize()
            assert (rounded[layer.weight == 0] == 0).all(), name
            step = layer.weight.abs().amax(1, keepdim=True) / 127
            assert ((rounded - layer.weight).abs() <= 0.51 * step + 1e-12).all(), name
            assert (rounded / step).nan_to_num().round().unique().numel() <= 255
            checked += 1
    assert checked == report["converted"] > 10


def test_int8_sums_are_exact():
    """Values that are whole numbers of steps lose nothing; 8-bit products of a kernel might."""
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(512, 64, bias=False)
    weight = torch.randint(-127, 128, (64, 512), generator=random).float()
    x = torch.randint(-127, 128, (32, 512), generator=random).float()
    weight[:, 0], x[:, 0] = 127, 127  # every row's scale
    weight[0], x[0] = 127, 127  # the largest sum
    layer.weight.data = weight
    other, _ = precision.converted(nn.Sequential(layer), "int8")
    with torch.inference_mode():
        error = (other(x) - x @ weight.T).abs().max() / (x @ weight.T).abs().max()
    assert error < 0.01


@pytest.mark.parametrize("format_", ["bf16", "int8"])
def test_a_converted_networks_image_depends_on_its_seed_only(format_):
    network, _ = precision.converted(tiny.dense("dit").eval(), format_)
    sampler = tiny.sampler("dit", network)
    (whole,) = sampler.images(0, 0, 12, 12)
    parts_ = torch.cat([*sampler.images(0, 0, 5, 2), *sampler.images(0, 5, 12, 7)])
    assert torch.equal(whole, parts_)
