"""How long work will take, said before it starts: its operations, at the rate of blocks that are timed here."""

from __future__ import annotations

import time
from itertools import count

import torch
from torch import Tensor

from sleb_cli.engine.device import synchronize
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.events import Notice, Notify
from sleb_cli.units import format_seconds

LONG = 60.0
"""Work that takes longer, in seconds, is announced."""
SLOWEST = 2e9
"""Operations per second that every machine does; what is short even so is not measured."""
SECONDS = 0.4
"""About how long blocks are timed."""
FEWEST = 64
"""Tokens of the first, untimed run."""


def announce(
    notify: Notify,
    what: str,
    operations: float,
    skippable: SkippableModel,
    ids: Tensor,
    *,
    at_most: bool = False,
    processes: int = 1,
) -> None:
    """Tell what is about to start and how long it will take, if that is long; `ids` is a batch of its tokens.

    Nothing is told of blocks that are streamed: reading may take longer than computing.
    """
    if operations <= LONG * SLOWEST or not skippable.weights.resident:
        return
    seconds = operations / operations_per_second(skippable, ids) / processes
    if seconds > LONG:
        where = "this CPU" if skippable.device.type == "cpu" else str(skippable.device)
        notify(Notice(f"{what}: {'at most' if at_most else 'about'} {format_seconds(seconds)} on {where}."))


def block_operations(skippable: SkippableModel) -> float:
    """Return the operations of one token in one block: a multiplication and an addition for each weight."""
    return 2.0 * sum(weight.numel() for weight in skippable.switches[0].block.parameters())


@torch.inference_mode()
def operations_per_second(skippable: SkippableModel, ids: Tensor) -> float:
    """Time blocks on a batch, [batch, positions]: on pieces that grow up to all of it, as time and memory allow."""
    numbers = count()

    def timed(tokens: int) -> tuple[float, int]:
        piece = ids[: max(1, tokens // ids.shape[1]), : max(2, tokens)]
        call = skippable.calls(piece)[next(numbers) % len(skippable.switches)]
        synchronize(skippable.device)
        began = time.perf_counter()
        skippable.run_block(call, call.entering)
        synchronize(skippable.device)
        return time.perf_counter() - began, piece.numel()

    def measure(most: int) -> float:
        timed(min(FEWEST, most))
        tokens, found = min(2 * FEWEST, most), list[tuple[float, int]]()
        while sum(seconds for seconds, _ in found) < SECONDS:
            found.append(timed(tokens))
            tokens = min(2 * tokens, most)
        # The machine may be busy for a moment, so all pieces that are not much smaller count.
        near = [pair for pair in found if 4 * pair[1] > found[-1][1]]
        return sum(size for _, size in near) / sum(seconds for seconds, _ in near)

    return block_operations(skippable) * in_smaller_pieces(measure, ids.numel())
