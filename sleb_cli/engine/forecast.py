"""How long work will take, said before it starts: tokens times blocks and head, times a pace that is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sleb_cli.events import Notice, Notify
from sleb_cli.units import format_seconds

LONG = 60.0
"""Work that takes longer, in seconds, is announced."""

SLOWEST = 2e9
"""Operations per second that every machine does; what is short even so is not measured."""

RACE_SEQUENCES = 12
"""On about how many sequences a race scores a candidate, on average."""

STREAMED_ROUNDS = 3
"""How often a race of streamed blocks reads the model in a step."""

LEADER = 2 / 3
"""How far up among the candidates the block to remove is expected; the next step starts there."""


class Load(NamedTuple):
    """How many tokens go through a block and through the head, and how often a block is read from disk."""

    blocks: float
    head: float = 0.0
    reads: float = 0.0

    def times(self, share: float) -> Load:
        """Return this share of the load."""
        return Load(*(share * part for part in self))


@dataclass(frozen=True)
class Pace:
    """The seconds that a token takes in one block, and in the head with its score; and of reading one block."""

    block: float
    head: float
    read: float = 0.0

    def seconds(self, *loads: Load) -> float:
        """Return how long all loads take; blocks are read while others compute."""
        blocks, head, reads = map(sum, zip(*loads, strict=True))
        return max(blocks * self.block, reads * self.read) + head * self.head


def is_short(operations: float) -> bool:
    """Whether so many operations take no long time on any machine."""
    return operations <= LONG * SLOWEST


def announce(notify: Notify, what: str, seconds: float, device: torch.device, *, may_end_early: bool = False) -> None:
    """Tell what is about to start and how long it will take, if that is long."""
    if seconds > LONG:
        where = "this CPU" if device.type == "cpu" else str(device)
        about = "at most" if may_end_early else "about"
        notify(Notice(f"{what}: {about} {format_seconds(seconds)} on {where}."))


def walk_passes(blocks: Sequence[int], candidates: Sequence[int], start: int = 0) -> int:
    """Count how often a branch goes through one of `blocks` in a walk that starts at block `start`.

    The base ends at the last candidate, and each candidate's branch begins above it, or at `start`.
    """
    above = [block for block in blocks if block >= start]
    base = sum(block < candidates[-1] for block in above)
    return base + sum(block > candidate for candidate in candidates for block in above)


def passes_by_size(
    blocks: Sequence[int], candidates: Sequence[int], sizes: int, *, together: bool, keeps: bool
) -> list[float]:
    """Return, for each size that a search goes through, how many blocks one evaluation runs on average.

    Args:
        blocks: those that the model has at first.
        candidates: those that may be removed at first.
        sizes: how many removals there are.
        together: whether all candidates share a walk; otherwise each runs the whole model without it.
        keeps: whether a step starts where the one before removed a block.
    """
    blocks, left, start, found = list(blocks), list(candidates), 0, []
    for _ in range(min(sizes, len(left))):
        found.append(walk_passes(blocks, left, start) / len(left) if together else len(blocks) - 1.0)
        leader = left.pop(int(len(left) * LEADER))
        blocks.remove(leader)
        start = leader if keeps else 0
    return found


def padded_tokens(lengths: Sequence[int], batch: int) -> int:
    """Count the tokens of all batches, if the longest texts come first and each batch is as wide as its first one."""
    ordered = sorted(lengths, reverse=True)
    return sum(ordered[first] * len(ordered[first : first + batch]) for first in range(0, len(ordered), batch))
