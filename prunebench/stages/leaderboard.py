"""The leaderboard of a division: a pure function of the records of its scored cells."""

from pathlib import Path

from prunebench import leaderboard as boards
from prunebench import tracks
from prunebench.leaderboard import efficiency
from prunebench.stages.job import Job


def leaderboard(job: Job) -> None:
    """Build a division's tables, plots and page, of a track of either kind.

    The job may name its "division", by default the track's first; a folder "out" for what is built;
    and whether it is "partial", of what is finished.
    """
    track = job.track
    division = job.names.get("division") or track.default_division
    files = [Path(record) for record in track.records(division, job.runs)]
    if job.names.get("partial"):
        files = [file for file in files if file.exists()]
    out = Path(job.names.get("out") or job.layout.leaderboard(division))
    if track.kind == "efficiency":
        efficiency.build(track, files, out)
    else:
        _benchmark(job, division, files, out)


def _benchmark(job: Job, division: str, files: list[Path], out: Path) -> None:
    track = job.track
    own = division == track.default_division  # the one whose selections the oracle is about
    masks = [Path(job.layout.record("oracle", **place)) for place in track.oracle() if own]
    narrow = [Path(job.layout.record("decoder", **names)) for names in track.decoders()]
    boards.build(
        files,
        out,
        expected_cells=[tracks.as_dict(cell) for cell in track.cells(division)],
        title=f"{track.settings.title}: {division}",
        compares=track.divisions[division].compares,
        oracle_files=[file for file in masks if file.exists()],
        decoder_files=[file for file in narrow if file.exists()],
    )
