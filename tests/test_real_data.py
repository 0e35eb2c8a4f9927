"""Tracks of real data; real CIFAR-10 under real Inception features, where a mirror has them."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from prunebench import assets, tracks
from prunebench.diffusion import samplers
from prunebench.diffusion.objectives import NoisePrediction
from prunebench.errors import UserError
from prunebench.evaluation.features import load_extractor
from prunebench.evaluation.metrics import Evidence, evaluate
from prunebench.tracks.settings_benchmark import Sampling

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TRACKS = (
    *("cifar10", "cifar10_quad", "cifar10_uvit", "celeba64", "celeba64_uvit", "cifar10_scratch"),
    *("lsun_church", "lsun_bedroom"),
)
SETS = {
    "lsun_church": {"name": "lsun_church256", "reference": "train"},
    "lsun_bedroom": {"name": "lsun_bedroom256", "reference": "adm_lsun_bedroom256"},
}
NEEDED = ("cifar10_arrays", "inception")
DIMENSIONS = 64  # of the 2048 where clean-fid must give an answer
HALF = 256  # images of each half; a minute of Inception on two idle cores
FID_OF_HALVES = 111.51  # of so many; docs/real_data.md has it at more, down to what it should be


@pytest.fixture(scope="session")
def mirror(tmp_path_factory) -> dict[str, str]:
    """The environment of commands that use the mirror, with a cache of its own."""
    if "PRUNEBENCH_MIRROR" not in os.environ:
        pytest.skip("PRUNEBENCH_MIRROR is not set: no real CIFAR-10, no Inception weights")
    try:
        for name in NEEDED:
            assets.locate(name)
    except UserError as error:
        pytest.skip(f"the mirror lacks {name}: {error}")
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PRUNEBENCH_CACHE": str(tmp_path_factory.mktemp("cache"))}


def run(environment: dict, folder: Path, *command: str) -> str:
    options = {"capture_output": True, "text": True, "timeout": 1800}
    done = subprocess.run(command, cwd=folder, env=environment, check=False, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
def test_halves_of_the_training_set_are_alike(mirror, monkeypatch):
    """FID has a bias of about 1 / count; all three implementations agree on the same features."""
    run(mirror, ROOT, "prunebench", "assets", "fetch", "cifar10")
    monkeypatch.setenv("PRUNEBENCH_CACHE", mirror["PRUNEBENCH_CACHE"])
    spec = importlib.util.spec_from_file_location("halves", ROOT / "scripts/fid_of_halves.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    extractor = load_extractor("inception-v3-compat", assets.locate("inception"))
    images, halves = assets.load_dataset("cifar10").train_images, []

    def compared(evidence: Evidence) -> dict:
        halves.extend((evidence.generated, evidence.reference))
        return evaluate(evidence)

    monkeypatch.setattr(script, "evaluate", compared)
    result = script.compare_halves(images, HALF, extractor)
    assert result["fid"] == pytest.approx(result["fid_torch_fidelity"], rel=1e-3)
    if "fid_cleanfid" in result:  # its matrix root fails on some singular covariances
        assert result["fid"] == pytest.approx(result["fid_cleanfid"], rel=1e-3)
    # With fewer dimensions than images they are regular, and it always has one.
    few = [{"features": half["features"][:, :DIMENSIONS]} for half in halves]
    few = evaluate(Evidence(generated=few[0], reference=few[1]))
    assert few["fid"] == pytest.approx(few["fid_cleanfid"], rel=1e-6)
    assert result["fid"] == pytest.approx(FID_OF_HALVES, rel=1e-3)
    assert abs(result["kid"]) < 2e-3  # unbiased
    assert result["precision"] > 0.5 and result["recall"] > 0.5


@pytest.fixture(scope="session")
def tiny_run(mirror, tmp_path_factory) -> Path:
    """Track cifar10_scratch with toy constants, run by the workflow from the mirror alone."""
    folder = tmp_path_factory.mktemp("real")
    for part in ("Snakefile", "workflow", "config", "methods", "environment.yml", "envs"):
        (folder / part).symlink_to(ROOT / part)
    track = folder / "tiny.yaml"
    track.write_text(yaml.safe_dump(tiny_track()))
    run(mirror, folder, "snakemake", "--cores", "2", "all", "--config", f"track={track}")
    return folder


def tiny_track() -> dict:
    content = yaml.safe_load((ROOT / "config" / "cifar10_scratch.yaml").read_text())
    content["dataset"] |= {"limit_train": 48, "limit_reference": 48}
    training = {"batch": 8, "learning_rate": 1e-3, "ema": 0.5}
    del content["models"]["sit"]  # a cell takes half a minute, most of it clean-fid's matrix root
    model = content["models"]["unet"]
    model["training"], model["recovery"] = {**training, "images": 32}, training
    model["sampling"]["steps"] = 4
    model["config"] |= {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return content | {
        "methods": {"folders": ["methods"], "only": []},  # the controls
        "sparsities": [0.25],
        "fewer_steps": [0.5],
        "divisions": {"matched": {"compares": "selections", "recoveries": ["finetune-low"]}},
        "budgets": {"low": 16},
        "seeds": [0],
        "sampling": {"count": 20, "lanes": 20, "batch": 20},
        "latency": {"batch": 2, "rounds": 1, "warmup": 0, "images": 1, "wait": 0},
        "evaluation": {"batch": 20, "lpips": "none"},
        "needs": {},
    }


@pytest.mark.slow
def test_the_workflow_runs_on_real_cifar10_and_real_inception_features(tiny_run):
    files = sorted((tiny_run / "runs/tiny").rglob("score.json"))
    assert len(files) == len(tracks.load(str(tiny_run / "tiny.yaml")).cells())
    for file in files:
        metrics = json.loads(file.read_text())
        assert metrics["status"] == "ok", file
        for name in ("fid", "kid", "precision", "recall", "sfid"):
            assert math.isfinite(metrics["quality"][name]["value"]), (file, name)
        assert metrics["quality"]["fid"]["value"] > 50
        assert metrics["extractor"]["name"] == "inception-v3-compat"


def test_the_tiny_track_is_valid(tmp_path):
    """Also without a mirror, which the run itself needs."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_track()))
    assert {cell.model for cell in tracks.load(str(file)).cells()} == {"unet"}


