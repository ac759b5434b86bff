"""Calibration sequences on which the dense model computes NaN or infinity: found, named, and left out if asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import SkippedRecord
from sleb_plugins import DataError, ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

# How much of a sequence is quoted to find it in its text, and how many are named on the screen.
QUOTED_TOKENS, QUOTED_CHARACTERS = 16, 40
NAMED = 5


@torch.inference_mode()
def find_bad(passes: Passes) -> tuple[SkippedRecord, ...]:
    """Return the sequences whose hidden states or losses in the dense model are not all finite, in their order."""
    blocks, batches = range(len(passes.skippable.switches)), range(len(passes.batches))

    def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[str, list[float]]]:
        if block == 0:
            yield "the embeddings", _are_finite(entering)
        yield f"block {block}", _are_finite(leaving)

    found = passes.score_states(batches, (), blocks, lambda: listen)
    for batch, _, losses in passes.score(NegativeLogLikelihood(), (), [(batch, ()) for batch in batches]):
        found[batch]["the head"] = [float(math.isfinite(loss)) for loss in losses]
    bad = []
    rows = [(batch, row) for batch in batches for row in range(len(passes.batches[batch]))]
    for number, (batch, row) in enumerate(rows, start=1):
        first = next((place for place, finite in found[batch].items() if not finite[row]), None)
        if first:
            bad.append(SkippedRecord(sequence=number, first=first))
    return tuple(bad)


def _are_finite(states: Tensor) -> list[float]:
    """Return 1 for each sequence whose hidden states, [batch, positions, hidden size], are all finite, else 0."""
    finite: list[float] = states.isfinite().flatten(1).all(1).float().tolist()
    return finite


def leave_out(calibration: Calibration, bad: Sequence[SkippedRecord], least: int, notify: Notify) -> Calibration:
    """Return the sequences but the bad ones.

    Raises:
        DataError: fewer than `least` are left.
    """
    if not bad:
        return calibration
    count = len(calibration.sequences)
    left = count - len(bad)
    if left < least:
        raise DataError(
            f"The model computes finite numbers on {left or 'none'} of the {count} calibration sequences, which is too "
            f"few: {_list(bad)}.",
            hint="Use other text or a data type with a wider range: --dtype bfloat16 or float32.",
        )
    notify(
        Notice(
            f"Skipped {len(bad)} of {count} calibration sequences on which the model computes NaN or infinity: "
            f"{_list(bad)}."
        )
    )
    return calibration.without(bad)


def unsound(
    model: str, dtype: torch.dtype, calibration: Calibration, tokenizer: Any, bad: Sequence[SkippedRecord]
) -> ModelError:
    """Return the error for a model that computes NaN or infinity; it names the first sequence and where they appear."""
    count, first = len(calibration.sequences), bad[0]
    row = first.sequence - 1
    text = tokenizer.decode(calibration.sequences[row, :QUOTED_TOKENS].tolist())[:QUOTED_CHARACTERS]
    others = f" {len(bad) - 1} more of the {count} sequences are like this." if len(bad) > 1 else ""
    skip = "" if len(bad) == count else " Or skip such sequences: --skip-bad-sequences."
    return ModelError(
        f"{model} computes NaN or infinity in {dtype_name(dtype)}, before any removal: in {first.first}, on "
        f"calibration sequence {first.sequence} of {count}, which is from {calibration.origins[row]} and begins "
        f"{text!r}.{others}",
        hint=wider_range(dtype) + skip,
    )


def _list(bad: Sequence[SkippedRecord]) -> str:
    named = ", ".join(f"{each.sequence} (first in {each.first})" for each in bad[:NAMED])
    return f"{named} and {len(bad) - NAMED} more" if len(bad) > NAMED else named
