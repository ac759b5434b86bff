"""Calibration sequences on which the dense model computes NaN or infinity: found, and named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, wider_range
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.text.calibration import Calibration
from sleb_plugins import ModelError
from sleb_plugins.metrics.nll import NegativeLogLikelihood

# How much of a sequence is quoted to find it in its text.
QUOTED_TOKENS, QUOTED_CHARACTERS = 16, 40


@torch.inference_mode()
def find_bad(passes: Passes) -> list[tuple[int, str]]:
    """Return the rows whose hidden states or losses in the dense model are not all finite, and where that begins."""
    blocks, batches = range(len(passes.skippable.switches)), passes.numbers

    def listen(block: int, entering: Tensor, leaving: Tensor) -> Iterable[tuple[str, list[float]]]:
        if block == 0:
            yield "the embeddings", _are_finite(entering)
        yield f"block {block}", _are_finite(leaving)

    found = passes.score_states(batches, (), blocks, lambda: listen)
    for batch, _, losses in passes.score(NegativeLogLikelihood(), (), [(batch, ()) for batch in batches]):
        found[batch]["the head"] = [float(math.isfinite(loss)) for loss in losses]
    bad = []
    rows = [(number, row) for number, ids in zip(batches, passes.batches, strict=True) for row in range(len(ids))]
    for number, (batch, row) in enumerate(rows):
        first = next((place for place, finite in found[batch].items() if not finite[row]), None)
        if first:
            bad.append((number, first))
    return bad


def _are_finite(states: Tensor) -> list[float]:
    """Return 1 for each sequence whose hidden states, [batch, positions, hidden size], are all finite, else 0."""
    finite: list[float] = states.isfinite().flatten(1).all(1).float().tolist()
    return finite


def unsound(
    model: str, dtype: torch.dtype, calibration: Calibration, tokenizer: Any, bad: Sequence[tuple[int, str]]
) -> ModelError:
    """Return the error for a model that computes NaN or infinity; it names the first sequence and where they appear."""
    count, (row, where) = len(calibration.sequences), bad[0]
    text = tokenizer.decode(calibration.sequences[row, :QUOTED_TOKENS].tolist())[:QUOTED_CHARACTERS]
    others = f" {len(bad) - 1} more of the {count} sequences are like this." if len(bad) > 1 else ""
    return ModelError(
        f"{model} computes NaN or infinity in {dtype_name(dtype)}, before any removal: in {where}, on "
        f"calibration sequence {row + 1} of {count}, which is from {calibration.origins[row]} and begins "
        f"{text!r}.{others}",
        hint=wider_range(dtype),
    )
