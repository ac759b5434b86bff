"""Check that the fork gives a model's own numbers; if not, candidates are scored one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from sleb_cli.engine.forward.fork import fork
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.model.padded import Tokens
from sleb_plugins import UnsupportedModelError

# How many candidates and sequences are compared before a search.
CHECKED_CANDIDATES = 4
CHECKED_SEQUENCES = 2


def why_not_fork(skippable: SkippableModel, ids: Tokens) -> str | None:
    """Compare a few of the fork's results with whole passes'; return a clause on a fault."""
    count = len(skippable.switches)
    if not skippable.weights.resident:
        blocks = [count // 2]  # each whole pass reads all weights
    elif count <= 2 * CHECKED_CANDIDATES:
        blocks = list(range(count))
    else:
        distance = (count - 1) / (CHECKED_CANDIDATES - 1)
        blocks = [round(step * distance) for step in range(CHECKED_CANDIDATES)]
    few = min(CHECKED_SEQUENCES, len(ids))
    try:
        return in_smaller_pieces(lambda size: _difference(skippable, ids[:size], blocks), few)
    except UnsupportedModelError as error:
        return error.message.rstrip(".")


def _difference(skippable: SkippableModel, ids: Tokens, blocks: list[int]) -> str | None:
    for block, hidden in fork(skippable, ids, (), blocks).items():
        if hidden.shape[:2] != ids.shape:
            return f"{list(ids.shape)} tokens become {list(hidden.shape[:-1])} states"
        forked, plain = skippable.ending.both_ways(skippable, ids, hidden, block)
        if not equal_up_to_rounding(plain, forked):
            return f"without block {block}, the fork's results differ from those of the whole model"
    return None


def equal_up_to_rounding(left: Tensor, right: Tensor) -> bool:
    """Whether two logits of one dtype differ by no more than its rounding, relative to their size.

    Logits must be finite in both or in neither; NaN and infinities count as equal.
    """
    if left.shape != right.shape:
        return False
    if torch.equal(left, right):
        return True
    finite = left.isfinite()
    if not bool(finite.all()):
        if not torch.equal(finite, right.isfinite()):
            return False
        if not bool(finite.any()):
            return True
        left = left[finite]
        right = right[finite]
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(left.dtype, 3e-2)
    scale = float(left.abs().max().float())
    return bool((left.float() - right.float()).abs().max() <= tolerance * scale)
