"""What one step of a search knows about the next: hidden states that a removal left as they were.

The model without r and j is, below r, the model without j. So where the rows of a step are remembered at some depth,
and nothing below that depth is removed, the next step begins there, with every row in its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

# The row of the model as it stands; other rows are named by the candidate that they are without.
BASE = -1


class States:
    """Hidden states of one batch, [batch, positions, hidden size], by depth (the block that they enter) and row."""

    def __init__(self) -> None:
        self.at: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)

    def deepest(self, branch: int, limit: int) -> int | None:
        """Give the greatest depth up to `limit` at which this row is known."""
        return max(
            (depth for depth, branches in self.at.items() if depth <= limit and branch in branches), default=None
        )

    def after_removal(self, block: int) -> None:
        """Keep what still holds when `block` is gone: all that it did not touch, and its own row, the new base."""
        for depth in [depth for depth in self.at if depth > block]:
            branches = self.at.pop(depth)
            if block in branches:
                self.at[depth] = {BASE: branches[block]}

    def shrink(self, limit: int, wanted: Sequence[int]) -> None:
        """Keep no more than `limit` rows, letting go first of depths that nobody wants, then of the least wanted."""
        kept = 0
        for depth in [*wanted, *sorted(self.at.keys() - set(wanted), reverse=True)]:
            if depth in self.at:
                kept += len(self.at[depth])
                if kept > limit:
                    kept -= len(self.at.pop(depth))


def depths_to_keep(ranking: Sequence[int], candidates: Sequence[int], limit: int, count: int) -> dict[int, int]:
    """Choose the depths at which the next step would best begin, the most wanted first, and how many rows to keep.

    What lies below the first candidate is the same in every step, so that depth comes first. The next step will begin
    at the block which this one removes: probably one of the `count` best of `ranking` (the best first); where it knows
    nothing yet, depths are spread evenly. At each depth there are the base row and one for every candidate below, of
    which the lowest have come furthest. Altogether at most `limit` rows are kept.
    """
    spread = candidates[:: max(1, len(candidates) // (2 * count))]
    chosen: dict[int, int] = {}
    for depth in [*candidates[:1], *(ranking[:count] or spread)]:
        branches = min(1 + sum(block < depth for block in candidates), limit - sum(chosen.values()))
        if branches > 0 and depth not in chosen:
            chosen[depth] = branches
    return chosen
