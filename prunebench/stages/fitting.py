"""Training networks that are no denoisers: what `coder` and `decoder` share."""

from pathlib import Path

from torch import nn

from prunebench.errors import CellError, UserError
from prunebench.records.parts import Training
from prunebench.stages.job import Job
from prunebench.stages.work import checkpoints_of
from prunebench.tracks.settings_benchmark import Fitting
from prunebench.training import loop, parallel
from prunebench.training.budget import BudgetMeter


def fit(
    job: Job,
    network: nn.Module,
    data: loop.Data,
    settings: Fitting,
    loss: loop.Loss,
    key: str,
    *inputs: Path,
) -> dict:
    """Train a network in place, going on where an earlier start was.

    Args:
        key: of the settings in the track, for messages.
        inputs: files that it rests on; where one is another, an earlier start is of no use.

    Returns:
        what its record says of it: budget, loss (mean of the last tenth), training, earlier_s.

    Raises:
        UserError: the training diverges.
    """
    meter, checkpoints = BudgetMeter(), checkpoints_of(job, *inputs)
    progress = loop.Progress(settings.images // settings.batch)
    try:
        with meter.clock():
            losses = loop.train(
                meter.watch(network),
                data,
                settings.loop,
                images=settings.images,
                seed=settings.seed,
                muon_names=[],
                loss=loss,
                progress=progress,
                meter=meter,
                checkpoints=checkpoints,
            )
    except CellError as error:
        raise UserError(f"{key}: {error}; see its learning_rate") from error
    tail = losses[-max(1, len(losses) // 10) :]
    training = Training(
        batch=settings.batch,
        micro_batch=progress.micro_batch,
        processes=parallel.world(),
        resumed=checkpoints.resumed,
    )
    report = {"budget": meter.report(), "loss": sum(tail) / len(tail), "training": training}
    return {**report, "earlier_s": checkpoints.earlier_s}
