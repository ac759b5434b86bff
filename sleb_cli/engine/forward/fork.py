"""The forking forward: one walk up the blocks runs the model without each candidate, however many there are.

To skip a block is to hand its input on. So the model without block j is the model itself up to j, and one walk can
serve all candidates: it carries a *base* row, and where it comes to a candidate's block, that candidate's row forks off
as a copy of the block's input, while the base row goes through. A row is the hidden states of one batch of
sequences, [batch, positions, hidden size]. Half of the block work is saved, and the rest is done once.

Every row goes through a block in a call of its own, in the very shape in which the model itself would run without that
candidate. So the numbers are those of one-at-a-time skipping, bit for bit, and depend neither on who else is on the
walk, nor on where it began, nor on how much memory there is: a search can be cut short, resumed, raced and squeezed
without changing a digit. Larger calls would gain nothing once a batch fills the device's matrix units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.forward.states import BASE, States


class Walk:
    """One batch on its way up: the base row, and the candidates' rows that have forked off from it.

    Call `climb` for each block from `start` on, in order. Nothing else is assumed: all blocks for one batch, or all
    batches for one block, whose weights are then needed only once. Without candidates, the base row goes to the top.
    """

    def __init__(
        self,
        skippable: SkippableModel,
        calls: Sequence[Call],
        states: States,
        removed: Collection[int],
        candidates: Sequence[int],
    ) -> None:
        self.skippable, self.calls, self.states, self.removed = skippable, calls, states, removed
        self.branches: dict[int, Tensor] = {}
        known = {branch: states.deepest(branch, len(calls)) for branch in candidates}
        self.forks = [branch for branch, depth in known.items() if depth is None]
        self.enters = {branch: depth for branch, depth in known.items() if depth is not None}
        if self.forks or not candidates:
            states.at[0].setdefault(BASE, calls[0].entering)
            self.enters[BASE] = states.deepest(BASE, min(self.forks, default=len(calls))) or 0
        self.start = min(self.enters.values())

    @property
    def block_branches(self) -> int:
        """How many rows will go through a block, from start to end."""
        stays = [block for block in range(len(self.calls)) if block not in self.removed]
        ends = {BASE: self.forks[-1]} if self.forks else {}
        begins = self.enters | {block: block + 1 for block in self.forks}
        return sum(begin <= block < ends.get(branch, block + 1) for branch, begin in begins.items() for block in stays)

    def climb(self, block: int) -> None:
        """Take every row on the walk through `block`, except the row of the model without it."""
        self.branches |= {
            branch: self.states.at[block][branch] for branch, depth in self.enters.items() if depth == block
        }
        if block in self.forks:
            self.branches[block] = self.branches[BASE]
            if block == self.forks[-1]:  # nobody else forks off: the base row goes no further
                self.states.at[block][BASE] = self.branches.pop(BASE)
        if block not in self.removed:
            for branch in [branch for branch in self.branches if branch != block]:
                self.branches[branch] = self.skippable.run_block(self.calls[block], self.branches[branch])

    def keep(self, depth: int, count: int) -> None:
        """Remember the `count` lowest rows that are about to enter the block at `depth`."""
        self.states.at[depth] |= {branch: self.branches[branch] for branch in sorted(self.branches)[:count]}


def fork(
    skippable: SkippableModel,
    ids: Tensor,
    removed: Collection[int],
    candidates: Sequence[int],
    states: States,
    *,
    keep: Mapping[int, int] = MappingProxyType({}),
    at_once: int | None = None,
    climbed: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[tuple[int, Tensor]]:
    """Give what leaves the last block without each candidate (or, where there is none, of the model as it stands).

    Args:
        skippable: the model.
        ids: tokens, [batch, positions].
        removed: blocks that are gone.
        candidates: ascending; their rows come in this order, each [batch, positions, hidden size].
        states: what is known of this batch, and takes in what is to be kept.
        keep: at which depths, and how many rows there.
        at_once: as many candidates share a walk; the next walk goes on where the base row was left.
        climbed: told after each block how many rows went through it, and of how many on this walk.
    """
    calls = skippable.calls(ids)
    size = at_once or len(candidates) or 1
    for first in range(0, len(candidates) or 1, size):
        group = candidates[first : first + size]
        walk = Walk(skippable, calls, states, removed, group)
        of = walk.block_branches
        if not of:  # without the candidate, no block is left to run
            climbed(1, 1)
        for block in range(walk.start, len(calls)):
            if block in keep:
                walk.keep(block, keep[block])
            walk.climb(block)
            if of:
                climbed(0 if block in removed else len(walk.branches) - (block in walk.branches), of)
        for branch in group or [BASE]:
            yield branch, walk.branches.pop(branch)
