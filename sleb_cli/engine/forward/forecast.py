"""How long work will take, said before it starts: its operations, at the rate of a block that is timed here."""

from __future__ import annotations

import timeit
from functools import partial

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
SECONDS = 0.1
"""What a block takes on enough tokens to be timed."""
SHARES = 64, 16, 4, 1
"""It is timed on a 64th of a batch, or on more if that is too fast."""


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
    rate = in_smaller_pieces(partial(_operations_per_second, skippable, ids), ids.numel())
    if (seconds := operations / rate / processes) > LONG:
        where = "this CPU" if skippable.device.type == "cpu" else str(skippable.device)
        notify(Notice(f"{what}: {'at most' if at_most else 'about'} {format_seconds(seconds)} on {where}."))


def block_operations(skippable: SkippableModel) -> float:
    """Return the operations of one token in one block: a multiplication and an addition for each weight."""
    return 2.0 * sum(weight.numel() for weight in skippable.switches[0].block.parameters())


@torch.inference_mode()
def _operations_per_second(skippable: SkippableModel, ids: Tensor, most: int) -> float:
    """Time a block on a share of `most` tokens of a batch, [batch, positions]: the first that takes long enough."""

    def run() -> None:
        skippable.run_block(call, call.entering)
        synchronize(skippable.device)

    for share in SHARES:
        tokens = most // share
        piece = ids[: max(1, tokens // ids.shape[1]), : max(2, tokens)]
        call = skippable.calls(piece)[0]
        seconds = min(timeit.repeat(run, number=1, repeat=3))  # the first run is slower
        if seconds > SECONDS:
            break
    return block_operations(skippable) * piece.numel() / seconds
