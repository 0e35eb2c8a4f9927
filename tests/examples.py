"""A valid record of every stage, and a finished tiny run of one cell, made without torch."""

import hashlib
from pathlib import Path

from prunebench.records import parts, schema, sealed

HASH = hashlib.sha256(b"").hexdigest()
CELL = {"track": "embedded", "model": "sit", "dense_seed": 0, "method": "a", "sparsity": 0.25,
        "recovery": "finetune-low", "precision": "fp32", "sampling": "default",
        "seed": 0}  # fmt: skip
SELECTION = {name: CELL[name] for name in ("track", "model", "dense_seed", "method", "sparsity",
                                           "seed")} | {"selection": "selection"}  # fmt: skip
PACKAGES = {"torch": "2.15.0", "diffusers": "0.42.1", "timm": "1.0.31"}


def provenance(**changes) -> parts.Provenance:
    known = {"commit": "0123456789abcdef", "dirty": False, "code": "c0de", "config": "c0ff",
             "date": "2026-01-01T00:00:00+00:00", "cpu": "AMD EPYC", "cores": 2, "gpu": None,
             "memory_gb": 23.5, "os": "Linux", "python": "3.11", "packages": PACKAGES}  # fmt: skip
    return parts.Provenance(**{**known, **changes})


def budget(**images) -> parts.Budget:
    nothing = {"student_forward": 0, "student_backward": 0, "teacher_forward": 0, "wall_s": 1.5}
    return parts.Budget(**{**nothing, **images})


def timing(ms: float = 8.0, dense_ms: float = 10.0) -> parts.Timing:
    return parts.Timing(ms=ms, iqr_ms=0.1, dense_ms=dense_ms, ratio=ms / dense_ms)


def sizes(**changes) -> dict:
    known = {"parameters": 450_000, "nonzero_parameters": 450_000, "dense_parameters": 600_000,
             "sparsity_reached": 0.25}  # fmt: skip
    return {**known, **changes}


def costs(macs: int = 6_000_000, **changes) -> parts.Costs:
    products = {"macs": macs, "macs_without_attention_products": macs, "dense_macs": 8_000_000,
                "dense_macs_without_attention_products": 8_000_000}  # fmt: skip
    return parts.Costs(**sizes(**changes), **products)


def latency(ms: float = 8.0, dense_ms: float = 10.0, alone: bool | None = None) -> parts.Latency:
    times = dict.fromkeys(("forward_batch1", "forward_batch", "sampling"), timing(ms, dense_ms))
    load = parts.Load(cpu=0.03 if alone else 1.5)
    others = None if alone is None else parts.Others(before=load, during=load)
    return parts.Latency(**times, batch=64, threads=1, device="cpu", peak_memory_mb=300.0,
                         kernels=None, load_average=1.0, waited_s=2.0 if others else 0.0,
                         others=others, alone=alone)  # fmt: skip


def labels(**changes) -> parts.Labels:
    known = {"family": "dit", "objective": "flow", "recovered_by": "finetune", "kind": "layers",
             "control": False, "reconstruction": False, "title": "A method", "paper": "",
             "bibtex": "", "notes": "", "idea": "Removes."}  # fmt: skip
    return parts.Labels(**{**known, **changes})


def quality(fid: float = 10.0, **changes: float | str) -> dict[str, parts.Quality]:
    """By metric; a text is the reason why there is no value."""
    values = {"fid": fid, "fid_cleanfid": fid, "kid": fid / 1e4, "precision": 0.7, "recall": 0.5,
              "sfid": 2 * fid, "agreement": 0.9, "lpips": 0.1, "ssim": 0.8, "psnr": 20.0,
              "inception_score": "the feature extractor is not Inception"} | changes  # fmt: skip
    return {
        name: parts.Quality(reason=value) if isinstance(value, str) else parts.Quality(value=value)
        for name, value in values.items()
    }


def sampling(steps: int = 10, count: int = 2048) -> parts.Sampling:
    return parts.Sampling(sampler="ddim", steps=steps, lanes=128, count=count)


def extractor(sha256: str = HASH) -> parts.Extractor:
    return parts.Extractor(name="domain", sha256=sha256, dimensions=64)


TRAINING = parts.Training(batch=64, micro_batch=64, processes=1, resumed=0)
PLAN = parts.Plan(layers=("blocks.1",), kept={}, pattern=None, steps=1.0, notes={})


