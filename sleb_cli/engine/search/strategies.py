"""The search strategies: pure functions of the candidates' scores, independent of any model.

`greedy` is Algorithm 1 of the paper; `tests/reference.py` is all of the paper on one page.

A strategy yields one size after another, each as soon as it is decided, so that the caller may stop
early. The order of removed blocks has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from sleb_cli.engine.search.choices import (
    Candidates,
    Choice,
    NoBlockLeft,
    Outcome,
    Score,
    ranking,
    require_best,
)
from sleb_cli.plan import SwapRecord
from sleb_cli.requests import StrategyName
from sleb_plugins import UsageError

# The number of kept blocks that came closest to a swap and are tried in pairs.
NEAR_MISSES = 4

ScoreSpans = Callable[[Sequence[tuple[int, ...]]], Outcome]
"""Scores spans of consecutive blocks, all of one length, by their last block."""


@dataclass(frozen=True)
class Problem:
    """The candidates of a strategy, how it scores them, and how many blocks to remove.

    Attributes:
        removed: the blocks removed before the search; only `greedy` can start with any.
        score_spans: scores the model without each span; only `contiguous` needs it.
        swapped: called with each swap.
    """

    score: Score
    candidates: Candidates
    remove: int
    removed: tuple[int, ...] = ()
    score_spans: ScoreSpans | None = None
    swapped: Callable[[SwapRecord], None] = lambda swap: None


def greedy(problem: Problem) -> Iterator[Choice]:
    """Remove the lowest-scoring block again and again (Song et al., ICML 2024, Algorithm 1).

    Ties go to the lower block, so two runs write the same plan. A score that is not finite is worse
    than any other.
    """
    gone = problem.removed
    while len(gone) < problem.remove:
        outcome = problem.score(gone, problem.candidates(gone))
        gone = (*gone, require_best(outcome, gone))
        yield Choice(gone, outcome)


def oneshot(problem: Problem) -> Iterator[Choice]:
    """Score every block once, on the dense model, and remove those with the lowest scores."""
    outcome = problem.score((), problem.candidates(()))
    gone: tuple[int, ...] = ()
    while len(gone) < problem.remove:
        allowed = problem.candidates(gone)
        left = Outcome(
            {block: score for block, score in outcome.scores.items() if block in allowed}
        )
        if not left.scores:
            raise UsageError(
                f"No scored block can be removed after {', '.join(map(str, gone))}.",
                hint="Use --strategy greedy.",
            )
        gone = (*gone, require_best(left, gone))
        yield Choice(gone, left)


def contiguous(problem: Problem) -> Iterator[Choice]:
    """For each size, remove the span of consecutive blocks with the lowest score."""
    assert problem.score_spans is not None
    for size in range(1, problem.remove + 1):
        try:
            spans = free_spans(problem.candidates, size)
        except UsageError as error:
            raise NoBlockLeft(error.message, hint=error.hint) from error
        outcome = problem.score_spans(spans)
        end = require_best(outcome, ())
        yield Choice(tuple(range(end - size + 1, end + 1)), outcome)


def refine(problem: Problem) -> Iterator[Choice]:
    """Search greedily, then swap removed and kept blocks as long as the score falls.

    Single blocks are swapped first, then pairs of the kept blocks that came closest; after a pair,
    singles again.
    """
    for choice in greedy(problem):
        if len(choice.removals) < problem.remove:
            yield choice
        else:
            yield _swap(problem, choice)


def _swap(problem: Problem, choice: Choice) -> Choice:
    # This ends, since every swap lowers the score.
    before: Choice | None = None
    while choice is not before:
        before = choice
        closest: dict[int, float] = {}
        for restored in before.removals:
            stay = _without(choice.removals, restored)
            outcome = _score_next(problem, stay)
            for block, score in outcome.scores.items():
                if block not in choice.removals:
                    closest[block] = min(score, closest.get(block, score))
            choice = _swap_if_better(problem, choice, (restored,), stay, outcome)
        if choice is before:
            choice = _swap_pair(problem, choice, sorted(ranking(closest)[:NEAR_MISSES]))
    return choice


def _swap_pair(problem: Problem, choice: Choice, near: Sequence[int]) -> Choice:
    # The first pair that is better, in place of any removed pair, or the same choice.
    for restored in combinations(sorted(choice.removals), 2):
        stay = _without(choice.removals, *restored)
        for number, block in enumerate(near[:-1]):
            if block not in _allowed(problem.candidates, stay):
                continue
            pair = (*stay, block)
            outcome = _score_next(problem, pair, among=near[number + 1 :])
            better = _swap_if_better(problem, choice, restored, pair, outcome)
            if better is not choice:
                return better
    return choice


def _swap_if_better(
    problem: Problem,
    choice: Choice,
    restored: tuple[int, ...],
    stay: tuple[int, ...],
    outcome: Outcome,
) -> Choice:
    if not outcome.scores:
        return choice
    block = outcome.best
    score = outcome.scores[block]
    if block in choice.removals or score >= choice.score:
        return choice
    removals = (*stay, block)
    new = _without(removals, *choice.removals)
    swap = SwapRecord(restored=restored, removed=new, before=choice.score, after=score)
    problem.swapped(swap)
    return Choice(removals, outcome, (*choice.swaps, swap))


def _without(removals: tuple[int, ...], *blocks: int) -> tuple[int, ...]:
    return tuple(block for block in removals if block not in blocks)


def free_spans(candidates: Candidates, size: int) -> list[tuple[int, ...]]:
    """Return the removable spans of `size` blocks; raise a UsageError if there is none."""
    free = candidates(())
    spans = []
    for first in free:
        span = tuple(range(first, first + size))
        if set(span) <= set(free) and span[-1] in _allowed(candidates, span[:-1]):
            spans.append(span)
    if not spans:
        raise UsageError(
            f"No {size} consecutive blocks can be removed.",
            hint="Remove fewer, protect fewer, or use --strategy greedy.",
        )
    return spans


def _allowed(candidates: Candidates, removed: tuple[int, ...]) -> Sequence[int]:
    try:
        return candidates(removed)
    except NoBlockLeft:
        return []  # no error here, since other sets may have some


def _score_next(
    problem: Problem, removed: tuple[int, ...], among: Container[int] | None = None
) -> Outcome:
    candidates = _allowed(problem.candidates, removed)
    if among is not None:
        candidates = [block for block in candidates if block in among]
    if not candidates:
        return Outcome({})
    return problem.score(sorted(removed), candidates)


ALGORITHMS: Mapping[StrategyName, Callable[[Problem], Iterator[Choice]]] = MappingProxyType(
    {
        "greedy": greedy,
        "oneshot": oneshot,
        "contiguous": contiguous,
        "refine": refine,
    }
)
