"""How fast a loaded model runs here, and with that, how long work will take: measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from sleb_cli.engine.device import in_smaller_pieces, synchronize
from sleb_cli.engine.forecast import Load, Pace, announce, is_short
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.events import Notify

SECONDS = 0.4
"""About how long blocks are timed, and the head."""
FEWEST = 64
"""Tokens of the first, untimed run."""
STRIDE = 7
"""From one timed block to the next, so that those of several kinds have their turn."""

Score = Callable[[Tensor, Tensor], object]
"""Takes what leaves the last block, [batch, positions, hidden size], and the tokens."""


def announce_passes(
    notify: Notify,
    what: str,
    skippable: SkippableModel,
    loads: Sequence[Load],
    ids: Tensor,
    score: Score,
    *,
    forks: bool = True,
    processes: int = 1,
    besides: Callable[[], float] = lambda: 0.0,
    may_end_early: bool = False,
) -> None:
    """Tell what is about to start and how long it will take, if that is long.

    Args:
        notify: the listener for events.
        what: the work.
        skippable: the model.
        loads: what goes through it.
        ids: a batch that will, [batch, positions].
        score: what the head is run for.
        forks: whether blocks can run on their own.
        processes: how many share the work.
        besides: returns the seconds of other work.
        may_end_early: whether all of it may not be needed.
    """
    blocks, head, _ = map(sum, zip(*loads, strict=True))
    elements = sum(weight.numel() for weight in skippable.switches[0].block.parameters())
    if not is_short(2 * elements * (blocks + head * skippable.head_blocks)):
        pace = measure_pace(skippable, ids, score) if forks else _pace_of_whole_passes(skippable, ids)
        seconds = (pace.seconds(*loads) + besides()) / processes
        announce(notify, what, seconds, skippable.device, may_end_early=may_end_early)


@torch.inference_mode()
def measure_pace(skippable: SkippableModel, ids: Tensor, score: Score) -> Pace:
    """Time blocks, and the head with its score, on a batch, [batch, positions], or on a part if it takes too long."""
    blocks, reads = count(0, STRIDE), [0.0]

    def block(piece: Tensor) -> float:
        number = next(blocks) % len(skippable.switches)
        call = skippable.calls(piece)[number]
        began = time.perf_counter()
        with skippable.loaded(number):
            reads.append(time.perf_counter() - began)
            return seconds_of(lambda: skippable.run_block(call, call.entering), skippable.device)

    def head(piece: Tensor) -> float:
        hidden = skippable.calls(piece)[0].entering
        return seconds_of(lambda: score(hidden, piece), skippable.device)

    resident = skippable.weights.resident
    return Pace(seconds_per_token(block, ids), seconds_per_token(head, ids), 0.0 if resident else max(reads))


@torch.inference_mode()
def _pace_of_whole_passes(skippable: SkippableModel, ids: Tensor) -> Pace:
    whole = seconds_per_token(lambda piece: seconds_of(lambda: skippable.logits(piece, ()), skippable.device), ids)
    return Pace(whole / len(skippable.switches), 0.0)


def seconds_per_token(timed: Callable[[Tensor], float], ids: Tensor) -> float:
    """Return the seconds per token of what `timed` times on a piece of `ids`, [batch, positions].

    Pieces grow up to all of `ids`, as long as there is time and memory.
    """

    def measure(most: int) -> float:
        timed(_piece(ids, min(FEWEST, most)))
        tokens, found = min(2 * FEWEST, most), list[tuple[float, int]]()
        while sum(seconds for seconds, _ in found) < SECONDS:
            piece = _piece(ids, tokens)
            found.append((timed(piece), piece.numel()))
            tokens = min(2 * tokens, most)
        # The machine may be busy for a moment, so all pieces that are not much smaller count.
        near = [(seconds, size) for seconds, size in found if 4 * size > found[-1][1]]
        return sum(seconds for seconds, _ in near) / sum(size for _, size in near)

    return in_smaller_pieces(measure, ids.numel())


def _piece(ids: Tensor, tokens: int) -> Tensor:
    """Return about so many tokens of a batch: whole sequences, or the start of one."""
    return ids[: max(1, tokens // ids.shape[1]), : max(2, tokens)]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return how long a run takes on a device."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began
