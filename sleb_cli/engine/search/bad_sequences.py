"""Calibration sequences on which the dense model computes NaN or infinity: found, named, and left out if asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.forward.passes import Listener, Passes, prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import SkippedRecord
from sleb_cli.requests import SearchRequest
from sleb_plugins import DataError, ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

# How much of a sequence is quoted to find it in its text, and how many are named on the screen.
QUOTED_TOKENS, QUOTED_CHARACTERS = 16, 40
NAMED = 5

_BEFORE_BLOCKS = -1


@torch.inference_mode()
def find_bad(passes: Passes) -> tuple[SkippedRecord, ...]:
    """Return the sequences whose hidden states or losses in the dense model are not all finite, in their order."""
    blocks = range(len(passes.skippable.switches))

    def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[int, list[float]]]:
        if block == 0:
            yield _BEFORE_BLOCKS, _are_finite(entering)
        yield block, _are_finite(leaving)

    def start() -> Listener[int]:
        return listen

    batches = range(len(passes.batches))
    states = passes.score_states(batches, (), blocks, start)
    units = [(batch, ()) for batch in batches]
    losses = {batch: scores for batch, _, scores in passes.score_units(NegativeLogLikelihood(), (), units)}
    bad: list[SkippedRecord] = []
    number = 0
    for batch in batches:
        for row, loss in enumerate(losses[batch]):
            number += 1
            first = next((place for place in (_BEFORE_BLOCKS, *blocks) if not states[batch][place][row]), None)
            if first is not None or not math.isfinite(loss):
                bad.append(SkippedRecord(sequence=number, first=_place(first)))
    return tuple(bad)


def _are_finite(states: Tensor) -> list[float]:
    """Return 1 for each sequence whose hidden states, [batch, positions, hidden size], are all finite, else 0."""
    finite: list[float] = states.isfinite().flatten(1).all(1).float().tolist()
    return finite


def _place(block: int | None) -> str:
    return "the head" if block is None else "the embeddings" if block == _BEFORE_BLOCKS else f"block {block}"


def leave_out_bad(
    request: SearchRequest,
    calibration: Calibration,
    model: Callable[[], SkippableModel],
    group: ProcessGroup,
    notify: Notify,
) -> Calibration:
    """Return the sequences on which the dense model computes finite numbers; the main process decides which.

    Raises:
        DataError: too few are left.
    """

    def find() -> tuple[SkippedRecord, ...]:
        with model() as skippable, task(notify, "Looking for bad sequences"):
            whole = calibration.to(skippable.device)
            passes, _ = prepare_passes(
                skippable,
                whole.sequences,
                notify,
                loss_mask=whole.loss_mask,
                memory=None if request.memory is None else str(request.memory),
                batch_size=request.batch_size,
                spill_to=request.plan_file.absolute().parent,
            )
            return find_bad(passes)

    bad = group.from_main(find)
    count = len(calibration.sequences)
    if not bad:
        return calibration
    left = count - len(bad)
    if left < (2 if request.holdout else 1):
        raise DataError(
            f"The model computes finite numbers on {left or 'none'} of the {count} calibration sequences, which is too "
            f"few: {_list(bad)}.",
            hint="Use other text or a data type with a wider range: --dtype bfloat16 or float32.",
        )
    notify(
        Notice(
            f"Left out {len(bad)} of {count} calibration sequences, on which the model computes numbers that are not "
            f"finite: {_list(bad)}."
        )
    )
    return calibration.without(bad)


def require_sound(
    model: str, calibration: Calibration, tokenizer: Any, passes: Passes, journal: Journal, group: ProcessGroup
) -> None:
    """Check that the dense model computes finite numbers on all sequences, those held out included.

    What was measured on sequences that are not all sound is forgotten.

    Raises:
        ModelError: it does not; the message names the first sequence and where in the model they appear.
    """
    whole = calibration.to(passes.skippable.device)
    bad = group.from_main(lambda: find_bad(passes.over(whole.sequences, whole.loss_mask)))
    if not bad:
        return
    journal.known.clear()
    dtype, count, first = passes.skippable.model.dtype, len(whole.sequences), bad[0]
    row = first.sequence - 1
    text = tokenizer.decode(calibration.sequences[row, :QUOTED_TOKENS].tolist())[:QUOTED_CHARACTERS]
    others = f" {len(bad) - 1} more of the {count} sequences are like this." if len(bad) > 1 else ""
    skip = "" if len(bad) == count else " Or leave out such sequences: --skip-bad-sequences."
    raise ModelError(
        f"{model} computes NaN or infinity in {dtype_name(dtype)}, before any removal: in {first.first}, on "
        f"calibration sequence {first.sequence} of {count}, which is from {calibration.origins[row]} and begins "
        f"{text!r}.{others}",
        hint=wider_range(dtype) + skip,
    )


def _list(bad: Sequence[SkippedRecord]) -> str:
    named = ", ".join(f"{each.sequence} (first in {each.first})" for each in bad[:NAMED])
    return f"{named} and {len(bad) - NAMED} more" if len(bad) > NAMED else named
