"""The command line: `prunebench STAGE ...` is each rule's shell line and can be run by hand.

Exit status: 0 done (a failed cell is recorded, not raised), 1 a bug, 2 something the user can mend.
"""

import argparse
import contextlib
import ctypes
import logging
import sys
from pathlib import Path

from prunebench import __version__, config, gpus
from prunebench.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

CELL_STAGES = {
    "select": ("select", "run a method on the dense model"),
    "recover": ("recover", "heal a pruned model by training"),
    "sample": ("sample", "draw images"),
    "cost": ("cost", "measure MACs, memory and latency"),
    "score": ("metrics", "compute quality and write metrics.json"),
}


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    arguments = parser().parse_args(argv)
    try:
        if arguments.gpus is not None:
            gpus.prepare(arguments.gpus, argv, arguments.stage in config.SEVERAL_GPUS)
        arguments.run(arguments)
        return 0
    except UserError as error:
        sys.stderr.write(f"prunebench: {error}\n")
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="prunebench", description=__doc__.split("\n")[0])
    top.add_argument("--version", action="version", version=__version__)
    top.set_defaults(gpus=None)
    commands = top.add_subparsers(required=True, metavar="STAGE")

    def command(name: str, run, help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.add_argument("--track", default="embedded", help="a track of config/, or a YAML file")
        sub.add_argument("--runs", type=Path, default=config.RUNS, help="folder of the artefacts")
        sub.add_argument("--gpus", type=int, help="how many the workflow gave the command")
        sub.set_defaults(run=run, stage=name)
        return sub

    command("extractor", _extractor, "train or take the feature extractor")
    dense = command("dense", _dense, "train a dense model")
    dense.add_argument("--model", required=True)
    for name, (_, help_) in CELL_STAGES.items():
        _cell_arguments(command(name, _cell_stage, help_))
    mask = command("oracle", _oracle, "run one of all layer masks of the oracle's sparsity")
    for name, kind in (("model", str), ("recovery", str), ("seed", int), ("mask", int)):
        mask.add_argument(f"--{name}", type=kind, required=True)
    board = command("leaderboard", _leaderboard, "build the tables, plots and page of a track")
    board.add_argument("--division", help="a division of the track; default: its first")
    board.add_argument("--out", type=Path, help="default: results/<track>[/<division>]")
    board.add_argument("--partial", action="store_true", help="build from what is finished")
    listing = commands.add_parser("methods", help="list the methods of a track")
    listing.add_argument("--track", default="embedded")
    listing.set_defaults(run=_methods, stage="methods")
    return top


def _cell_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", required=True)
    sub.add_argument("--method", required=True)
    sub.add_argument("--sparsity", type=float, required=True)
    sub.add_argument("--recovery", default="none", help='"none" or "<recovery>-<budget>"')
    sub.add_argument("--seed", type=int, required=True)
    sub.add_argument("--log", help="where the output goes; named on the row of a failed cell")
    if sub.get_default("stage") == "sample":
        sub.add_argument(
            "--batch", type=int, help="images in memory; the images do not depend on it"
        )


def _prepare() -> None:
    """One thread, and memory that is kept: what makes small models on a CPU fast."""
    import torch

    from prunebench.training import parallel

    torch.set_num_threads(1)  # two jobs side by side beat two threads on models of this size
    parallel.start()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        libc = ctypes.CDLL(None)
        # Returning every activation to the system and faulting it in again doubled a UNet's time.
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _extractor(arguments: argparse.Namespace) -> None:
    track = config.load(arguments.track)
    _prepare()
    from prunebench import stages

    stages.extractor(track, config.Layout(track.name, arguments.runs))


def _dense(arguments: argparse.Namespace) -> None:
    track = config.load(arguments.track)
    track.model(arguments.model)
    _prepare()
    from prunebench import stages

    stages.dense(track, config.Layout(track.name, arguments.runs), arguments.model)


def _cell_stage(arguments: argparse.Namespace) -> None:
    track = config.load(arguments.track)
    cell = track.cell(
        arguments.model,
        arguments.method,
        arguments.sparsity,
        arguments.recovery,
        arguments.seed,
    )
    _prepare()
    from prunebench import stages

    functions = {
        "select": stages.select,
        "recover": stages.recover,
        "sample": stages.sample,
        "cost": stages.measure,
        "score": stages.score,
    }
    paths = config.Paths(track, cell, arguments.runs)
    record = getattr(paths, CELL_STAGES[arguments.stage][0])
    options = {"batch": arguments.batch} if arguments.stage == "sample" else {}
    stages.guarded(functions[arguments.stage], track, cell, paths, record, arguments.log, **options)


def _oracle(arguments: argparse.Namespace) -> None:
    track = config.load(arguments.track)
    track.mask(arguments.model, arguments.recovery, arguments.mask)
    _prepare()
    from prunebench import oracle

    layout = config.Layout(track.name, arguments.runs)
    oracle.evaluate(track, layout, arguments.model, arguments.recovery, arguments.seed,
                    arguments.mask)  # fmt: skip


def _leaderboard(arguments: argparse.Namespace) -> None:
    from prunebench import leaderboard

    track = config.load(arguments.track)
    division = arguments.division or track.default_division
    cells = track.cells(division)
    layout = config.Layout(track.name, arguments.runs)
    files = [Path(config.Paths(track, cell, arguments.runs).metrics) for cell in cells]
    if arguments.partial:
        files = [file for file in files if file.exists()]
    own = division == track.default_division  # the one whose selections the oracle is about
    masks = [Path(layout.oracle(*place)) for place in track.oracle() if own]
    leaderboard.build(
        files,
        arguments.out or Path(layout.results(division, track.default_division)),
        expected_cells=[config.as_dict(cell) for cell in cells],
        title=f"{track.content['title']}: {division}",
        compares=track.divisions[division]["compares"],
        oracle_files=[file for file in masks if file.exists()],
    )


def _methods(arguments: argparse.Namespace) -> None:
    for method in config.load(arguments.track).methods.values():
        sys.stdout.write(f"{method.name:24} {method.kind:8} {method.idea}\n")
