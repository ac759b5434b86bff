"""What a search scores and decides at each step (Song et al., ICML 2024, Algorithm 1), independent of any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sleb_cli.plan import RaceRecord
from sleb_plugins import ModelError


@dataclass(frozen=True)
class Outcome:
    """The score of each candidate of a step; if they raced, of each survivor."""

    scores: Mapping[int, float]
    race: RaceRecord | None = None


@dataclass(frozen=True)
class Swap:
    """Blocks restored to the model and those removed in their place, with the score before and after."""

    restored: tuple[int, ...]
    removed: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Choice:
    """The blocks removed at one size, and the scores from which the last of them was chosen."""

    removals: tuple[int, ...]
    outcome: Outcome
    swaps: tuple[Swap, ...] = ()

    @property
    def block(self) -> int:
        """The last removed block, by which `outcome` holds the score."""
        return self.removals[-1]

    @property
    def score(self) -> float:
        """The score of the choice."""
        return self.outcome.scores[self.block]


Score = Callable[[Sequence[int], Sequence[int]], Outcome]
"""Takes the blocks removed so far, whose order has no meaning, and the candidates; returns the candidates' scores."""

Candidates = Callable[[Sequence[int]], Sequence[int]]
"""Takes the blocks removed so far; returns those that may be removed next, in order."""


@dataclass(frozen=True)
class Protection:
    """Blocks that are never candidates: `first` and `last` count from the ends of what remains; `blocks` are named."""

    first: int = 0
    last: int = 0
    blocks: tuple[int, ...] = ()

    def candidates(self, count: int, removed: Sequence[int]) -> list[int]:
        """Return the candidates in a model of `count` blocks after `removed`."""
        remaining = [block for block in range(count) if block not in removed]
        return [b for b in remaining[self.first : len(remaining) - self.last] if b not in self.blocks]


def best_of(outcome: Outcome) -> int:
    """Return the candidate with the lowest score; ties go to the lower block."""
    return min(outcome.scores, key=lambda block: (outcome.scores[block], block))


def require_finite(score: float, removed: Sequence[int], block: int) -> None:
    """Check that a score can be compared with others.

    Raises:
        ModelError: it is not finite; the message names the block.
    """
    if not math.isfinite(score):
        without = f" (with {', '.join(map(str, removed))} already removed)" if removed else ""
        raise ModelError(
            f"Without block {block}{without}, the score is {score}.",
            hint="A wider data type may help: --dtype float32. No plan was written.",
        )
