"""The scores and the choice of each step (Song et al., ICML 2024, Algorithm 1), without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sleb_cli.plan import RaceRecord, SwapRecord
from sleb_plugins import ModelError, UnsupportedModelError


class NoBlockLeft(UnsupportedModelError):
    """No block can be removed next."""


class NoFiniteScore(ModelError):
    """Without any one candidate, such as the last of `removals`, the score is not finite."""

    removals: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The scores of a step's candidates, or of a race's survivors; infinite if not finite."""

    scores: Mapping[int, float]
    race: RaceRecord | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "scores", {block: comparable(score) for block, score in self.scores.items()}
        )

    @property
    def best(self) -> int:
        """The candidate with the lowest score; ties go to the lower block."""
        return ranking(self.scores)[0]


@dataclass(frozen=True)
class Choice:
    """The blocks removed at one size, and the scores from which the last of them was chosen."""

    removals: tuple[int, ...]
    outcome: Outcome
    swaps: tuple[SwapRecord, ...] = ()

    @property
    def block(self) -> int:
        """The last removed block, by which `outcome` holds the score."""
        return self.removals[-1]

    @property
    def score(self) -> float:
        """The score of the choice."""
        return self.outcome.scores[self.block]


Score = Callable[[Sequence[int], Sequence[int]], Outcome]
"""Takes the blocks removed so far, whose order has no meaning, and the candidates; returns the
candidates' scores.
"""

Candidates = Callable[[Sequence[int]], Sequence[int]]
"""Takes the blocks removed so far; returns the blocks that may be removed next, in order."""


@dataclass(frozen=True)
class Protection:
    """Blocks that are never candidates: the first and last of what remains, and these `blocks`."""

    first: int = 0
    last: int = 0
    blocks: tuple[int, ...] = ()

    def candidates(self, count: int, removed: Sequence[int]) -> list[int]:
        """Return the candidates in a model of `count` blocks after `removed`."""
        remaining = [block for block in range(count) if block not in removed]
        if len(remaining) == 1:
            return []  # one block always stays
        end = max(0, len(remaining) - self.last)
        return [block for block in remaining[self.first : end] if block not in self.blocks]


def comparable(score: float) -> float:
    """Return the score, or infinity in place of NaN or minus infinity, so that it ranks last."""
    return score if math.isfinite(score) else math.inf


def ranking(scores: Mapping[int, float]) -> list[int]:
    """Return the blocks by score, the lowest first; ties go to the lower block."""
    return sorted(scores, key=lambda block: (scores[block], block))


def require_best(outcome: Outcome, removed: Sequence[int]) -> int:
    """Return the candidate with the lowest score; raise NoFiniteScore if it is infinite."""
    best = outcome.best
    if outcome.scores[best] < math.inf:
        return best
    which = "any one of the candidates"
    if len(outcome.scores) == 1:
        which = f"block {best}"
    if removed:
        which += f" (with {', '.join(map(str, removed))} already removed)"
    error = NoFiniteScore(
        f"Without {which}, the model computes numbers that are not finite.",
        hint="Use a data type with a wider range: --dtype bfloat16 or float32. "
        "No plan was written.",
    )
    error.removals = (*removed, best)
    raise error
