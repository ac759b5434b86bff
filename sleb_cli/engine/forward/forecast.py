"""How long will work take? Tokens go through blocks at the rate that is timed here."""

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
"""Work of more seconds is announced."""
MIN_PRODUCTS_PER_SECOND = 1e9
"""Of any machine; work that would be short even so is not timed."""
SECONDS, SHARE = 0.1, 1 / 400
"""Timing goes on to more tokens until a block takes so long on more than this share of all: each
call costs time.
"""


def announce(
    notify: Notify,
    title: str,
    tokens: float,
    skippable: SkippableModel,
    ids: Tensor,
    min_tokens: float | None = None,
) -> None:
    """Announce long work, in which so many `tokens` go through a block, or at least `min_tokens` if
    it may end early.

    The head counts as `head_blocks`; `ids`, [batch, positions], is a batch of the work.
    """
    weights = sum(weight.numel() for weight in skippable.switches[0].block.parameters())
    if tokens * weights <= LONG * MIN_PRODUCTS_PER_SECOND:
        return
    if not skippable.weights.resident:  # reading streamed blocks may take longer than computing
        return
    seconds = tokens * in_smaller_pieces(
        partial(_seconds_per_token, skippable, ids, tokens), ids.numel()
    )
    if seconds > LONG:
        device = "this CPU" if skippable.device.type == "cpu" else skippable.device
        dtype, min_seconds = (
            dtype_name(skippable.model.dtype),
            seconds * (min_tokens or tokens) / tokens,
        )
        range_of_seconds = dict.fromkeys(map(format_seconds, (min_seconds, seconds)))
        notify(Notice(f"{title} in {dtype}: about {' to '.join(range_of_seconds)} on {device}."))


@torch.inference_mode()
def _seconds_per_token(
    skippable: SkippableModel, ids: Tensor, tokens: float, batch_tokens: int
) -> float:
    def run() -> None:
        skippable.run_block(call, call.entering)
        synchronize(skippable.device)

    for count in (batch_tokens // 64, batch_tokens // 16, batch_tokens // 4, batch_tokens):
        piece = ids[: max(1, count // ids.shape[1]), : max(2, count)]
        call = skippable.calls(piece)[0]
        seconds = min(timeit.repeat(run, number=1, repeat=3))  # the first run also warms up
        if seconds > SECONDS and piece.numel() > SHARE * tokens:
            break
    return seconds / piece.numel()
