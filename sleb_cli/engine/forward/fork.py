"""The forking forward: one walk through the blocks serves all candidates.

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

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

from torch import Tensor

from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.forward.states import BASE, States
from sleb_cli.engine.forward.stores import Store, keep_on_device
from sleb_cli.engine.model.padded import Tokens
from sleb_cli.events import Advance, no_progress


@dataclass(eq=False)
class BatchWalk:
    """One batch on its way through the blocks that have a call.

    `walk_together` calls `advance` for each block from `start` on, in order, then `finish`.
    """

    skippable: SkippableModel
    calls: Sequence[Call]
    removed: Collection[int]
    _: KW_ONLY
    store: Store = keep_on_device
    start: int = field(default=0, init=False)

    def run(self, block: int, hidden: Tensor) -> Tensor:
        """Run one block on the hidden states of a branch."""
        return self.store(self.skippable.run_block(self.calls[block], hidden))

    def advance(self, block: int) -> None:
        """Go through one block."""
        raise NotImplementedError

    def finish(self) -> None:
        """End the walk behind the last block."""


@dataclass(eq=False)
class Walk(BatchWalk):
    """The base branch of a batch, and the candidates' branches that forked off from it.

    Without candidates, or with BASE alone, the base goes through all blocks that have a call.
    `watch` is called before a block runs; `keep` says how many of the lowest branches to keep at a
    depth. The whole walk reports as much `progress` as it is `worth`.
    """

    states: States
    candidates: Sequence[int]
    _: KW_ONLY
    keep: Mapping[int, int] = field(default_factory=dict)
    watch: Callable[[], object] = lambda: None
    progress: Advance = no_progress
    worth: float = 1
    branches: dict[int, Tensor] = field(default_factory=dict, init=False)
    forks: list[int] = field(default_factory=list, init=False)
    """The candidates that fork off on this walk."""
    entry_depth: dict[int, int] = field(default_factory=dict, init=False)
    """Where the other branches enter, from the kept states."""

    def __post_init__(self) -> None:
        calls = self.calls
        states = self.states
        candidates = [block for block in self.candidates if block != BASE]
        for branch in candidates:
            depth = states.deepest(branch, len(calls))
            if depth is None:
                self.forks.append(branch)
            else:
                self.entry_depth[branch] = depth
        if self.forks or not candidates:
            states.at[0].setdefault(BASE, calls[0].entering)
            first_fork = min(self.forks, default=len(calls))
            self.entry_depth[BASE] = states.deepest(BASE, first_fork) or 0
        self.start = min(self.entry_depth.values())

    @cached_property
    def block_runs(self) -> int:
        """How often a branch goes through a block, on the whole walk."""
        begins = dict(self.entry_depth)
        for branch in self.forks:
            begins[branch] = branch + 1
        runs = 0
        for branch, begin in begins.items():
            end = len(self.calls)
            if branch == BASE and self.forks:
                end = self.forks[-1]
            runs += sum(block not in self.removed for block in range(begin, end))
        return runs

    def advance(self, block: int) -> None:
        """Run `block` on every branch of the walk, except the branch that leaves it out."""
        if block in self.keep:
            for branch in sorted(self.branches)[: self.keep[block]]:
                self.states.at[block][branch] = self.branches[branch]
        self._enter(block)
        if block in self.forks:
            self.branches[block] = self.branches[BASE]
            if block == self.forks[-1]:  # no branch forks off later, so the base ends here
                self.states.at[block][BASE] = self.branches.pop(BASE)
        if block in self.removed:
            return
        self.watch()
        runs = 0
        for branch in self.branches:
            if branch != block:
                self.branches[branch] = self.run(block, self.branches[branch])
                runs += 1
        if runs > 0:
            self.progress(self.worth * runs / self.block_runs)

    def finish(self) -> None:
        """Take up the branches whose kept states lie behind the last block."""
        self._enter(len(self.calls))
        if self.block_runs == 0:
            self.progress(self.worth)

    def _enter(self, depth: int) -> None:
        """Take up the branches whose kept states enter the block at `depth`."""
        for branch, enters in self.entry_depth.items():
            if enters == depth:
                self.branches[branch] = self.states.at[depth][branch]


class SizesWalk(BatchWalk):
    """A batch in the model without each of several sets of blocks, the `sizes`.

    Sets that agree on the blocks so far share a branch; at last, `branches` has one for each set.
    The whole walk reports as much `progress` as the batch has sequences.
    """

    def __init__(
        self,
        skippable: SkippableModel,
        calls: Sequence[Call],
        sizes: Sequence[Collection[int]],
        store: Store = keep_on_device,
        progress: Advance = no_progress,
    ) -> None:
        self.sizes = [frozenset(size) for size in sizes]
        removed = frozenset.intersection(*self.sizes)
        super().__init__(skippable, calls, removed, store=store)
        self.branches = {frozenset[int](): calls[0].entering}
        self.progress = progress
        self.worth = len(calls[0].entering) / len(calls)

    def advance(self, block: int) -> None:
        """Run `block` on every branch, except for the sets that have it."""
        entering = self.branches
        self.branches = {}
        for size in self.sizes:
            removed = frozenset(number for number in size if number <= block)
            if removed in self.branches:
                continue
            hidden = entering[removed - {block}]
            if block not in size:
                hidden = self.run(block, hidden)
            self.branches[removed] = hidden
        self.progress(self.worth)


def walk_together(skippable: SkippableModel, walks: Sequence[BatchWalk]) -> None:
    """Advance walks to the end, all of them by one block, then by the next."""
    # Block by block rather than walk by walk, so that streamed weights are read once for all walks.
    first = min(walk.start for walk in walks)
    blocks = range(first, len(walks[0].calls))
    to_run = []
    for block in blocks:
        if any(block >= walk.start and block not in walk.removed for walk in walks):
            to_run.append(block)
    with skippable.weights.visit(to_run) as visit:
        for block in blocks:
            if block in to_run:
                visit.load(block)
            for walk in walks:
                if block >= walk.start:
                    walk.advance(block)
    for walk in walks:
        walk.finish()


def fork(
    skippable: SkippableModel, ids: Tokens, removed: Collection[int], candidates: Sequence[int]
) -> dict[int, Tensor]:
    """Return the hidden states that leave the last block by candidate left out.

    Without candidates, they are by BASE.

    The `candidates` are in ascending order; `ids` is [batch, positions].
    """
    walk = Walk(skippable, skippable.calls(ids), removed, States(), candidates)
    walk_together(skippable, [walk])
    return walk.branches
