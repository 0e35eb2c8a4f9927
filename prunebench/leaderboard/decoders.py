"""The table of narrow decoders, beside the boards: a decoder is no part of the denoiser.

SnapFusion's part B (arXiv 2306.00980); see `prunebench.diffusion.narrow_decoder`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prunebench.leaderboard.collect import content_of, dense_folder
from prunebench.leaderboard.writers import (
    NOTHING,
    Column,
    Document,
    Table,
    plain_lines,
    to_csv,
    to_markdown,
)
from prunebench.records import sealed
from prunebench.records.parts import Quality
from prunebench.records.schema import Decoder

COLUMNS = (  # of a record
    Column("Model", lambda r: r.identity.model, False),
    Column("Dense seed", lambda r: f"{r.identity.dense_seed}"),
    Column("Width", lambda r: f"{r.width:.0%}"),
    Column("Parameters", lambda r: f"{r.parameters:,} of {r.whole_parameters:,}"),
    Column("MACs", lambda r: f"{r.macs:,} of {r.whole_macs:,}"),
    Column("Decoding (ms)", lambda r: f"{r.timing.ms:.3g} of {r.timing.dense_ms:.3g}"),
    Column("Speed-up", lambda r: f"{1 / r.timing.ratio:.2f}×"),
    Column("Alone", lambda r: {True: "yes", False: "no", None: NOTHING}[r.timing.alone], False),
    Column("PSNR (dB)", lambda r: _number(r.psnr, ".1f")),
    Column("FID", lambda r: _number(r.fid, ".2f")),
    Column("FID, own decoder", lambda r: _number(r.whole_fid, ".2f")),
    Column("Images", lambda r: f"{r.samples:,}"),
)
LEGEND = (
    "Each decoder learnt to decode as the autoencoder's own does, on latents that the dense model "
    "drew; the encoder and the denoiser are as they were, and no real image was used. It is "
    "combined with no pruned row.",
    "FID: of the dense model's images, decoded by it and by the autoencoder's own decoder. PSNR: "
    "between the two. Decoding: one batch, the two decoders taking turns.",
)


def _number(quality: Quality, form: str) -> str:
    return NOTHING if quality.value is None else f"{quality.value:{form}}"


@dataclass(frozen=True)
class Source:
    """One decoder.json as read: its bytes and content."""

    content: bytes
    record: Decoder

    @property
    def name(self) -> str:
        """Where its copy lies, relative to the table."""
        identity = self.record.identity
        return f"raw/{identity.model}/{dense_folder(identity.dense_seed)}decoder.json"


def read(files: Iterable[Path]) -> list[Source]:
    """Read the records of narrow decoders.

    Raises:
        UserError: a file is something else.
    """
    contents = {file: content_of(file) for file in files}
    return [Source(text, sealed.parse(file, text, Decoder)) for file, text in contents.items()]


def published(sources: list[Source]) -> dict[str, bytes]:
    """decoders.csv and decoders.md, and the raw records; nothing where there is none."""
    if not sources:
        return {}
    records = [source.record for source in sources]
    texts = {"decoders.csv": to_csv(numbers(records)), "decoders.md": to_markdown(_board(records))}
    raw = {source.name: source.content for source in sources}
    return {name: text.encode() for name, text in texts.items()} | raw


def numbers(records: list[Decoder]) -> pd.DataFrame:
    """One line per decoder, at full precision."""
    own = ("width", "draws", "parameters", "whole_parameters", "macs", "whole_macs", "samples")
    return pd.DataFrame(
        {
            "model": record.identity.model,
            "dense_seed": record.identity.dense_seed,
            **{name: getattr(record, name) for name in own},
            "ms": record.timing.ms,
            "whole_ms": record.timing.dense_ms,
            "alone": record.timing.alone,
            **{name: getattr(record, name).value for name in ("psnr", "fid", "whole_fid")},
        }
        for record in records
    )


def _board(records: list[Decoder]) -> Document:
    table = Table("Narrow decoders", COLUMNS, plain_lines(COLUMNS, records))
    track = {"Track": records[0].identity.track}
    return Document("Narrow decoders (SnapFusion, part B)", [table], track, LEGEND)