def common(**changes) -> dict:
    return {"wall_s": 1.0, "provenance": provenance(), "fingerprint": "f00", **changes}


def score(cell: dict = CELL, **changes) -> schema.Score:
    known = {
        "labels": labels(), "quality": quality(), "samples": 2048, "reference_samples": 10_000,
        "size": costs(), "latency": latency(), "trained": parts.Trained(selection=0, recovery=0),
        "budget": parts.Spent(selection=budget(), recovery=budget()),
        "trainings": {"recover": TRAINING}, "sampling": sampling(), "extractor": extractor(),
        "released": False, "plan": PLAN, "parameters": {}, "settings": {},
        "stages": {"cost": parts.Stage(wall_s=1.0, date="2026-01-01", code="c0de",
                                       machine=machine())},
    }  # fmt: skip
    identity = parts.CellIdentity(stage="score", **cell)
    return schema.Score(identity=identity, **{**common(), **known, **changes})


def machine(**changes) -> parts.Machine:
    return parts.Machine(**{"cpu": "AMD EPYC", "cores": 2, "gpu": None, **changes})


def failed(identity: parts.Identity | None = None, **changes) -> schema.Failed:
    identity = identity or parts.CellIdentity(stage="score", **CELL)
    failure = parts.Failure(stage="select", error="loss is NaN", log="runs/some/select.log")
    known = {"failure": failure, "labels": labels(), "provenance": provenance()}
    return schema.Failed(identity=identity, **{**known, **changes})


def oracle(mask: int = 0, fid: float | None = 9.0, seed: int = 0, **changes) -> schema.Oracle:
    identity = parts.MaskIdentity(stage="oracle", track="embedded", model="sit", dense_seed=0,
                                  sparsity=0.25, recovery="none", seed=seed, mask=mask)  # fmt: skip
    value = parts.Quality(reason="loss is NaN") if fid is None else parts.Quality(value=fid)
    known = {"layers": (f"blocks.{mask}",), "masks": 5, "exhaustive": True, "fid": value,
             "budget": budget(), "extractor": HASH, "settings": {}}  # fmt: skip
    return schema.Oracle(identity=identity, **{**common(), **known, **changes})


def forward() -> schema.ForwardTiming:
    return schema.ForwardTiming(precision="fp32", mode="eager", batch=1, ms=8.0, iqr_ms=0.1,
                                dense_ms=10.0, ratio=0.8, images_per_s=125.0,
                                peak_memory_mb=10.0, dense_peak_memory_mb=12.0)  # fmt: skip


def efficiency(**changes) -> schema.Efficiency:
    identity = parts.RowIdentity(stage="efficiency", track="efficiency", model="dit", plan="half")
    known = {"status": "ok", "title": "DiT", "asked": schema.Asked(kind="layers", sparsity=0.5),
             "seed": 0, "settings": {}, "layers": ("blocks.1",), "size": costs(),
             "timings": (forward(),)}  # fmt: skip
    return schema.Efficiency(identity=identity, **{**common(), **known, **changes})


def phase() -> parts.Phase:
    return parts.Phase(module="step_kd", images=2560, parameters={"fold": 2, "gamma": 0.0})


