"""Find and name the calibration sequences on which the dense model computes NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, hint_for_nonfinite
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.spans import Span
from sleb_cli.engine.model.padded import ids_of
from sleb_cli.engine.search.inputs import SearchInputs
from sleb_cli.engine.search.journal import Journal
from sleb_cli.engine.search.settings import Search
from sleb_plugins import ModelError

# How much of a sequence is quoted to find it in its text.
QUOTED_TOKENS = 16
QUOTED_CHARACTERS = 40


def require_sound(search: Search, inputs: SearchInputs, passes: Passes, journal: Journal) -> None:
    """Check that the dense model computes finite numbers; otherwise forget what was measured.

    Raises:
        ModelError: it does not. The error names the first such sequence, and where that begins.
    """
    calibration = inputs.calibration
    whole = calibration.to(inputs.model.device)
    bad = inputs.group.from_main(
        lambda: _find_bad_sequences(passes.over(whole.sequences, whole.loss_mask))
    )
    if not bad:
        return
    journal.forget()
    row, where = bad[0]
    count = len(calibration.sequences)
    dtype = search.placement.dtype
    text = inputs.tokenizer.decode(ids_of(calibration.sequences)[row, :QUOTED_TOKENS].tolist())
    message = (
        f"{search.architecture.source.id} computes NaN or infinity in {dtype_name(dtype)}, before "
        f"any removal: in {where}, on calibration sequence {row + 1} of {count}, which is from "
        f"{calibration.origins[row]} and begins {text[:QUOTED_CHARACTERS]!r}."
    )
    if len(bad) > 1:
        message += f" {len(bad) - 1} more of the {count} sequences are like this."
    raise ModelError(message, hint=hint_for_nonfinite(dtype))


@torch.inference_mode()
def _find_bad_sequences(passes: Passes) -> list[tuple[int, str]]:
    """Return the rows whose dense states or loss are not finite, and where that begins."""
    blocks = range(len(passes.skippable.switches))
    finite = passes.score_states(passes.numbers, (), blocks, _finite_sides)
    bad = []
    first_row = 0
    jobs = [(batch, ()) for batch in passes.numbers]
    for batch, _, losses in passes.score(passes.skippable.ending.loss_metric, (), jobs):
        for row, loss in enumerate(losses):
            where = _first_nonfinite(finite[batch], row)
            if where is None and not math.isfinite(loss):
                where = "the head"
            if where is not None:
                bad.append((first_row + row, where))
        first_row += len(losses)
    return bad


def _finite_sides(entering: Tensor, leaving: Tensor, mask: Tensor | None) -> list[float]:
    # For each sequence 2 if its states before and after the block are finite, 1 if only those
    # before are, else 0.
    before = entering.isfinite().flatten(1).all(1)
    after = leaving.isfinite().flatten(1).all(1)
    sides: list[float] = (before.float() + (before & after).float()).tolist()
    return sides


def _first_nonfinite(finite: Mapping[Span, Sequence[float]], row: int) -> str | None:
    for (block, _), sides in finite.items():
        if sides[row] == 0:
            return "the embeddings"
        if sides[row] == 1:
            return f"block {block}"
    return None
