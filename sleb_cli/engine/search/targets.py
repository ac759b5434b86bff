"""The targets that end a search: a model small enough, or a perplexity about to rise too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sleb_cli.checks.strategies import Strategy
from sleb_cli.engine.model.sizes import PerBlock
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.strategies import free_spans
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import TargetRecord
from sleb_cli.requests import TargetName, option_of
from sleb_cli.units import plural
from sleb_plugins import UsageError


@dataclass(frozen=True)
class SizeTarget:
    """Stop once the model is small enough.

    Attributes:
        sizes: the size of each block in the target's unit: blocks, parameters or bytes.
        limit: the largest size that may remain.
        describe: formats a size: "1.19B parameters".
        kv_cache: the KV cache that counts besides the weights, if memory is the target.
    """

    name: TargetName
    sizes: PerBlock
    limit: float
    describe: Callable[[float], str]
    kv_cache: str | None = None

    def allows(self, increase: float) -> bool:
        """Whether the loss may rise by this much, which a size does not limit."""
        return True

    def met(self, removed: Collection[int]) -> bool:
        """Whether the model is small enough without these blocks."""
        return self._fits(self.sizes.without(removed))

    def removals(self, candidates: Sequence[int], removed: Collection[int] = ()) -> int:
        """Return how many removals meet the target whichever candidates go, `removed` included.

        Raises:
            UsageError: the target is already met, or cannot be met.
        """
        size = self.sizes.without(removed)
        goal = self.describe(self.limit)
        if self._fits(size):
            so_far = ""
            if removed:
                so_far = f" without the {len(removed)} removed blocks"
            raise UsageError(
                f"The model is already at {self.describe(size)}{so_far}; the target is {goal}.",
                hint="Nothing needs to be removed.",
            )
        # Removing the smallest blocks first is the worst case; one block always stays.
        free = sorted(self.sizes.blocks[block] for block in candidates if block not in removed)
        free = free[: len(self.sizes.blocks) - 1 - len(removed)]
        count = len(removed)
        for block in free:
            size -= block
            count += 1
            if self._fits(size):
                return count
        raise UsageError(
            f"At most {plural(count, 'block')} can be removed, which leaves the model at "
            f"{self.describe(size)}; the target is {goal}.",
            hint="Choose a target that can be met, or protect fewer blocks.",
        )

    def record(
        self, removed: Collection[int], increase: float, following: float | None
    ) -> TargetRecord | None:
        """Record the size reached without these blocks; None for a number or ratio of blocks."""
        if self.name in ("ratio", "remove"):
            return None
        return TargetRecord(
            name=self.name,
            limit=self.limit,
            dense=self.sizes.without(()),
            reached=self.sizes.without(removed),
            kv_cache=self.kv_cache,
        )

    def _fits(self, amount: float) -> bool:
        return amount <= self.limit * (1 + 1e-12)  # sums of blocks are rounded


@dataclass(frozen=True)
class PerplexityTarget:
    """Stop before the calibration text's perplexity exceeds `limit` times the dense model's."""

    limit: float
    name: TargetName = "max_perplexity_ratio"

    def allows(self, increase: float) -> bool:
        """Whether the loss may rise by this much above the dense model's, in nats per token."""
        return increase <= math.log(self.limit)

    def met(self, removed: Collection[int]) -> bool:
        """Whether enough is removed: never, while the loss allows more."""
        return False

    def record(
        self, removed: Collection[int], increase: float, following: float | None
    ) -> TargetRecord:
        """Record the ratio reached, and the next removal's, from rises in nats per token."""
        beyond = None
        if following is not None:
            beyond = perplexity_ratio(following)
        return TargetRecord(
            name=self.name,
            limit=self.limit,
            dense=1.0,
            reached=perplexity_ratio(increase),
            next=beyond,
        )


Target = SizeTarget | PerplexityTarget


def perplexity_ratio(increase: float) -> float:
    """Return the factor by which perplexity rises with the loss, in nats per token."""
    return math.exp(min(increase, 700))


def most_removals(
    target: Target,
    removable: Removable,
    strategy: Strategy,
    gone: Sequence[int],
    notify: Notify,
) -> int:
    """Return the largest number of removals that a target may need; `gone` are removed already.

    Raises:
        UsageError: the target is already met, cannot be met, or does not fit the strategy.
    """
    blocks = removable.architecture.block_count
    free = removable.protection.candidates(blocks, ())
    if isinstance(target, SizeTarget):
        if strategy.swaps and len(set(target.sizes.blocks)) > 1:
            raise UsageError(
                f"--strategy {strategy.name} swaps blocks, and those of this model differ in size, "
                f"so it may miss {option_of(target.name)}.",
                hint="Use --strategy greedy, or --remove.",
            )
        remove = target.removals(free, gone)
        if strategy.removes_spans:
            free_spans(removable.candidates, remove)  # raises if there is none
        return remove
    if strategy.removes_spans:
        count = _longest_run(removable.candidates(()))
    else:
        count = len({*free, *gone})
    count = min(count, blocks - 1)
    limit = f"{target.limit:g}x the dense model's"
    notify(
        Notice(
            f"The search removes up to {count} blocks, and stops before perplexity is over {limit}."
        )
    )
    return count


def _longest_run(blocks: Sequence[int]) -> int:
    """Return the largest number of consecutive blocks among these, which are in order."""
    longest = 0
    length = 0
    for block in blocks:
        length = length + 1 if block - 1 in blocks else 1
        longest = max(longest, length)
    return longest
