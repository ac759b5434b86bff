"""The forking forward: a single walk through the blocks runs the model without each of any number
of candidates.

To skip a block is to pass its input on, so the model without block j equals the model itself up to
j. A walk carries a
*base* branch; at a candidate's block, the candidate's branch forks off as a copy of the block's
input, while the base goes through the block. A branch is the hidden states of one batch, [batch,
positions, hidden size]. This halves the block work, and the rest is done once.

Every branch goes through a block in a call of its own, in the shape in which the model would run
without the candidate. So the numbers equal one-at-a-time skipping, bit for bit, whatever other
candidates walk along and wherever the walk starts; only the size of a batch can change the last
bits. Larger calls would gain nothing once a batch fills the device's matrix units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from types import MappingProxyType

from torch import Tensor

from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.forward.states import BASE, States
from sleb_cli.engine.forward.stores import Store, keep_on_device


class Walk:
    """One batch on its way through the blocks: the base branch, and the candidates' branches that
    forked off from it.

    Call `advance` for each block from `start` on, in order (`walk_together` does). Without
    candidates, or with BASE alone, the base goes through all blocks that have a call. `watch` is
    called before a block runs; `keep` says how many of the lowest branches to keep at a depth.
    """

    def __init__(
        self,
        skippable: SkippableModel,
        calls: Sequence[Call],
        states: States,
        removed: Collection[int],
        candidates: Sequence[int],
        *,
        keep: Mapping[int, int] = MappingProxyType({}),
        store: Store = keep_on_device,
        watch: Callable[[], object] = lambda: None,
    ) -> None:
        self.skippable, self.calls, self.states, self.removed = skippable, calls, states, removed
        self.keep, self.store, self.watch = keep, store, watch
        self.branches: dict[int, Tensor] = {}
        candidates = [block for block in candidates if block != BASE]
        known = {branch: states.deepest(branch, len(calls)) for branch in candidates}
        self.forks = [branch for branch, depth in known.items() if depth is None]
        self.entry_depth = {branch: depth for branch, depth in known.items() if depth is not None}
        if self.forks or not candidates:
            states.at[0].setdefault(BASE, calls[0].entering)
            self.entry_depth[BASE] = states.deepest(BASE, min(self.forks, default=len(calls))) or 0
        self.start = min(self.entry_depth.values())

    @cached_property
    def block_runs(self) -> int:
        """How often a branch goes through a block, on the whole walk."""
        staying = [block for block in range(len(self.calls)) if block not in self.removed]
        ends = {BASE: self.forks[-1]} if self.forks else {}
        begins = self.entry_depth | {block: block + 1 for block in self.forks}
        return sum(
            begin <= block < ends.get(branch, block + 1)
            for branch, begin in begins.items()
            for block in staying
        )

    def advance(self, block: int) -> None:
        """Run `block` on every branch of the walk, except the branch that leaves it out."""
        if block in self.keep:
            lowest = sorted(self.branches)[: self.keep[block]]
            self.states.at[block] |= {branch: self.branches[branch] for branch in lowest}
        self.enter(block)
        if block in self.forks:
            self.branches[block] = self.branches[BASE]
            if block == self.forks[-1]:  # no branch forks off later, so the base ends here
                self.states.at[block][BASE] = self.branches.pop(BASE)
        if block not in self.removed:
            self.watch()
            for branch in [branch for branch in self.branches if branch != block]:
                self.branches[branch] = self.store(
                    self.skippable.run_block(self.calls[block], self.branches[branch])
                )

    def enter(self, depth: int) -> None:
        """Take up the branches whose kept states enter the block at `depth`, or lie behind the last
        block.
        """
        self.branches |= {
            branch: self.states.at[depth][branch]
            for branch, enters in self.entry_depth.items()
            if enters == depth
        }

    def share(self, block: int) -> float:
        """Return this block's share of the walk."""
        ran = 0 if block in self.removed else len(self.branches) - (block in self.branches)
        return ran / max(1, self.block_runs)


class SizesWalk:
    """One batch on its way through the model without each of several sets of blocks, the `sizes`.

    Sets that agree on the blocks so far share a branch; at last, `branches` has one for each set.
    """

    start = 0

    def __init__(
        self,
        skippable: SkippableModel,
        calls: Sequence[Call],
        sizes: Iterable[Collection[int]],
        store: Store = keep_on_device,
    ) -> None:
        self.skippable, self.calls, self.store = skippable, calls, store
        self.sizes = [frozenset(size) for size in sizes]
        self.removed = frozenset.intersection(*self.sizes)
        self.branches = {frozenset[int](): calls[0].entering}

    def advance(self, block: int) -> None:
        """Run `block` on every branch, except for the sets that have it."""
        entering, self.branches = self.branches, {}
        for size in self.sizes:
            removed = frozenset(number for number in size if number <= block)
            if removed not in self.branches:
                hidden = entering[removed - {block}]
                runs = block not in size
                hidden = (
                    self.store(self.skippable.run_block(self.calls[block], hidden))
                    if runs
                    else hidden
                )
                self.branches[removed] = hidden

    def enter(self, depth: int) -> None:
        """Take up nothing: all branches come from the first block."""


def walk_together(skippable: SkippableModel, walks: Sequence[Walk | SizesWalk]) -> Iterator[int]:
    """Advance walks to the end, block by block, and yield each block after all of them have run it."""
    # Block by block rather than walk by walk, so that streamed weights are read once for all walks.
    blocks = range(min(walk.start for walk in walks), len(walks[0].calls))
    to_run = [
        block
        for block in blocks
        if any(block >= walk.start and block not in walk.removed for walk in walks)
    ]
    with closing(skippable.weights.visit(to_run)) as visits:
        for block in blocks:
            if block in to_run:
                next(visits)
            for walk in walks:
                if block >= walk.start:
                    walk.advance(block)
            yield block
    for walk in walks:
        walk.enter(blocks.stop)


def fork(
    skippable: SkippableModel, ids: Tensor, removed: Collection[int], candidates: Sequence[int]
) -> dict[int, Tensor]:
    """Return the hidden states that leave the last block, by the candidate left out; without
    candidates, by BASE.

    The `candidates` are in ascending order; `ids` is [batch, positions].
    """
    walk = Walk(skippable, skippable.calls(ids), States(), removed, candidates)
    for _ in walk_together(skippable, [walk]):
        pass
    return walk.branches
