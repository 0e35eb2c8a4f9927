"""The command line: `prunebench STAGE ...` is each rule's shell line and can be run by hand.

Exit status: 0 done (a failed cell is recorded, not raised), 1 a bug, or a method that breaks the
contract (`check`), 2 something the user can mend.
"""

import argparse
import contextlib
import ctypes
import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from prunebench import __version__, tracks
from prunebench.errors import UserError
from prunebench.records.provenance import config_hash
from prunebench.runtime import gpus, run
from prunebench.runtime.offline import forbid_network
from prunebench.tracks.stages import NEEDY, SEVERAL_GPUS, STAGES, Stage

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

# What stages are called with: type and help of each option.
NAMES: Mapping[str, tuple[Callable, str]] = {
    "coder": (str, "an autoencoder or a text encoder of the track"),
    "model": (str, "a model of the track"),
    "dense_seed": (int, "of the dense model's training; default: the track's only one"),
    "method": (str, "see `prunebench methods`"),
    "sparsity": (float, "share of the parameters to remove, of dense 0"),
    "recovery": (str, '"none" or "<recovery>-<budget>"'),
    "precision": (str, "of the network that is sampled or timed; default: the track's first"),
    "sampling": (str, "one of the model's samplings; default: its own `sampling`"),
    "seed": (int, "of everything after the dense model's training"),
    "shard": (int, "one of sampling.shards, counted from 0"),
    "mask": (int, "one of oracle.masks, counted from 0"),
    "plan": (str, "a plan of the track, or dense"),
}
OPTIONAL = {
    "dense_seed": None,
    "recovery": "none",
    "precision": None,
    "sampling": None,
}  # name -> default


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    arguments = parser().parse_args(argv)
    try:
        if arguments.gpus is not None:
            gpus.prepare(arguments.gpus, argv, arguments.stage in SEVERAL_GPUS)
        return arguments.run(arguments) or 0
    except UserError as error:
        sys.stderr.write(f"prunebench: {error}\n")
        return 2


# ---- the parser


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="prunebench", description=__doc__.split("\n")[0])
    top.add_argument("--version", action="version", version=__version__)
    top.set_defaults(gpus=None)
    commands = top.add_subparsers(required=True, metavar="STAGE")
    for name in NEEDY:
        _stage_command(commands, STAGES[name])
    _leaderboard_command(commands)
    _assets_command(commands)
    _progress_command(commands)
    _plan_command(commands)
    listing = commands.add_parser("methods", help="list the methods of a track")
    listing.add_argument("--track", default="embedded")
    listing.set_defaults(run=_methods, stage="methods")
    contract = commands.add_parser("check", help="try the contract on methods, on tiny networks")
    contract.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a method's file")
    contract.set_defaults(run=_check, stage="check")
    return top


def _command(commands, name: str, run_: Callable, help_: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=help_, description=help_)
    sub.add_argument("--track", default="embedded", help="a track of config/, or a YAML file")
    sub.add_argument("--runs", type=Path, default=tracks.RUNS, help="folder of the artefacts")
    sub.set_defaults(run=run_, stage=name)
    return sub


def _stage_command(commands, stage: Stage) -> None:
    sub = _command(commands, stage.name, _run_stage, stage.help)
    for name in stage.names:
        kind, help_ = NAMES[name]
        needed = {"default": OPTIONAL[name]} if name in OPTIONAL else {"required": True}
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help_, **needed)
    sub.add_argument("--gpus", type=int, help="how many the workflow gave the command")
    sub.add_argument("--log", help="where the output goes; named on the row of a failed cell")
    if stage.name in ("sample", "shard"):
        sub.add_argument("--batch", type=int, help="images in memory; they do not depend on it")
    if stage.name == "efficiency":
        sub.set_defaults(track="efficiency")


def _leaderboard_command(commands) -> None:
    board = _command(commands, "leaderboard", _run_leaderboard, STAGES["leaderboard"].help)
    board.add_argument("--division", help="a division of the track; default: its first")
    board.add_argument("--out", type=Path, help="default: <runs>/<track>/leaderboard/<division>")
    board.add_argument("--partial", action="store_true", help="build from what is finished")


def _assets_command(commands) -> None:
    sub = commands.add_parser("assets", help=STAGES["assets"].help)
    sub.add_argument("action", choices=("list", "fetch", "verify"))
    sub.add_argument("assets", nargs="*", metavar="NAME", help="see `prunebench assets list`")
    sub.add_argument("--track", help="the assets of a track of config/, or of a YAML file")
    sub.add_argument("--record", type=Path, help="fetch: write the files' hashes here")
    sub.set_defaults(run=_run_assets, stage="assets")


def _progress_command(commands) -> None:
    help_ = "print how far a run is: from disk, queue and processes"
    view = _command(commands, "progress", _progress, help_)
    view.add_argument("--division", help="a division of the track, or all; default: its first")
    view.add_argument("--watch", type=float, metavar="SECONDS", help="look again every so often")


def _plan_command(commands) -> None:
    help_ = "estimate what a track would cost: jobs, hours, disk and money"
    sub = commands.add_parser("plan", help=help_, description=help_)
    sub.add_argument("track", help="a track of config/, or a YAML file")
    sub.add_argument("--division", action="append", help="a division of the track, several times "
                     "for several; default: all, and the oracle")  # fmt: skip
    sub.add_argument("--runs", type=Path, default=tracks.RUNS, help="folder of the artefacts")
    sub.add_argument("--gpu", default="a100", help="whose stated peak to reckon with")
    sub.add_argument("--price", type=float, help="of one GPU for an hour")
    sub.add_argument("--start", action="store_true", help="what a workflow says when it starts: "
                     "one line, of what is unfinished, if the disk can hold it")  # fmt: skip
    sub.add_argument("--any-disk", action="store_true", help="with --start: don't look at the disk")
    sub.set_defaults(run=_plan, stage="plan")


