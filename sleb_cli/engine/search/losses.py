"""The losses of the dense and the pruned models, as a plan records them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from statistics import fmean

from sleb_cli.engine.device import dtype_name, hint_for_nonfinite
from sleb_cli.engine.search.held_out import MAX_ERROR_RATE, overfitting_test
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.events import task
from sleb_cli.order import SizeKey
from sleb_cli.plan import DenseRecord, HeldOutRecord
from sleb_plugins import ModelError

MAX_LOSS = math.log(sys.float_info.max)
"""In nats per token; the perplexity of a larger one is no finite number."""


def measure_dense(scoring: Scoring, name: str) -> DenseRecord:
    """Measure the losses of the dense model, which messages call `name`."""
    with task(
        scoring.notify, "Measuring the dense model", scoring.sequences, "sequences"
    ) as advance:
        losses = scoring.losses((), advance=advance)
    measured = list(losses)
    if scoring.held_out:
        measured += scoring.losses((), held_out=True)
    if not all(math.isfinite(loss) for loss in measured):
        scoring.require_sound()
    opening = f"In {name}"
    loss = fmean(losses)
    return DenseRecord(
        loss=loss,
        perplexity=perplexity(scoring, loss, opening),
        held_out=measure_held_out(scoring, (), opening),
    )


def measure_together(scoring: Scoring, sizes: Sequence[SizeKey]) -> None:
    """Measure the losses without each of these sets of blocks, which share their walks."""
    if not scoring.passes.forks:
        return  # each is measured when it is asked for
    unknown = [removed for removed in sizes if not scoring.scored_losses(removed)]
    if unknown:
        evaluations = len(unknown) * scoring.sequences
        with task(scoring.notify, "Measuring all sizes", evaluations, "evaluations") as advance:
            scoring.measure_losses(unknown, advance=advance)
    if scoring.held_out:
        scoring.measure_losses(sizes, held_out=True)


def measure_held_out(
    scoring: Scoring, removed: tuple[int, ...], opening: str, comparisons: int = 1
) -> HeldOutRecord | None:
    """Measure the loss on held-out sequences, and whether the pruned model overfits.

    If there is none, the chance that any of so many `comparisons` finds overfitting is
    `MAX_ERROR_RATE`.
    """
    if scoring.held_out is None:
        return None
    losses = scoring.losses(removed, held_out=True)
    loss = fmean(losses)
    record = HeldOutRecord(loss=loss, perplexity=perplexity(scoring, loss, opening))
    if not removed:
        return record
    searched = _increases(scoring.losses(()), scoring.losses(removed))
    held_out = _increases(scoring.losses((), held_out=True), losses)
    gap, error, overfits = overfitting_test(searched, held_out, MAX_ERROR_RATE / comparisons)
    return record.model_copy(
        update={"generalization_gap": gap, "standard_error": error, "overfits": overfits}
    )


def _increases(dense: Sequence[float], pruned: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(dense, pruned, strict=True)]


def perplexity(scoring: Scoring, loss: float, opening: str) -> float | None:
    """Return the perplexity, or None of a model that only reads.

    Raises:
        ModelError: it is not finite; the message begins with `opening` ("Without block 5").
    """
    dtype = scoring.passes.skippable.model.dtype
    if scoring.passes.skippable.ending.output:
        if math.isfinite(loss):
            return None
        raise ModelError(
            f"{opening}, the distance is {loss} in {dtype_name(dtype)}.",
            hint=hint_for_nonfinite(dtype),
        )
    if not loss < MAX_LOSS:
        raise ModelError(
            f"{opening}, the calibration loss is {loss} in {dtype_name(dtype)}, so the perplexity "
            "is not finite.",
            hint=hint_for_nonfinite(dtype),
        )
    return math.exp(loss)
