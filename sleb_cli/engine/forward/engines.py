"""Which way of skipping blocks gives the right numbers: the fastest one that agrees with whole passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sleb_cli.engine.device import OutOfMemory
from sleb_cli.engine.forward.fork import fork
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import States
from sleb_cli.plan import Engine
from sleb_plugins import UnsupportedModelError

_Logits = Iterator[tuple[int, Tensor]]


# The candidates and sequences on which two ways to score are compared before a search.
CHECKED_CANDIDATES = 4


CHECKED_SEQUENCES = 2


CHECKED_POSITIONS = 64


def choose_engine(skippable: SkippableModel, ids: Tensor) -> tuple[Engine, str | None]:
    """Take the fastest way that gives the numbers of one-at-a-time skipping; say why, where it is not the fork.

    Args:
        skippable: the model.
        ids: a few sequences, [batch, positions].
    """
    fork_fails = _why_not(skippable, ids, "forking", _fork_logits)
    if fork_fails is None:
        return "fork", None
    prefix_fails = _why_not(skippable, ids, "resuming", _prefix_logits)
    return ("prefix", fork_fails) if prefix_fails is None else ("plain", prefix_fails)


def _why_not(
    skippable: SkippableModel, ids: Tensor, name: str, way: Callable[[SkippableModel, Tensor, list[int]], _Logits]
) -> str | None:
    count = len(skippable.switches)
    blocks = sorted({round(part * (count - 1) / (CHECKED_CANDIDATES - 1)) for part in range(CHECKED_CANDIDATES)})
    blocks = list(range(count)) if count <= 2 * CHECKED_CANDIDATES else blocks
    try:
        for block, ours in way(skippable, ids, blocks):
            plain = skippable.logits(ids, {block}, last=CHECKED_POSITIONS)
            if not same_numbers(plain[:, -CHECKED_POSITIONS:], ours):
                return f"without block {block}, {name} there gives other logits than running the whole model"
    except OutOfMemory:
        raise
    except UnsupportedModelError as error:
        return error.message.rstrip(".")
    return None


def _fork_logits(skippable: SkippableModel, ids: Tensor, blocks: list[int]) -> _Logits:
    few = min(CHECKED_POSITIONS, ids.shape[1])
    parts = [slice(-few, -few // 2), slice(-few // 2, None)]
    for block, hidden in fork(skippable, ids, (), blocks, States()):
        if hidden.shape[:2] != ids.shape:
            raise UnsupportedModelError(f"{list(ids.shape)} tokens become {list(hidden.shape[:-1])} states", hint="")
        yield block, torch.cat([skippable.head(hidden[:, part], ids[:, part]) for part in parts], dim=1)


def _prefix_logits(skippable: SkippableModel, ids: Tensor, blocks: list[int]) -> _Logits:
    entering = skippable.entering_states(ids, ())
    for block in blocks:
        if block not in entering:
            raise UnsupportedModelError(f"block {block} is not called on every pass", hint="")
        yield (
            block,
            skippable.logits_from(block, entering[block], ids, (), last=CHECKED_POSITIONS)[:, -CHECKED_POSITIONS:],
        )


def same_numbers(left: Tensor, right: Tensor) -> bool:
    """Whether two logits of the same dtype differ by no more than its rounding, relative to their size."""
    if left.shape != right.shape or torch.equal(left, right):
        return left.shape == right.shape
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(left.dtype, 3e-2)
    scale = float(left.abs().max().float())
    return bool((left.float() - right.float()).abs().max() <= tolerance * scale)
