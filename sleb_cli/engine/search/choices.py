"""What a search scores and decides at each step (Song et al., ICML 2024, Algorithm 1), independent of any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sleb_cli.plan import RaceRecord
from sleb_plugins import ModelError


@dataclass(frozen=True)
class Outcome:
    """The score of each candidate of a step; if they raced, of each survivor. The worst is infinite."""

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


def comparable(score: float) -> float:
    """Return a score that can be compared: what is not a finite number is worse than any that is."""
    return score if math.isfinite(score) else math.inf


def require_choice(outcome: Outcome, removed: Sequence[int]) -> Outcome:
    """Return the outcome with comparable scores, if a candidate can be chosen from them.

    Raises:
        ModelError: no score is finite; the message names the blocks.
    """
    scores = {block: comparable(score) for block, score in outcome.scores.items()}
    if scores and min(scores.values()) == math.inf:
        without = f" (with {', '.join(map(str, removed))} already removed)" if removed else ""
        blocks = f"block {', '.join(map(str, sorted(scores)))}" if len(scores) == 1 else "any one of the candidates"
        raise ModelError(
            f"Without {blocks}{without}, the model computes numbers that are not finite.",
            hint="Use a data type with a wider range: --dtype bfloat16 or float32. No plan was written.",
        )
    return Outcome(scores, outcome.race)