@pytest.mark.slow
def test_inception_score_is_not_available_from_weights_without_logits(tiny_run, mirror):
    weights = assets.locate("inception")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    if state["fc.weight"].isfinite().all():
        pytest.skip(f"{weights.name} has a logits layer")
    board = (tiny_run / "runs/tiny/leaderboard/matched/leaderboard.md").read_text()
    assert "IS: the extractor's weights have no logits layer" in board
    for file in (tiny_run / "runs/tiny").rglob("score.json"):
        quality = json.loads(file.read_text())["quality"]
        assert quality["inception_score"]["value"] is None
        assert "no logits layer" in quality["inception_score"]["reason"]


@pytest.mark.parametrize("track_name", TRACKS)
def test_tracks_with_checkpoints_have_their_numbers_to_reach(track_name):
    track = tracks.load(str(ROOT / "config" / f"{track_name}.yaml"))
    usual = {"name": track_name.partition("_")[0], "reference": "train"}
    assert tiny.plain(track)["dataset"] == {**SETS.get(track_name, usual), "flip": True}
    own = track_name == "cifar10_scratch"
    assert track.settings.sampling.count == (10_000 if own else 50_000)
    assert track.needs("shard")["gpu"] == track.needs("score")["gpu"] == 1
    for model in track.settings.models.values():
        assert (model.reference is None) == (model.weights is None)
    for division in track.divisions:
        assert track.cells(division)


def test_ddim_takes_the_papers_uniform_steps():
    """0, 10, ..., 990 as in DDIM's code; the suite's default would end at 9."""
    for name in ("cifar10", "lsun_church", "lsun_bedroom"):
        options, times = _ddim(name)
        assert times == list(range(990, -1, -10))
    assert not options.clip_sample


def test_the_table_of_diff_pruning_takes_quadratic_steps():
    options, times = _ddim("cifar10_quad")
    assert (times[0], times[1], times[-1]) == (800, 783, 0)
    assert not options.clip_sample


def _ddim(track_name: str) -> tuple:
    settings = tracks.load(str(ROOT / "config" / f"{track_name}.yaml")).model("ddpm").sampling
    options = samplers.checked("ddim", settings.steps, settings.options, "noise", 1000)
    return options, options.times(settings.steps, 1000)


def _followed(
    name: str, goal: NoisePrediction, sampling: Sampling, randomness: list | None
) -> list:
    """The time, the input and the prediction of every pass, for predictions that mean nothing."""
    generator, passes = torch.Generator().manual_seed(0), []

    def predict(x, t):
        passes.append((int(t), x, torch.randn(x.shape, generator=generator)))
        return passes[-1][2]

    steps, options = sampling.steps, sampling.options
    checked = samplers.checked(name, steps, options, goal.name, goal.train_steps)
    settings = {"objective": goal, "steps": steps, "options": checked, "randomness": randomness}
    samplers.denoise(name, predict, torch.randn(2, 3, 8, 8, generator=generator), **settings)
    return passes


def test_a_step_of_the_uvit_tracks_is_an_euler_maruyama_step():
    """x + beta x / 2 - beta eps / sigma + sqrt(beta) z of the reverse SDE, up to beta^2 terms."""
    settings = tracks.load(str(ROOT / "config" / "cifar10_uvit.yaml")).model("uvit").sampling
    draws = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    goal = NoisePrediction()
    passes = _followed("ddpm", goal, settings, draws[0])
    for (t, x, eps), (_, step, _) in itertools.pairwise(passes):
        z = torch.stack([torch.randn(3, 8, 8, generator=g) for g in draws[1]])
        beta, sigma = goal.scheduler.betas[t], (1 - goal.scheduler.alphas_cumprod[t]).sqrt()
        expected = x + beta * x / 2 - beta * eps / sigma + beta.sqrt() * z
        if t >= 50:
            assert (step - expected).abs().max() < 3 * beta**2 * max(x.abs().max(), eps.abs().max())


@pytest.mark.parametrize(
    ("track_name", "model", "times", "clips"),
    [
        ("cifar10", "ddpm", range(990, -1, -10), True),  # 4.50 is of diffusers' pipeline
        ("celeba64", "ddpm", range(990, -1, -10), False),  # 6.48 of DDIM's own steps
        ("imagenet256", "ldm", range(997, 0, -4), False),  # the release's: one later
    ],
)
def test_ddim_steps_as_the_code_does_that_the_number_to_reach_is_from(
    track_name, model, times, clips
):
    settings = tracks.load(str(ROOT / "config" / f"{track_name}.yaml")).model(model)
    objective = NoisePrediction(**settings.objective.model_dump(exclude={"name"}))
    passes = _followed("ddim", objective, settings.sampling, None)
    assert [t for t, *_ in passes] == list(times)
    middle = len(times) // 2
    (t, x, noise), (_, step, _) = passes[middle : middle + 2]
    now, before = (objective.scheduler.alphas_cumprod[i] for i in (t, t + times.step))
    image = (x - (1 - now).sqrt() * noise) / now.sqrt()
    assert image.abs().max() > 1
    image = image.clamp(-1, 1) if clips else image
    expected = before.sqrt() * image + (1 - before).sqrt() * noise
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
