"""The command line: `prunebench STAGE ...` is each rule's shell line and can be run by hand.

Exit status: 0 done (a failed cell is recorded, not raised), 1 a bug, or a method that breaks the
contract (`check`), 2 something the user can mend.
"""

import argparse
import contextlib
import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from prunebench import __version__, tracks
from prunebench.errors import UserError
from prunebench.runtime import gpus
from prunebench.runtime.offline import forbid_network

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
            gpus.prepare(arguments.gpus, argv, arguments.stage in tracks.stages.SEVERAL_GPUS)
        return arguments.run(arguments) or 0
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
        sub.add_argument("--runs", type=Path, default=tracks.RUNS, help="folder of the artefacts")
        sub.add_argument("--gpus", type=int, help="how many the workflow gave the command")
        sub.set_defaults(run=run, stage=name)
        return sub

    command("extractor", _extractor, "train or take the feature extractor")
    encode = command("encode", _encode, "encode images by an autoencoder, or captions, once")
    coders = encode.add_mutually_exclusive_group(required=True)
    coders.add_argument("--autoencoder", help="of the track: encodes the training images")
    coders.add_argument("--text-encoder", help="of the track: encodes the captions")
    dense = command("dense", _dense, "train a dense model")
    dense.add_argument("--model", required=True)
    for name, (_, help_) in CELL_STAGES.items():
        _cell_arguments(command(name, _cell_stage, help_))
    mask = command("oracle", _oracle, "run one of all layer masks of the oracle's sparsity")
    for name, kind in (("model", str), ("recovery", str), ("seed", int), ("mask", int)):
        mask.add_argument(f"--{name}", type=kind, required=True)
    row = command("efficiency", _efficiency, "count, and on a GPU measure, a row of such a track")
    row.add_argument("--model", required=True)
    row.add_argument("--plan", required=True, help="a plan of the track, or dense")
    row.set_defaults(track="efficiency")
    board = command("leaderboard", _leaderboard, "build the tables, plots and page of a track")
    board.add_argument("--division", help="a division of the track; default: its first")
    board.add_argument("--out", type=Path, help="default: results/<track>[/<division>]")
    board.add_argument("--partial", action="store_true", help="build from what is finished")
    view = command("progress", _progress, "print how far a run is: from disk, queue and processes")
    view.add_argument("--division", help="a division of the track, or all; default: its first")
    view.add_argument("--watch", type=float, metavar="SECONDS", help="look again every so often")
    listing = commands.add_parser("methods", help="list the methods of a track")
    listing.add_argument("--track", default="embedded")
    listing.set_defaults(run=_methods, stage="methods")
    contract = commands.add_parser("check", help="try the contract on methods, on tiny networks")
    contract.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a method's file")
    contract.set_defaults(run=_check, stage="check")
    _asset_arguments(commands.add_parser("assets", help="list, fetch or verify what is downloaded"))
    return top


