"""The greedy search itself (Song et al., ICML 2024, Algorithm 1), free of any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sleb_cli.plan import RaceRecord
from sleb_plugins import ModelError, UsageError


@dataclass(frozen=True)
class Outcome:
    """What the candidates of a step scored: every one, or where they raced, every survivor."""

    scores: Mapping[int, float]
    race: RaceRecord | None = None


@dataclass(frozen=True)
class Exchange:
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
    exchanges: tuple[Exchange, ...] = ()

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


def greedy_search(score: Score, candidates: Candidates, remove: int, removed: Sequence[int] = ()) -> Iterator[Choice]:
    """Remove one block after another until `remove` are gone: each time the one whose absence scores lowest.

    Ties go to the lower block, so that two runs write the same plan. `removed` are gone from the start.

    Raises:
        ModelError: a score is not finite; the sentence names the block.
    """
    gone = list(removed)
    while len(gone) < remove:
        outcome = score(tuple(gone), candidates(tuple(gone)))
        for block in sorted(outcome.scores):
            require_finite(outcome.scores[block], gone, block)
        gone.append(best_of(outcome))
        yield Choice(tuple(gone), outcome)


def best_of(outcome: Outcome) -> int:
    """Give the candidate that scored lowest; ties go to the lower block."""
    return min(outcome.scores, key=lambda block: (outcome.scores[block], block))


def count_to_remove(blocks: int, protection: Protection, *, ratio: Fraction | None, remove: int | None) -> int:
    """Give how many blocks go: `remove`, or ceil(ratio x blocks).

    Raises:
        UsageError: none would go, or more than the protected blocks leave.
    """
    if min(protection.first, protection.last) < 0:
        raise UsageError("A negative number of blocks cannot be protected.", hint="Take 0 or more.")
    count = math.ceil(ratio * blocks) if ratio is not None else remove or 0
    available = min(len(protection.candidates(blocks, ())), blocks - 1)  # one stays in any case
    if count < 1:
        raise UsageError(f"{count} blocks to remove leaves nothing to search.", hint="Remove at least 1.")
    if count > available:
        among = f", and {len(protection.blocks)} by name" if protection.blocks else ""
        raise UsageError(
            f"{count} of {blocks} blocks cannot go: {available} may, "
            f"with {protection.first} protected at the start and {protection.last} at the end{among}.",
            hint=f"Remove {available} or fewer, or protect fewer." if available else "Protect fewer blocks.",
        )
    return count


def parse_ratio(text: str) -> Fraction:
    """Read a ratio exactly as written, so that 0.2 of 35 blocks is 7.

    Raises:
        UsageError: the text is no number above 0 and below 1.
    """
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio < 1:
        raise UsageError(f"The ratio {text} is not between 0 and 1.", hint="0.2 removes a fifth of the blocks.")
    return ratio


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
