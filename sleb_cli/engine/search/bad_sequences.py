"""Find and name the calibration sequences on which the dense model computes NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, hint_for_nonfinite
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.text.calibration import Calibration
from sleb_plugins import ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

# How much of a sequence is quoted to find it in its text.
QUOTED_TOKENS, QUOTED_CHARACTERS = 16, 40


@torch.inference_mode()
def find_bad_sequences(passes: Passes) -> list[tuple[int, str]]:
    """Return the rows whose hidden states or loss are not finite in the dense model, and where that
    begins.
    """
    states = passes.score_states(
        passes.numbers, (), range(len(passes.skippable.switches)), _finite_sides
    )
    starts = []
    for batch, _, losses in passes.score(
        NegativeLogLikelihood(), (), [(batch, ()) for batch in passes.numbers]
    ):
        for row, loss in enumerate(losses):
            first = next(
                (block for (block, _), sides in states[batch].items() if sides[row] < 2), None
            )
            if first is not None:
                starts.append(
                    f"block {first}" if states[batch][first, first][row] else "the embeddings"
                )
            else:
                starts.append("" if math.isfinite(loss) else "the head")
    return [(row, where) for row, where in enumerate(starts) if where]


def _finite_sides(entering: Tensor, leaving: Tensor) -> list[float]:
    # For each sequence 2 if its states before and after the block are finite, 1 if only those
    # before are, else 0.
    before, after = (states.isfinite().flatten(1).all(1) for states in (entering, leaving))
    sides: list[float] = (before.float() + (before & after).float()).tolist()
    return sides


def bad_sequences_error(
    model: str,
    dtype: torch.dtype,
    calibration: Calibration,
    tokenizer: Any,
    bad: Sequence[tuple[int, str]],
) -> ModelError:
    """Name the first of the sequences on which the model computes NaN or infinity, and where, in an
    error.
    """
    count, (row, where) = len(calibration.sequences), bad[0]
    text = tokenizer.decode(calibration.sequences[row, :QUOTED_TOKENS].tolist())[:QUOTED_CHARACTERS]
    others = f" {len(bad) - 1} more of the {count} sequences are like this." if len(bad) > 1 else ""
    return ModelError(
        f"{model} computes NaN or infinity in {dtype_name(dtype)}, before any removal: in {where}, "
        f"on "
        f"calibration sequence {row + 1} of {count}, which is from {calibration.origins[row]} and "
        f"begins "
        f"{text!r}.{others}",
        hint=hint_for_nonfinite(dtype),
    )
