"""The greedy search itself (Song et al., ICML 2024, Algorithm 1), free of any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sleb_cli.plan import RaceRecord
from sleb_plugins import ModelError


@dataclass(frozen=True)
class Outcome:
    """What the candidates of a step scored: every one, or where they raced, every survivor."""

    scores: Mapping[int, float]
    race: RaceRecord | None = None


@dataclass(frozen=True)
class Swap:
    """Blocks that came back into the model for others that went, and what the whole scored before and after."""

    restored: tuple[int, ...]
    removed: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Choice:
    """One decided size: all blocks that are gone then, and what the last of them was chosen from."""

    removals: tuple[int, ...]
    outcome: Outcome
    swaps: tuple[Swap, ...] = ()

    @property
    def block(self) -> int:
        """The block that the score is filed under."""
        return self.removals[-1]

    @property
    def score(self) -> float:
        """What the choice scored."""
        return self.outcome.scores[self.block]


Score = Callable[[Sequence[int], Sequence[int]], Outcome]
"""From the blocks removed so far, whose order has no meaning, and the candidates of this step to what each scores."""

Candidates = Callable[[Sequence[int]], Sequence[int]]
"""From the blocks removed so far to those that may go next, in order."""


@dataclass(frozen=True)
class Protection:
    """Which blocks are never candidates: the first and the last so many of those that remain, and `blocks`."""

    first: int = 0
    last: int = 0
    blocks: tuple[int, ...] = ()

    def candidates(self, count: int, removed: Sequence[int]) -> list[int]:
        """Give the blocks of a model of `count` that may go after `removed`."""
        remaining = [block for block in range(count) if block not in removed]
        return [b for b in remaining[self.first : len(remaining) - self.last] if b not in self.blocks]


def best_of(outcome: Outcome) -> int:
    """Give the candidate that scored lowest; ties go to the lower block."""
    return min(outcome.scores, key=lambda block: (outcome.scores[block], block))


def require_finite(score: float, removed: Sequence[int], block: int) -> None:
    """Make sure that a score can be compared with others.

    Raises:
        ModelError: it is not finite; the sentence names the block.
    """
    if not math.isfinite(score):
        without = f" (with {', '.join(map(str, removed))} already removed)" if removed else ""
        raise ModelError(
            f"Without block {block}{without}, the score is {score}.",
            hint="A wider data type may help: --dtype float32. Nothing was chosen.",
        )
