"""How long work will take, said before it starts: tokens go through blocks at the rate that is timed here."""

from __future__ import annotations

import timeit
from functools import partial

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, synchronize
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.events import Notice, Notify
from sleb_cli.units import format_seconds

LONG = 60.0
"""Work that takes longer, in seconds, is announced."""
MIN_PRODUCTS_PER_SECOND = 1e9
"""Every machine does as many products per second; work that would be short even so is not timed."""
SECONDS, SHARE = 0.1, 1 / 400
"""Timing goes on to more tokens until a block takes as long on more than this share of all: each call costs time."""


def announce(
    notify: Notify, what: str, tokens: float, skippable: SkippableModel, ids: Tensor, fewest: float | None = None
) -> None:
    """Announce work and how long it will take, if that is long.

    So many `tokens` go through a block, or the `fewest` if less is to do, the head counting as `head_blocks`; `ids` is
    a batch of them. Streamed blocks are not announced: reading them may take longer than computing.
    """
    weights = sum(weight.numel() for weight in skippable.switches[0].block.parameters())
    if tokens * weights <= LONG * MIN_PRODUCTS_PER_SECOND or not skippable.weights.resident:
        return
    seconds = tokens * in_smaller_pieces(partial(_seconds_per_token, skippable, ids, tokens), ids.numel())
    if seconds > LONG:
        where = "this CPU" if skippable.device.type == "cpu" else skippable.device
        dtype, least = dtype_name(skippable.model.dtype), seconds * (fewest or tokens) / tokens
        both = dict.fromkeys(map(format_seconds, (least, seconds)))
        notify(Notice(f"{what} in {dtype}: about {' to '.join(both)} on {where}."))


@torch.inference_mode()
def _seconds_per_token(skippable: SkippableModel, ids: Tensor, tokens: float, most: int) -> float:
    """Time a block on a share of `most` tokens of a batch, [batch, positions]: the first that takes long enough."""

    def run() -> None:
        skippable.run_block(call, call.entering)
        synchronize(skippable.device)

    for count in (most // 64, most // 16, most // 4, most):
        piece = ids[: max(1, count // ids.shape[1]), : max(2, count)]
        call = skippable.calls(piece)[0]
        seconds = min(timeit.repeat(run, number=1, repeat=3))  # the first run also warms up
        if seconds > SECONDS and piece.numel() > SHARE * tokens:
            break
    return seconds / piece.numel()
