"""Calibration sequences on which the dense model computes NaN or infinity: found, named, and left out if asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.forward.passes import Listener, Passes
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import SkippedRecord
from sleb_plugins import DataError, ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

# How much of a sequence is quoted to find it in its text, and how many are named on the screen.
QUOTED_TOKENS, QUOTED_CHARACTERS = 16, 40
NAMED = 5

_BEFORE_BLOCKS = -1


@torch.inference_mode()
def find_bad(passes: Passes) -> tuple[SkippedRecord, ...]:
    """Return the sequences whose hidden states or losses in the dense model are not all finite, in their order."""
    blocks, batches = range(len(passes.skippable.switches)), range(len(passes.batches))

    def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[int, list[float]]]:
        if block == 0:
            yield _BEFORE_BLOCKS, _are_finite(entering)
        yield block, _are_finite(leaving)

    def start() -> Listener[int]:
        return listen

    states = passes.score_states(batches, (), blocks, start)
    jobs = [(batch, ()) for batch in batches]
    losses = {batch: scores for batch, _, scores in passes.score(NegativeLogLikelihood(), (), jobs)}
    bad: list[SkippedRecord] = []
    rows = [(batch, row) for batch in batches for row in range(len(losses[batch]))]
    for number, (of, row) in enumerate(rows, start=1):
        first = next((place for place in (_BEFORE_BLOCKS, *blocks) if not states[of][place][row]), None)
        if first is not None or not math.isfinite(losses[of][row]):
            bad.append(SkippedRecord(sequence=number, first=_place(first)))
    return tuple(bad)


def _are_finite(states: Tensor) -> list[float]:
    """Return 1 for each sequence whose hidden states, [batch, positions, hidden size], are all finite, else 0."""
    finite: list[float] = states.isfinite().flatten(1).all(1).float().tolist()
    return finite


def _place(block: int | None) -> str:
    return "the head" if block is None else "the embeddings" if block == _BEFORE_BLOCKS else f"block {block}"


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
            f"Left out {len(bad)} of {count} calibration sequences, on which the model computes NaN or infinity: "
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
    skip = "" if len(bad) == count else " Or leave out such sequences: --skip-bad-sequences."
    return ModelError(
        f"{model} computes NaN or infinity in {dtype_name(dtype)}, before any removal: in {first.first}, on "
        f"calibration sequence {first.sequence} of {count}, which is from {calibration.origins[row]} and begins "
        f"{text!r}.{others}",
        hint=wider_range(dtype) + skip,
    )


def _list(bad: Sequence[SkippedRecord]) -> str:
    named = ", ".join(f"{each.sequence} (first in {each.first})" for each in bad[:NAMED])
    return f"{named} and {len(bad) - NAMED} more" if len(bad) > NAMED else named
