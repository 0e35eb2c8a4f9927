"""Narrow decoders of latent models (SnapFusion, part B): trained once per dense model."""

import functools

import torch
from torch import Tensor, nn

from prunebench.diffusion.autoencoder import Autoencoder
from prunebench.diffusion.narrow_decoder import decoding_by, inputs_of, narrow
from prunebench.diffusion.objectives import objective
from prunebench.diffusion.sampling import Sampler, shrunk, to_uint8
from prunebench.errors import UserError
from prunebench.evaluation import cost, latency, metrics
from prunebench.evaluation.metrics import Evidence, Missing
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts, sealed
from prunebench.records.parts import Quality
from prunebench.records.schema import ForwardTiming
from prunebench.stages.extractor import load
from prunebench.stages.fitting import fit
from prunebench.stages.inputs import autoencoder, decoded_by, sampler_for
from prunebench.stages.job import Job
from prunebench.stages.work import dense_model
from prunebench.training import parallel
from prunebench.training.autoencoding import Inputs, imitation_loss
from prunebench.training.budget import unwatched

FAITHFUL_TO = "the paper"
UNSEEN = 2**32  # seed of what it learns on: no seed of a track is so large

WEIGHTS = "decoder.safetensors"


def decoder(job: Job) -> None:
    """Train a narrow decoder on what the dense model draws; its cost and quality beside the whole.

    The encoder stays as it is, and no real image is used.
    """
    asked, key = job.settings.decoder, f"models.{job.model}.decoder"
    if asked is None:
        raise UserError(f"{key}: this key is missing")
    dense, (_, _, extractor) = job.read("dense"), load(job)
    coder = autoencoder(job, job.settings.autoencoder)
    sampler = sampler_for(job, dense_model(job).to(parallel.device()), Plan())
    torch.manual_seed(asked.seed)
    student, teacher = narrow(coder.config, asked.width).to(parallel.device()), coder.module.decoder
    # Nothing is noised here, so that the objective does not matter.
    clean = objective({"name": "flow", "times": "uniform", "time_scale": 1.0})
    learnt = inputs_of(coder, _drawn(sampler, UNSEEN, asked.draws)).cpu()
    data = Inputs(learnt, torch.zeros(len(learnt), dtype=torch.long), clean)
    report = fit(job, student, data, asked, imitation_loss(teacher), key, job.path("dense"))
    student = unwatched(student).eval().requires_grad_(False)
    artefacts.write_tensors(job.file(WEIGHTS), student.state_dict())
    report |= _costs(job, student, teacher, learnt) | _quality(job, sampler, coder, student)
    made_from = sealed.made_from(dense=dense, extractor=extractor)
    made_from |= decoded_by(job, job.settings.autoencoder)
    if reader := job.settings.text_encoder:
        made_from |= sealed.made_from(prompts=job.read("encode", coder=reader))
    job.finish([job.file(WEIGHTS)], made_from, width=asked.width, draws=asked.draws, **report)


def _drawn(sampler: Sampler, seed: int, count: int) -> Tensor:
    """The first `count` latents of a seed."""
    blocks = range(-(-count // sampler.settings["lanes"]))
    return torch.cat([sampler.undecoded(seed, block) for block in blocks])[:count]


def _costs(job: Job, student: nn.Module, teacher: nn.Module, inputs: Tensor) -> dict:
    settings, device = job.track.settings.latency, parallel.device()
    batch = inputs[: settings.batch].to(device)
    pair = [functools.partial(module, batch) for module in (student, teacher)]
    with latency.conditions(device, settings.wait) as found:
        times = latency.interleaved_latency(*pair, settings.rounds, settings.warmup, device)
    timing = latency.with_throughput(times, len(batch))
    return {
        "parameters": cost.count_parameters(student),
        "whole_parameters": cost.count_parameters(teacher),
        "macs": cost.count_macs(student, batch[:1])["macs"],
        "whole_macs": cost.count_macs(teacher, batch[:1])["macs"],
        "timing": ForwardTiming(
            precision="fp32", mode="eager", batch=len(batch), alone=found["alone"], **timing
        ),
    }


def _quality(job: Job, sampler: Sampler, coder: Autoencoder, student: nn.Module) -> dict:
    """FID of the dense model's images by both decoders, and PSNR between them."""
    used, reference, _ = load(job)
    asked = job.track.settings
    drawn = _drawn(sampler, asked.seeds[0], asked.sampling.count)
    whole = _images(coder, drawn, asked.sampling.size)
    with decoding_by(coder, student):
        ours = _images(coder, drawn, asked.sampling.size)
    evidence = [
        Evidence(
            generated=used.extract(images, asked.evaluation.batch),
            reference=reference,
            images=images,
            dense_images=whole,
        )
        for images in (ours, whole)
    ]
    return {
        "samples": len(ours),
        "psnr": _value("psnr", evidence[0]),
        "fid": _value("fid", evidence[0]),
        "whole_fid": _value("fid", evidence[1]),
    }


def _images(coder: Autoencoder, latents: Tensor, size: int | None) -> Tensor:
    return shrunk(to_uint8(coder.decode(latents)).cpu(), size)


def _value(name: str, evidence: Evidence) -> Quality:
    found = metrics.compute(name, evidence)
    return Quality(reason=found.reason) if isinstance(found, Missing) else Quality(value=found)