def _asset_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("action", choices=("list", "fetch", "verify"))
    sub.add_argument("names", nargs="*", metavar="NAME", help="see `prunebench assets list`")
    sub.add_argument("--track", help="the assets of a track of config/, or of a YAML file")
    sub.add_argument("--record", type=Path, help="fetch: write the files' hashes here")
    sub.set_defaults(run=_assets, stage="assets")


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
        sub.add_argument(
            "--shard", type=int, help="draw only this one of sampling.shards, counted from 0"
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


def _extractor(arguments: argparse.Namespace) -> None:
    track = tracks.load(arguments.track)
    _prepare()
    from prunebench.stages import score as judging

    judging.extractor(track, tracks.Layout(track.name, arguments.runs))


def _encode(arguments: argparse.Namespace) -> None:
    track = tracks.load(arguments.track)
    layout = tracks.Layout(track.name, arguments.runs)
    find = track.text_encoder if arguments.text_encoder else track.autoencoder
    find(arguments.text_encoder or arguments.autoencoder)
    _prepare()
    from prunebench.stages import common as stages

    if arguments.text_encoder:
        stages.encode_prompts(track, layout, arguments.text_encoder)
    else:
        stages.encode(track, layout, arguments.autoencoder)


def _dense(arguments: argparse.Namespace) -> None:
    track = tracks.load(arguments.track)
    track.model(arguments.model)
    _prepare()
    from prunebench.stages import common as stages

    stages.dense(track, tracks.Layout(track.name, arguments.runs), arguments.model)


def _cell_stage(arguments: argparse.Namespace) -> None:
    track = tracks.load(arguments.track)
    cell = track.cell(
        arguments.model,
        arguments.method,
        arguments.sparsity,
        arguments.recovery,
        arguments.seed,
    )
    options = _sampling_options(track, arguments) if arguments.stage == "sample" else {}
    _prepare()
    from prunebench.stages import common as stages

    paths = tracks.Paths(track, cell, arguments.runs)
    stage, record = _function(arguments.stage), getattr(paths, CELL_STAGES[arguments.stage][0])
    if "index" in options:
        stage, record = stages.shard, paths.shards[options["index"]][0]
    stages.guarded(stage, track, cell, paths, record, arguments.log, **options)


def _function(name: str) -> Callable:
    """What runs a stage of CELL_STAGES."""
    if name == "score":
        from prunebench.stages import score as judging

        return judging.score
    from prunebench.stages import common as stages

    return {
        "select": stages.select,
        "recover": stages.recover,
        "sample": stages.sample,
        "cost": stages.measure,
    }[name]


def _sampling_options(track: tracks.Track, arguments: argparse.Namespace) -> dict:
    if arguments.shard is not None:
        track.shard(arguments.shard)
        return {"index": arguments.shard, "batch": arguments.batch}
    if arguments.batch and track.shards > 1:
        raise UserError(
            f"--batch: track {track.name} draws a cell in {track.shards} shards (sampling.shards); "
            "give it with --shard, gathering them draws nothing"
        )
    return {"batch": arguments.batch}


def _oracle(arguments: argparse.Namespace) -> None:
    track = tracks.load(arguments.track)
    track.mask(arguments.model, arguments.recovery, arguments.mask)
    _prepare()
    from prunebench.stages import oracle

    layout = tracks.Layout(track.name, arguments.runs)
    oracle.evaluate(track, layout, arguments.model, arguments.recovery, arguments.seed,
                    arguments.mask)  # fmt: skip


def _efficiency(arguments: argparse.Namespace) -> None:
    from prunebench.tracks import efficiency

    track = efficiency.load(arguments.track)
    track.plan(arguments.model, arguments.plan)
    _prepare()
    from prunebench.stages import efficiency as stage

    stage.measure(track, arguments.model, arguments.plan, arguments.runs)


def _leaderboard(arguments: argparse.Namespace) -> None:
    track = tracks.load_any(arguments.track)
    division = arguments.division or track.default_division
    files = [Path(record) for record in track.records(division, arguments.runs)]
    if arguments.partial:
        files = [file for file in files if file.exists()]
    layout = tracks.Layout(track.name, arguments.runs)
    out = arguments.out or Path(layout.results(division, track.default_division))
    {"benchmark": _benchmark_board, "efficiency": _efficiency_board}[track.kind](
        track, division, files, out, layout
    )


def _benchmark_board(
    track: tracks.Track, division: str, files: list[Path], out: Path, layout: tracks.Layout
) -> None:
    from prunebench import leaderboard

    own = division == track.default_division  # the one whose selections the oracle is about
    masks = [Path(layout.oracle(*place)) for place in track.oracle() if own]
    leaderboard.build(
        files,
        out,
        expected_cells=[tracks.as_dict(cell) for cell in track.cells(division)],
        title=f"{track.content['title']}: {division}",
        compares=track.divisions[division]["compares"],
        oracle_files=[file for file in masks if file.exists()],
    )


def _efficiency_board(track, division: str, files: list[Path], out: Path, layout) -> None:
    from prunebench.leaderboard import efficiency

    efficiency.build(track, files, out)


def _progress(arguments: argparse.Namespace) -> None:
    from prunebench import progress

    track = tracks.load(arguments.track)
    if arguments.watch is not None:
        progress.watch(track, arguments.division, arguments.runs, arguments.watch)
    else:
        sys.stdout.write(progress.show(track, arguments.division, arguments.runs) + "\n")


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


def _assets(arguments: argparse.Namespace) -> None:
    from prunebench.stages import assets as commands

    names = [
        *arguments.names,
        *(tracks.load_any(arguments.track).assets() if arguments.track else ()),
    ]
    if arguments.action == "fetch":
        if not (names or arguments.track):
            raise UserError("assets fetch: name assets, or a track with --track")
        commands.fetch_assets(names, arguments.record)
    elif arguments.action == "list":
        commands.list_assets(names)
    else:
        commands.verify_assets(names)