# ---- running a command


def _run_stage(arguments: argparse.Namespace) -> int:
    stage = STAGES[arguments.stage]
    track = (tracks.load_any if stage.name == "efficiency" else tracks.load)(arguments.track)
    run.check_planned(config_hash(track.in_force), arguments.track)
    names = {name: getattr(arguments, name) for name in stage.names}
    names = _checked(track, stage, names)
    if getattr(arguments, "batch", None):
        _check_batch(track, stage)
        names["batch"] = arguments.batch
    _prepare()
    function = _function(stage)
    from prunebench.stages.job import Job

    job = Job(stage.name, track, names, arguments.runs, arguments.log)
    function = _on_its_gpus(function, arguments.gpus, track.needs(stage.name)["cpu_instead"])
    if stage.of_cells:
        from prunebench.stages import work

        if stage.name == "select":  # which runs a method, and so anything
            return work.contained(function, job)
        work.guarded(function, job)
    else:
        function(job)
    return 0


def _checked(track, stage: Stage, names: Mapping) -> dict:
    """What the command line says, complete, and known to the track.

    Raises:
        UserError: the track knows one of the names not, or does not allow it.
    """
    found = dict(names)
    if stage.of_cells:
        axes = {name: value for name, value in names.items() if name != "shard"}
        found |= tracks.as_dict(track.cell(**axes))
        del found["track"]
    elif "plan" in names:
        track.plan(**names)
    elif "model" in names:
        track.model(names["model"])
        found["dense_seed"] = track.dense_seed(names["dense_seed"])
    if "coder" in names:
        track.coder(names["coder"])
    if "shard" in names:
        track.shard(names["shard"])
    if "mask" in names:
        track.mask(names["model"], names["recovery"], names["mask"])
    return found


def _check_batch(track: tracks.Track, stage: Stage) -> None:
    if stage.name == "sample" and track.shards > 1:
        raise UserError(
            f"--batch: track {track.name} draws a cell in {track.shards} shards (sampling.shards); "
            "give it to `prunebench shard`, gathering them draws nothing"
        )


def _prepare() -> None:
    """No network; one thread, and memory that is kept: what makes small models on a CPU fast."""
    forbid_network()
    import torch

    from prunebench.records.provenance import PACKAGE, code_hash
    from prunebench.training import parallel

    code_hash(PACKAGE)  # remembered: the code may be edited while the stage runs

    torch.set_num_threads(1)  # two jobs side by side beat two threads on models of this size
    parallel.start()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        libc = ctypes.CDLL(None)
        # Returning every activation to the system and faulting it in again doubled a UNet's time.
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _on_its_gpus(function: Callable, count: int | None, cpu_instead: bool) -> Callable:
    """The stage's function, which begins by trying CUDA, in the process that computes."""

    def begun(job) -> None:
        gpus.require(count or 0, job.stage, cpu_instead)
        function(job)

    return begun


def _function(stage: Stage) -> Callable:
    module, _, name = stage.function.partition(":")
    return getattr(importlib.import_module(module), name)


def _run_leaderboard(arguments: argparse.Namespace) -> None:
    names = {name: getattr(arguments, name) for name in ("division", "out", "partial")}
    _run_light(arguments, tracks.load_any(arguments.track), names, arguments.runs)


def _run_assets(arguments: argparse.Namespace) -> None:
    names = {name: getattr(arguments, name) for name in ("action", "assets", "record")}
    track = tracks.load_any(arguments.track) if arguments.track else None
    _run_light(arguments, track, names, tracks.RUNS)


def _run_light(arguments: argparse.Namespace, track, names: Mapping, runs: Path) -> None:
    """A stage that computes nothing, and needs no torch."""
    from prunebench.stages.job import Job

    _function(STAGES[arguments.stage])(Job(arguments.stage, track, names, runs))


def _progress(arguments: argparse.Namespace) -> None:
    from prunebench import progress

    track = tracks.load(arguments.track)
    if arguments.watch is not None:
        progress.watch(track, arguments.division, arguments.runs, arguments.watch)
    else:
        sys.stdout.write(progress.show(track, arguments.division, arguments.runs) + "\n")


def _plan(arguments: argparse.Namespace) -> None:
    from prunebench.progress import forecast

    track = tracks.load(arguments.track)
    found = forecast.forecast(
        track,
        arguments.division or track.divisions,
        arguments.runs,
        arguments.gpu,
        oracle=not arguments.division,
        unfinished=arguments.start,
    )
    if arguments.start and not arguments.any_disk:
        forecast.check_disk(found, arguments.runs)
    told = forecast.in_one_line if arguments.start else forecast.report
    sys.stdout.write(told(found, arguments.price) + "\n")


def _methods(arguments: argparse.Namespace) -> None:
    for method in tracks.load(arguments.track).methods.values():
        sys.stdout.write(f"{method.name:24} {method.kind:8} {method.idea}\n")


def _check(arguments: argparse.Namespace) -> int:
    _prepare()
    from prunebench.stages.check import check

    logging.disable(logging.INFO)  # many trainings of a second each
    try:
        return 0 if check(arguments.files, sys.stdout.write) else 1
    finally:
        logging.disable(logging.NOTSET)
