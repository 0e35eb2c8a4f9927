"""The stages: each reads artefacts, does one thing and writes one record. The CLI calls these.

A record's status is "ok" or "failed". A cell fails where its method or its training breaks; the
failure is recorded and passed on, so that it costs its own cells only. Anything else that goes
wrong (disk, memory, corrupt files) stops the command and is tried again by the next run.
"""

import contextlib
import functools
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunebench import assets, models, recovery
from prunebench.diffusion.objectives import objective
from prunebench.diffusion.sampling import Sampler, shard_range
from prunebench.errors import CellError, UserError, machine_fault
from prunebench.evaluation import cost, latency, semi_structured, variants
from prunebench.models import official
from prunebench.models.conditions import CLASSES, Condition, Conditions
from prunebench.pruning import surgery, targets
from prunebench.pruning.plan import Plan
from prunebench.records import artefacts
from prunebench.records.provenance import PACKAGE, code_hash, provenance
from prunebench.selection import checks as selection
from prunebench.tracks import Cell, Layout, Paths, Track, as_dict, methods
from prunebench.training import latents, loop, parallel, prompts
from prunebench.training.budget import BudgetMeter, unspent
from prunebench.training.checkpoints import SECONDS, Checkpoints

if TYPE_CHECKING:
    from prunebench.diffusion.autoencoder import Autoencoder

log = logging.getLogger(__name__)

IMAGES = "images.safetensors"
AVERAGE = "average.safetensors"  # of a training that selection began


def dataset(track: Track) -> assets.Dataset:
    return assets.load_dataset(**track.content["dataset"])


def training_data(track: Track, layout: Layout, model: str) -> loop.Data:
    """What a model trains on: images, or latents that `encode` wrote, and what they show."""
    goal = objective(track.model(model)["objective"])
    shown = conditions(track, layout, model, training=True)
    if name := track.model(model).get("autoencoder"):
        record, entry = layout.latents(name), track.autoencoder(name)
        artefacts.read_record(record)
        encoded = latents.Latents(Path(record).parent, entry["scale"], entry.get("shift", 0.0))
        return latents.LatentData(encoded, encoded.labels, goal, conditions=shown)
    images = dataset(track)
    return loop.Data(images.train_images, images.train_labels, goal, images.flip, shown)


def conditions(track: Track, layout: Layout, model: str, training: bool) -> Conditions:
    """What a model takes for labels: these, or prompts that `encode` wrote."""
    name = track.model(model).get("text_encoder")
    if name is None:
        return CLASSES
    record = layout.prompts(name)
    artefacts.read_record(record)
    return prompts.Prompts(Path(record).parent, training)


def _place(entry: Mapping) -> Path:
    return assets.locate(entry["asset"]) if "asset" in entry else Path(entry["folder"])


def autoencoder(track: Track, name: str) -> "Autoencoder":
    from prunebench.diffusion.autoencoder import Autoencoder  # slow to import

    entry = track.autoencoder(name)
    shift = entry.get("shift", 0.0)
    return Autoencoder(_place(entry), entry["scale"], entry["batch"], parallel.device(), shift)


def encode(track: Track, layout: Layout, name: str) -> None:
    """Encode the training set once; an interrupted start goes on with the part it was at."""
    start, images, coder = time.perf_counter(), dataset(track), autoencoder(track, name)
    record, weights = layout.latents(name), coder.sha256()
    identity = _encoding(track, weights, autoencoder=name)
    index = latents.encode(
        Path(record).parent, images.train_images, images.train_labels, coder, images.flip, identity
    )
    report = {"place": str(coder.place), "sha256": weights, "images": len(images.train_labels)}
    finish(record, track, start, [index], autoencoder=report)


def encode_prompts(track: Track, layout: Layout, name: str) -> None:
    """Encode the data set's captions once, as `encode` does its images."""
    from prunebench.diffusion.text_encoder import FLUX_TOKENS, TextEncoder

    start, images, entry = time.perf_counter(), dataset(track), track.text_encoder(name)
    if not images.reference_captions:
        raise UserError(f"dataset.name: {track.content['dataset']['name']} has no captions")
    side = assets.data_set(track.content["dataset"]["name"]).shape[1]
    tokens = entry.get("tokens", FLUX_TOKENS)
    coder = TextEncoder(_place(entry), entry["batch"], side, tokens, parallel.device())
    record, weights = layout.prompts(name), coder.sha256()
    identity = _encoding(track, weights, text_encoder=name)
    told = images.train_captions, images.reference_captions
    index = prompts.encode(Path(record).parent, *told, coder, identity)
    report = {"place": str(coder.place), "sha256": weights, "prompts": sum(map(len, told)) + 1}
    finish(record, track, start, [index], text_encoder=report)


