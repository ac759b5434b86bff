"""Hidden states that a search keeps for its next step, since a removal leaves them unchanged.

Below r, the model without r and j equals the model without j. So if a step's branches are kept at
some depth, and nothing below that depth is removed, the next step starts there with all of its
branches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

# The branch of the model as it stands; other branches are named by the candidate that they leave
# out.
BASE = -1


class States:
    """Hidden states of one batch, [batch, positions, hidden size], by block entered and branch."""

    def __init__(self) -> None:
        self.at: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)

    def deepest(self, branch: int, limit: int) -> int | None:
        """Return the greatest depth up to `limit` at which this branch is kept."""
        deepest = None
        for depth in sorted(self.at):
            if depth <= limit and branch in self.at[depth]:
                deepest = depth
        return deepest

    def after_removal(self, block: int) -> None:
        """Drop the states that change without `block`; its own branch becomes the base above it."""
        for depth in list(self.at):
            if depth <= block:
                continue
            branches = self.at.pop(depth)
            if block in branches:
                self.at[depth] = {BASE: branches[block]}

    def shrink(self, limit: int, useful: Sequence[int]) -> None:
        """Keep at most `limit` branches: the most useful depths first, then the deepest."""
        others = sorted(self.at.keys() - set(useful), reverse=True)
        count = 0
        for depth in [*useful, *others]:
            branches = len(self.at.get(depth, {}))
            if count + branches <= limit:
                count += branches
            else:
                self.at.pop(depth, None)


def depths_to_keep(
    ranking: Sequence[int], candidates: Sequence[int], limit: int, count: int
) -> dict[int, int]:
    """Choose the depths at which to keep branches for the next step, the most useful first.

    Also returns how many to keep at each.

    At most `limit` branches are kept in all. `ranking` has the best candidates, the best first, of
    which `count` are used.
    """
    # The next step starts at the block that this one removes, probably one of the best; without a
    # ranking, depths are spread evenly. The first candidate's depth comes first, because no step
    # changes the blocks below it.
    useful = ranking[:count]
    if not useful:
        useful = candidates[:: max(1, len(candidates) // (2 * count))]
    chosen: dict[int, int] = {}
    for depth in [*candidates[:1], *useful]:
        # The base, and one branch for every candidate below; the lowest save the most.
        branches = min(1 + sum(block < depth for block in candidates), limit - sum(chosen.values()))
        if branches > 0 and depth not in chosen:
            chosen[depth] = branches
    return chosen
