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
class Choice:
    """One decided step: the block that goes, and what it was chosen from."""

    block: int
    outcome: Outcome


Score = Callable[[Sequence[int], Sequence[int]], Outcome]


def greedy_search(
    score: Score, blocks: int, remove: int, *, protect_first: int, protect_last: int, removed: Sequence[int] = ()
) -> Iterator[Choice]:
    """Remove one block after another until `remove` are gone: each time the one whose absence scores lowest.

    The first `protect_first` and the last `protect_last` of the remaining blocks are never candidates.
    Ties go to the lower block, so that two runs write the same plan. `removed` are gone from the start.

    Raises:
        ModelError: a score is not finite; the sentence names the block.
    """
    gone = list(removed)
    while len(gone) < remove:
        remaining = [block for block in range(blocks) if block not in gone]
        outcome = score(tuple(gone), remaining[protect_first : len(remaining) - protect_last])
        for block in sorted(outcome.scores):
            require_finite(outcome.scores[block], gone, block)
        best = min(outcome.scores, key=lambda block: (outcome.scores[block], block))
        gone.append(best)
        yield Choice(best, outcome)


def count_to_remove(
    blocks: int, *, ratio: Fraction | None, remove: int | None, protect_first: int, protect_last: int
) -> int:
    """Give how many blocks go: `remove`, or ceil(ratio x blocks).

    Raises:
        UsageError: none would go, or more than the protected ends leave.
    """
    if min(protect_first, protect_last) < 0:
        raise UsageError("A negative number of blocks cannot be protected.", hint="Take 0 or more.")
    count = math.ceil(ratio * blocks) if ratio is not None else remove or 0
    available = max(0, blocks - protect_first - protect_last)
    if count < 1:
        raise UsageError(f"{count} blocks to remove leaves nothing to search.", hint="Remove at least 1.")
    if count > available:
        raise UsageError(
            f"{count} of {blocks} blocks cannot go: {available} may, "
            f"with {protect_first} protected at the start and {protect_last} at the end.",
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