def every() -> dict[str, schema.Sealed]:
    """A record of every stage, by its name."""
    of = {"track": "embedded"}
    of_model = parts.ModelIdentity(stage="dense", **of, model="sit", dense_seed=0)
    selection = parts.SelectionIdentity(stage="select", **SELECTION)
    cost = parts.CostIdentity(stage="cost", **SELECTION, precision="fp32", sampling="default")
    shard = parts.ShardIdentity(stage="shard", **CELL, shard=1, shards=2)
    coder, whole = parts.CoderIdentity(stage="encode", **of, coder="vae"), {"budget": budget()}
    outside = parts.Weights(name="vae.safetensors", sha256=HASH)
    recovered = {
        name: CELL[name] for name in parts.RecoveryIdentity.model_fields if name != "stage"
    }
    recovered = parts.RecoveryIdentity(stage="recover", **recovered)
    taught, size = {**common(), **whole, "training": TRAINING}, parts.Sizes(**sizes())
    return {
        "assets": schema.Assets(identity=parts.Identity(stage="assets", **of),
                                assets={"vae": {"vae.safetensors": HASH}}),
        "extractor": schema.FeatureExtractor(
            identity=parts.Identity(stage="extractor", **of), extractor=extractor(), **common()),
        "coder": schema.Coder(identity=coder.model_copy(update={"stage": "coder"}),
                              kind="autoencoder", parameters=9, psnr=30.0, loss=0.5, **taught),
        "encode": schema.Encode(identity=coder, kind="autoencoder", weights=outside, count=9,
                                **common()),
        "dense": schema.Dense(identity=of_model, loss=0.5, weights=None, **taught),
        "select": schema.Select(identity=selection, trained_images=0, size=size, **taught),
        "recover": schema.Recover(identity=recovered, size=size,
                                  loss=parts.Loss(first=1.0, last=0.5), trained_images=2560,
                                  phases=(phase(),), student=parts.Student(steps=3), **taught),
        "sample": schema.Sample(identity=parts.CellIdentity(stage="sample", **CELL),
                                sampling=sampling(), shards=1, **common()),
        "shard": schema.Shard(identity=shard, sampling=sampling(), **common()),
        "cost": schema.Cost(identity=cost, latency=latency(), size=costs(), **common()),
        "score": score(),
        "oracle": oracle(),
        "decoder": schema.Decoder(
            identity=of_model.model_copy(update={"stage": "decoder"}), width=0.5, draws=9, loss=0.5,
            parameters=3, whole_parameters=9, macs=3, whole_macs=9, timing=forward(), samples=9,
            psnr=parts.Quality(value=30.0), fid=parts.Quality(value=3.0),
            whole_fid=parts.Quality(reason="none"), **taught),
        "efficiency": efficiency(),
    }  # fmt: skip


def changed(record: schema.Sealed, **changes) -> schema.Sealed:
    """A copy with other fields, validated; a dict changes parts of a part."""
    content = record.model_dump()
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(content.get(name), dict)
        content[name] = {**content[name], **value} if inner else value
    return type(record).model_validate(content)


def finished_run(root: Path, method: str = "a", seed: int = 0) -> dict[str, Path]:
    """The records of one cell, each with its payload and what it was made from; by stage."""
    cell = {**CELL, "method": method, "seed": seed}
    place = root / "embedded" / "sit"
    own = place / method / "0.25"
    folders = {"extractor": root / "embedded/extractor", "dense": place / "dense",
               "select": own / f"selection/seed{seed}", "cost": own / f"selection/seed{seed}",
               "recover": own / f"finetune-low/seed{seed}",
               "sample": own / f"finetune-low/seed{seed}",
               "score": own / f"finetune-low/seed{seed}"}  # fmt: skip
    payload = {"extractor": ["reference.safetensors"], "dense": ["plan.json", "model.safetensors"],
               "select": ["plan.json", "model.safetensors"], "cost": [],
               "recover": ["plan.json", "model.safetensors"], "sample": ["images.safetensors"],
               "score": ["grid.png"]}  # fmt: skip
    sources = {"extractor": [], "dense": [], "select": ["dense"], "cost": ["dense", "select"],
               "recover": ["dense", "select"], "sample": ["recover"],
               "score": ["dense", "select", "recover", "sample", "cost", "extractor"]}  # fmt: skip
    records, files = every(), {}
    for stage, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name in payload[stage]:
            (folder / name).write_bytes(f"{stage} {method} {seed} {name}".encode())
        made = {name: sealed.read(files[name]) for name in sources[stage]}
        identity = records[stage].identity
        names = {n: v for n, v in cell.items() if n in type(identity).model_fields}
        identity = type(identity)(**{**identity.model_dump(), **names})
        record = changed(records[stage], identity=identity.model_dump(),
                         inputs=sealed.made_from(**made))  # fmt: skip
        files[stage] = folder / f"{stage}.json"
        sealed.write(files[stage], record, [folder / name for name in payload[stage]])
    return files


def write(job, payload=(), **changes) -> Path:
    """Write an example as the record of a stage's job, with its identity; returns its place."""
    identity = job.identity(job.stage).model_dump()
    record = changed(every()[job.stage], identity=identity, fingerprint=job.fingerprint, **changes)
    sealed.write(job.record, record, payload)
    return job.record