def _encoding(track: Track, weights: object, **coder: str) -> dict:
    """What encoded data depend on; `coder` is the `autoencoder` or the `text_encoder`."""
    return {
        "code": code_hash(PACKAGE),
        "torch": torch.__version__,
        "track": track.fingerprint("encode", **coder),
        "weights": weights,
    }


def dense(track: Track, layout: Layout, model: str) -> None:
    """Train the dense model from scratch or from the track's checkpoint, or take that as it is."""
    start, settings = time.perf_counter(), track.model(model)
    if "training" not in settings:
        return _adopt(track, layout, model)
    family, data = models.family(settings["family"]), training_data(track, layout, model)
    options = dict(settings["training"])
    images, seed = options.pop("images"), options.pop("seed", 0)
    torch.manual_seed(seed)
    network, source = _begun(track, model)
    network = network.to(parallel.device())
    _check_sparsities(track, model, network)
    meter, record = BudgetMeter(), layout.trained(model)
    progress = loop.Progress(images // options["batch"])
    inputs = layout.encoded(settings) + ((Path(source["file"]),) if source else ())
    checkpoints = checkpoints_of(track, record, "dense", model, inputs=inputs)
    try:
        with meter.clock():
            losses = loop.train(
                meter.watch(network),
                data,
                loop.Settings(**options),
                images=images,
                seed=seed,
                muon_names=family.weights(network),
                progress=progress,
                meter=meter,
                checkpoints=checkpoints,
            )
    except CellError as error:
        raise UserError(f"dense model '{model}': {error}; see models.{model}.training") from error
    if parallel.rank():
        return  # the first process writes
    files = _save(record, network, Plan(), settings)
    tail = losses[-max(1, len(losses) // 10) :]
    finish(
        record,
        track,
        start - checkpoints.earlier_s,
        files,
        budget=meter.report(),
        training=_training(progress, checkpoints),
        loss=sum(tail) / len(tail),
        weights=source,
    )


def checkpoints_of(
    track: Track, record: str, stage: str, model: str, cell: Cell | None = None, inputs: tuple = ()
) -> Checkpoints:
    """Where a stage saves its trainings, for a later start of the same stage on the same inputs."""
    identity = {
        "code": code_hash(PACKAGE),
        "torch": torch.__version__,
        "track": track.fingerprint(stage, model, cell.method if cell else ""),
        "cell": as_dict(cell) if cell else model,
        "inputs": {str(file): artefacts.sha256(file) for file in inputs},
    }
    seconds = track.content.get("checkpoint_seconds", SECONDS)
    return Checkpoints(artefacts.training_folder(record), identity, seconds)


def _training(progress: loop.Progress, checkpoints: Checkpoints) -> dict:
    """Under what conditions a stage trained."""
    return {
        "micro_batch": progress.micro_batch,
        "processes": parallel.world(),
        "resumed": checkpoints.resumed,
    }


def _adopt(track: Track, layout: Layout, model: str) -> None:
    """Convert an official checkpoint into the suite's own dense record."""
    start, settings = time.perf_counter(), track.model(model)
    network, source = _begun(track, model)
    _check_sparsities(track, model, network)
    record = layout.trained(model)
    files = _save(record, network, Plan(), settings)
    finish(record, track, start, files, budget=unspent(), loss=None, weights=source)


def _begun(track: Track, model: str) -> tuple[nn.Module, dict | None]:
    """The network before any training, and where its weights are from: None, initialised."""
    settings = track.model(model)
    if "weights" not in settings:
        return _built(track, model), None
    weights, config = settings["weights"], settings["config"]
    place = assets.locate(weights["asset"]) if "asset" in weights else Path(weights["file"])
    file, classes = official.denoiser_of(place), weights.get("classes")
    released = {**config, "classes": classes} if classes else config
    dtype = getattr(torch, weights.get("dtype", "float32"))
    network = official.load(settings["family"], released, file, weights["layout"], dtype)
    log.info("%s: %d parameters from %s", model, cost.count_parameters(network), file)
    if classes:
        network = official.with_classes(network, settings["family"], config)
    source = {**weights, "file": str(file), "name": file.name, "sha256": artefacts.sha256(file)}
    return network, source


def _built(track: Track, model: str) -> nn.Module:
    settings = track.model(model)
    try:
        return models.family(settings["family"]).build(settings["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"models.{model}.config: {error}") from error


def _check_sparsities(track: Track, model: str, network: nn.Module) -> None:
    """Refuse targets that no plan can reach, before anything is trained for them."""
    family = models.family(track.model(model)["family"])
    for kind in ("layers", "widths", "weights"):
        most = targets.most(network, family, kind)
        wanted = max(track.content["sparsities"])
        if wanted > most and any(
            m.kind == kind and not m.sparsities for m in track.methods.values()
        ):
            raise UserError(
                f"sparsities: {wanted} is impossible for the {kind} of model '{model}'; "
                f"they hold {most:.3f} of its parameters"
            )


def select(track: Track, cell: Cell, paths: Paths) -> None:
    """Run a method on the dense model and save what its plan leaves."""
    start, settings = time.perf_counter(), track.model(cell.model)
    method = track.method(cell.method)
    artefacts.read_record(paths.trained)
    network, _ = surgery.load(Path(paths.trained).parent)
    meter = BudgetMeter()
    inputs = (paths.trained, method.file)
    checkpoints = checkpoints_of(track, paths.select, "select", cell.model, cell, inputs)
    context = selection.Context(
        network,
        models.family(settings["family"]),
        settings["config"],
        training_data(track, paths.layout, cell.model),
        sparsity=cell.sparsity,
        seed=cell.seed,
        method=method.name,
        meter=meter,
        settings=loop.Settings(**settings["recovery"]),
        train_images=track.budget(cell) if method.trains else 0,
        checkpoints=checkpoints,
        device=parallel.device(),
    )
    with meter.clock(), _unedited(method.file):
        plan, pruned = selection.select(
            context, methods.load(method), method.kind, track.parameters(cell)
        )
    files = _save(paths.select, pruned, plan, settings)
    if average := selection.averaged(context, plan):
        files.append(Path(paths.select).parent / AVERAGE)
        artefacts.write_tensors(files[-1], average)
    finish(
        paths.select,
        track,
        start - checkpoints.earlier_s,
        files,
        budget=meter.report(),
        trained_images=context.trained_images,
        training=_training(context.progress, checkpoints),
        size=_size(network, pruned, plan),
    )


@contextlib.contextmanager
def _unedited(file: Path) -> Iterator[None]:
    """Else the record would be newer than an edit that it knows nothing of.

    Raises:
        UserError: the method's file is no longer what it was.
    """
    before = artefacts.sha256(file)
    try:
        yield
    finally:
        if artefacts.sha256(file) != before:
            raise UserError(f"{file} was edited while it ran; run the same command again")


def recover(track: Track, cell: Cell, paths: Paths) -> None:
    """Train the pruned model on what selection has left of the cell's budget."""
    start, settings = time.perf_counter(), track.model(cell.model)
    chosen = upstream(paths.select)
    pruned, plan = surgery.load(Path(paths.select).parent)
    artefacts.read_record(paths.trained)
    whole, _ = surgery.load(Path(paths.trained).parent)
    meter, pruned, whole = BudgetMeter(), pruned.to(parallel.device()), whole.to(parallel.device())
    checkpoints = checkpoints_of(
        track, paths.recover, "recover", cell.model, cell, (paths.trained, paths.select)
    )
    average = Path(paths.select).parent / AVERAGE
    begun = artefacts.read_tensors(average) if AVERAGE in chosen["files"] else {}
    progress = training_left(track, cell, chosen["trained_images"], begun)
    data = training_data(track, paths.layout, cell.model)
    losses = heal(track, cell, pruned, plan, whole, data, meter, progress, checkpoints)
    if parallel.rank():
        return  # the first process writes
    files = _save(paths.recover, pruned, plan, settings)
    finish(
        paths.recover,
        track,
        start - checkpoints.earlier_s,
        files,
        budget=meter.report(),
        training=_training(progress, checkpoints),
        size=_size(whole, pruned, plan),
        loss={"first": losses[0], "last": losses[-1]} if losses else None,
    )


def training_left(
    track: Track, cell: Cell, trained: int = 0, average: dict[str, Tensor] | None = None
) -> loop.Progress:
    """What is left of a cell's training after selection has trained on `trained` images of it.

    Args:
        average: average of the training that selection began, which goes on.
    """
    batch, budget = track.model(cell.model)["recovery"]["batch"], track.budget(cell)
    total, left = budget // batch, (budget - trained) // batch
    moved = {name: tensor.to(parallel.device()) for name, tensor in (average or {}).items()}
    return loop.Progress(total, total - left, moved)


def heal(
    track: Track,
    cell: Cell,
    pruned: nn.Module,
    plan: Plan,
    whole: nn.Module,
    data: loop.Data,
    meter: BudgetMeter,
    progress: loop.Progress,
    checkpoints: Checkpoints,
) -> list[float]:
    """Train `pruned` in place as the cell's recovery says; returns the loss of every step.

    Args:
        whole: the dense model, which a distilling recovery has as its teacher.
        progress: which steps of the cell's training are left.
    """
    settings = track.model(cell.model)
    options = loop.Settings(**settings["recovery"])
    family, module = models.family(settings["family"]), recovery.recovery(track.healing(cell))
    teaching = _teaching(whole, plan, family, meter) if module.TEACHER else None
    with meter.clock():
        return loop.train(
            meter.watch(pruned),
            data,
            options,
            images=(progress.total - progress.done) * options.batch,
            seed=cell.seed,
            muon_names=family.weights(pruned),
            masks=plan.masks,
            loss=module.loss(teaching),
            progress=progress,
            meter=meter,
            checkpoints=checkpoints,
        )


def _teaching(
    whole: nn.Module, plan: Plan, family: ModuleType, meter: BudgetMeter
) -> recovery.Teaching:
    # Before the teacher is frozen and metered: finding widths may trace the model, which needs
    # gradients and is no pass of the recovery.
    kept = surgery.kept_rows(whole, plan, family)
    return recovery.Teaching(meter.watch(whole.requires_grad_(False), "teacher"), kept)


def sample(track: Track, cell: Cell, paths: Paths, batch: int | None = None) -> None:
    """Draw the cell's images, or gather what its shards drew: the same file, byte by byte."""
    start = time.perf_counter()
    checkpoint = upstream(paths.checkpoint)
    if paths.shards:
        drawn, report, seconds = _gathered(paths, _origin(track, cell, paths, checkpoint))
        start -= seconds  # wall_s is the compute, as if one job had drawn all
    else:
        every = range(track.content["sampling"]["count"])
        drawn, report = _drawn(track, cell, paths, every, batch)
    file = Path(paths.sample).parent / IMAGES
    artefacts.write_tensors(file, drawn)
    finish(paths.sample, track, start, [file], sampling=report, shards=track.shards)
    _forget_other_shards(paths)


def shard(track: Track, cell: Cell, paths: Paths, index: int, batch: int | None = None) -> None:
    """Draw one shard of the cell's images, which `sample` gathers."""
    start, settings = time.perf_counter(), track.content["sampling"]
    origin = _origin(track, cell, paths, upstream(paths.checkpoint))
    indices = shard_range(index, track.shards, settings["count"], settings["lanes"])
    drawn, report = _drawn(track, cell, paths, indices, batch)
    record, images = paths.shards[index]
    artefacts.write_tensors(images, drawn)
    finish(record, track, start, [Path(images)], sampling=report, origin=origin)


def _drawn(
    track: Track, cell: Cell, paths: Paths, indices: range, batch: int | None
) -> tuple[dict[str, Tensor], dict]:
    """The cell's images of some indices with their labels, and how they were drawn."""
    settings = track.content["sampling"]
    network, plan = surgery.load(Path(paths.checkpoint).parent)
    sampler = sampler_for(track, paths.layout, cell.model, network.to(parallel.device()), plan)
    images = []
    for part in sampler.images(cell.seed, indices.start, indices.stop, batch or settings["batch"]):
        images.append(part)
        log.info("%d of %d images", sum(map(len, images)), len(indices))
    report = {**sampler.settings, "steps": sampler.steps, "count": settings["count"]}
    return {"images": torch.cat(images), "labels": sampler.labels(indices)}, report


def _gathered(paths: Paths, origin: dict) -> tuple[dict[str, Tensor], dict, float]:
    """As `_drawn`, out of the shards' files, and the seconds that drawing them took."""
    records = [upstream(record) for record, _ in paths.shards]
    drawn_from = zip(paths.shards, records, strict=True)
    stale = [file for (file, _), record in drawn_from if record["origin"] != origin]
    for file in stale:
        Path(file).unlink(missing_ok=True)
    if stale:
        raise UserError(
            f"{', '.join(stale)} was drawn from another checkpoint, track or code than there is "
            "now; it was removed, run the same command again"
        )
    parts = [artefacts.read_tensors(Path(images)) for _, images in paths.shards]
    drawn = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return drawn, records[0]["sampling"], sum(record["wall_s"] for record in records)


def _origin(track: Track, cell: Cell, paths: Paths, checkpoint: dict) -> dict:
    """What images depend on besides their indices; shards of unequal origin are not gathered."""
    settings = track.fingerprint("sample", cell.model)
    found = {"checkpoint": checkpoint["files"], "settings": settings, "code": code_hash(PACKAGE)}
    if reader := track.model(cell.model).get("text_encoder"):
        found["prompts"] = artefacts.read_record(paths.layout.prompts(reader))["files"]
    return found


def _forget_other_shards(paths: Paths) -> None:
    """Remove what a killed run with another number of shards left."""
    own = {Path(file).name for files in paths.shards for file in files}
    for file in Path(paths.sample).parent.glob("shard*of*"):
        if file.name not in own:
            file.unlink(missing_ok=True)


def measure(track: Track, cell: Cell, paths: Paths) -> None:
    """Measure MACs, memory and latency of the pruned architecture beside the dense one."""
    start = time.perf_counter()
    chosen = upstream(paths.select)
    pruned, plan = surgery.load(Path(paths.select).parent)
    artefacts.read_record(paths.trained)
    whole, _ = surgery.load(Path(paths.trained).parent)
    pruned, whole = pruned.to(parallel.device()), whole.to(parallel.device())
    fast, plain, kernels = semi_structured.contestants(pruned, whole, plan)
    ours = sampler_for(track, paths.layout, cell.model, fast, plan)
    theirs = sampler_for(track, paths.layout, cell.model, plain, Plan())
    settings = track.content["latency"]
    sizes = {"forward_batch1": 1, "forward_batch": settings["batch"]}
    inputs = {name: _inputs(ours, size) for name, size in sizes.items()}
    images = settings["images"]
    sampling = [_whole_sampling(sampler, images) for sampler in (ours, theirs)]
    timed = functools.partial(
        latency.interleaved_latency,
        rounds=settings["rounds"],
        warmup=settings["warmup"],
        device=parallel.device(),
    )
    with latency.conditions(parallel.device(), settings.get("wait", latency.WAIT)) as conditions:
        times = {
            name: latency.with_throughput(timed(*_forwards((fast, plain), inputs[name])), size)
            for name, size in sizes.items()
        }
        times["sampling"] = _per_image(timed(*sampling), images)
    full = functools.partial(pruned, *inputs["forward_batch"])
    report = {
        **times,
        "batch": settings["batch"],
        "peak_memory_mb": cost.peak_memory(full, pruned),
        "kernels": kernels,
        **conditions,
    }
    if wanted := settings.get("variants"):
        report["variants"] = variants.measure(wanted, (fast, plain), inputs, timed)
    macs = cost.count_macs(pruned, *inputs["forward_batch1"])
    theirs_macs = cost.count_macs(whole, *inputs["forward_batch1"])
    dense_macs = {f"dense_{name}": value for name, value in theirs_macs.items()}
    size = {**chosen["size"], **macs, **dense_macs}
    finish(paths.cost, track, start, [], latency=report, size=size)


def guarded(
    stage: Callable,
    track: Track,
    cell: Cell,
    paths: Paths,
    record: str,
    log_file: str | None,
    **options: object,
) -> bool:
    """Run a stage of a cell; record a failure of the cell instead of raising it.

    Returns:
        True if the cell is well.
    """
    try:
        stage(track, cell, paths, **options)
        return True
    except (CellError, RuntimeError) as error:  # RuntimeError: the pruned model does not run
        if machine_fault(error):
            raise
        traceback.print_exc()
        own = {"stage": stage.__name__, "error": str(error), "log": log_file}
        failure = getattr(error, "inherited", None) or own
        if parallel.rank() and not isinstance(error, CellError):
            raise  # the other processes may not have failed with this one
    log.error("cell failed in %s: %s", failure["stage"], failure["error"])
    if parallel.rank():
        return False  # the first process writes
    content = {"schema": 1, "status": "failed", "cell": as_dict(cell), "failure": failure}
    content |= {"labels": labels(track, cell), "provenance": provenance(dict(track.content))}
    artefacts.write_record(Path(record), content)
    Checkpoints(artefacts.training_folder(record)).discard()
    return False


def upstream(record: str) -> dict:
    """A verified input record; a failed one fails this stage with the same failure."""
    content = artefacts.read_record(record)
    if content["status"] == "failed":
        raise CellError(content["failure"]["error"], inherited=content["failure"])
    return content


def finish(record: str, track: Track, start: float, payload: list[Path], **content) -> None:
    """Write a stage's record; `start` is its time.perf_counter() at the beginning."""
    source = provenance(dict(track.content))
    seconds = {"wall_s": time.perf_counter() - start, "provenance": source}
    artefacts.write_record(Path(record), {"status": "ok", **content, **seconds}, payload)
    Checkpoints(artefacts.training_folder(record)).discard()


def _save(record: str, model: nn.Module, plan: Plan, settings: dict) -> list[Path]:
    folder = Path(record).parent
    return surgery.save(folder, model, plan, settings["family"], settings["config"])


def _size(whole: nn.Module, pruned: nn.Module, plan: Plan) -> dict:
    return {
        "parameters": cost.count_parameters(pruned),
        "nonzero_parameters": cost.count_nonzero(pruned),
        "dense_parameters": cost.count_parameters(whole),
        "sparsity_reached": targets.reached(whole, pruned, plan),
    }


def sampler_for(
    track: Track, layout: Layout, model: str, network: nn.Module, plan: Plan
) -> Sampler:
    """The sampler of a model's settings over a network of its kind."""
    settings, common = track.model(model), track.content["sampling"]
    asked = conditions(track, layout, model, training=False)
    images = assets.data_set(track.content["dataset"]["name"])
    coder = autoencoder(track, settings["autoencoder"]) if "autoencoder" in settings else None
    return Sampler(
        network,
        objective(settings["objective"]),
        coder.latent_shape(images.shape) if coder else images.shape,
        len(asked) if isinstance(asked, prompts.Prompts) else images.classes,
        {**settings["sampling"], **{k: common[k] for k in ("lanes", "size") if k in common}},
        plan.steps,
        coder.decode if coder else None,
        asked,
    )


def _inputs(sampler: Sampler, size: int) -> tuple[Tensor, Tensor, Condition]:
    """Noise, the noisiest time and conditions of `size` images, as the denoiser takes them."""
    x = torch.randn(size, *sampler.shape, generator=torch.Generator().manual_seed(0))
    time_ = sampler.objective.model_time(sampler.objective.grid(2)[-1:]).expand(size)
    return x.to(sampler.device), time_.to(sampler.device), sampler.asked(range(size))


def _forwards(pair: tuple[nn.Module, nn.Module], inputs: tuple) -> list[Callable[[], Tensor]]:
    return [functools.partial(model, *inputs) for model in pair]


def _whole_sampling(sampler: Sampler, size: int) -> Callable[[], Tensor]:
    x, _, y = _inputs(sampler, size)
    return functools.partial(sampler.denoise, x, y)


def _per_image(timing: dict, images: int) -> dict:
    return {k: v if k == "ratio" else v / images for k, v in timing.items()}


def labels(track: Track, cell: Cell) -> dict:
    method, settings = track.method(cell.method), track.model(cell.model)
    names = ("kind", "control", "reconstruction", "title", "paper", "bibtex", "notes")
    return {
        "family": settings["family"],
        "healing": track.healing(cell),
        "objective": settings["objective"]["name"],
        **{name: getattr(method, name) for name in names},
        "idea": method.idea,
    }


def shared_settings(track: Track, model: str) -> dict:
    """What of the track made every cell of a model."""
    common = ("dataset", "extractor", "budgets", "sampling", "latency", "evaluation")
    coder = track.model(model).get("autoencoder")
    own = {"autoencoder": track.autoencoder(coder)} if coder else {}
    if reader := track.model(model).get("text_encoder"):
        own["text_encoder"] = track.text_encoder(reader)
    return {"model": track.model(model), **own, **{name: track.content[name] for name in common}}
