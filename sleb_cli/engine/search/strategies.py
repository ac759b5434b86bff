"""The search strategies: pure functions of the candidates' scores, independent of any model.

A strategy yields one size after another, each as soon as it is decided, so that the caller may stop early. It asks for
the candidates before it scores them; the order of removed blocks has no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from sleb_cli.engine.search.choices import Candidates, Choice, Outcome, Score, ranking, require_choice
from sleb_cli.plan import SwapRecord
from sleb_cli.requests import DEFAULT_BEAM_WIDTH, StrategyName
from sleb_plugins import UnsupportedModelError, UsageError
from sleb_plugins.errors import did_you_mean

# The number of kept blocks that came closest to a swap and are tried in pairs.
NEAR_MISSES = 4

ScoreSpans = Callable[[Sequence[tuple[int, ...]]], Outcome]
"""Takes spans of consecutive blocks, all of one length; returns the score of each, by its last block."""


@dataclass(frozen=True)
class Problem:
    """What a strategy works on.

    Attributes:
        score: scores each candidate after given removals.
        candidates: returns the blocks that may be removed after given removals.
        remove: the number of blocks to remove.
        removed: the blocks removed before the search; only `greedy` can start with any.
        score_spans: scores spans; if None, `score` scores the model without each span.
        width: how many sets of blocks a beam keeps.
        swapped: called with each swap as it is made.
    """

    score: Score
    candidates: Candidates
    remove: int
    removed: tuple[int, ...] = ()
    score_spans: ScoreSpans | None = None
    width: int = DEFAULT_BEAM_WIDTH
    swapped: Callable[[SwapRecord], None] = lambda swap: None


def greedy(problem: Problem) -> Iterator[Choice]:
    """Repeatedly remove the block whose removal scores lowest (SLEB, Song et al., ICML 2024, Algorithm 1).

    Ties go to the lower block, so two runs write the same plan. Here as everywhere, a score that is not finite is worse
    than any that is.

    Raises:
        ModelError: no candidate's score is finite.
    """
    gone = list(problem.removed)
    while len(gone) < problem.remove:
        outcome = require_choice(problem.score(tuple(gone), problem.candidates(tuple(gone))), gone)
        gone.append(outcome.best)
        yield Choice(tuple(gone), outcome)


def oneshot(problem: Problem) -> Iterator[Choice]:
    """Score every block once, on the dense model, and remove those with the lowest scores."""
    outcome = require_choice(problem.score((), problem.candidates(())), ())
    gone: list[int] = []
    while len(gone) < problem.remove:
        allowed = problem.candidates(tuple(gone))
        left = Outcome({block: score for block, score in outcome.scores.items() if block in allowed})
        if not left.scores:
            raise UsageError(
                f"No scored block can be removed after {', '.join(map(str, gone))}.", hint="Use --strategy greedy."
            )
        gone.append(left.best)
        yield Choice(tuple(gone), left)


def contiguous(problem: Problem) -> Iterator[Choice]:
    """For each size, remove the span of consecutive blocks with the lowest score."""
    score_spans = problem.score_spans or (lambda spans: _without_each(problem.score, spans))
    for size in range(1, problem.remove + 1):
        outcome = require_choice(score_spans(free_spans(problem.candidates, size)), ())
        end = outcome.best
        yield Choice(tuple(range(end - size + 1, end + 1)), outcome)


def last(problem: Problem) -> Iterator[Choice]:
    """Repeatedly remove the last candidate, whatever its score. A baseline."""
    gone: list[int] = []
    while len(gone) < problem.remove:
        block = problem.candidates(tuple(gone))[-1]
        outcome = require_choice(problem.score(tuple(gone), [block]), gone)
        gone.append(block)
        yield Choice(tuple(gone), outcome)


def beam(problem: Problem) -> Iterator[Choice]:
    """For each size, keep the `width` sets of blocks with the lowest scores and extend them all; yield the lowest."""
    kept: list[tuple[int, ...]] = [()]
    for _ in range(problem.remove):
        found: dict[frozenset[int], tuple[float, tuple[int, ...], Outcome]] = {}
        for removed in kept:
            outcome = _score_next(problem, removed)
            for block, score in outcome.scores.items():
                found.setdefault(frozenset({*removed, block}), (score, (*removed, block), outcome))
        ranked = sorted(found.values(), key=lambda entry: (entry[0], sorted(entry[1])))[: problem.width]
        if not ranked:
            problem.candidates(kept[0])  # raises an error that says why
        require_choice(ranked[0][2], ranked[0][1][:-1])
        ranked = [entry for entry in ranked if entry[0] < math.inf]
        kept = [removals for _, removals, _ in ranked]
        yield Choice(kept[0], ranked[0][2])


def refine(problem: Problem) -> Iterator[Choice]:
    """Search greedily, then swap removed and kept blocks as long as the score falls.

    Swap single blocks until no such swap lowers the score, then pairs among the kept blocks that came closest; if a
    pair was swapped, start over. This terminates, since every swap lowers the score.
    """
    for choice in greedy(problem):
        if len(choice.removals) == problem.remove:
            choice = _Refinement(problem, choice).run()
        yield choice


class _Refinement:
    """Swaps that lead from one set of removed blocks to a better one."""

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.choice = problem, choice
        self.closest: dict[int, float] = {}

    def run(self) -> Choice:
        """Swap blocks until no swap lowers the score."""
        while True:
            while self._swap_single_blocks():
                pass
            if not self._swap_pairs():
                return self.choice

    def _swap_single_blocks(self) -> bool:
        """Try every kept block in place of each removed one; return whether any was swapped."""
        before, self.closest = self.choice, {}
        for back in before.removals:
            stay = _without(self.choice.removals, back)
            outcome = _score_next(self.problem, stay)
            for block, score in outcome.scores.items():
                if block not in self.choice.removals:
                    self.closest[block] = min(score, self.closest.get(block, score))
            self._take((back,), stay, outcome)
        return self.choice is not before

    def _swap_pairs(self) -> bool:
        """Try pairs of near misses in place of each removed pair; return whether any was swapped."""
        near = sorted(ranking(self.closest)[:NEAR_MISSES])
        before = self.choice
        for back in combinations(sorted(before.removals), 2):
            stay = _without(before.removals, *back)
            for number, block in enumerate(near[:-1]):
                if block in _allowed(self.problem.candidates, stay):
                    pair = (*stay, block)
                    self._take(back, pair, _score_next(self.problem, pair, among=near[number + 1 :]))
                if self.choice is not before:
                    return True
        return False

    def _take(self, back: tuple[int, ...], stay: tuple[int, ...], outcome: Outcome) -> None:
        """Make the swap with the lowest score, if it lowers the current one."""
        block = outcome.best if outcome.scores else None
        if block is None or block in self.choice.removals or not outcome.scores[block] < self.choice.score:
            return
        new = tuple(b for b in (*stay, block) if b not in self.choice.removals)
        swap = SwapRecord(restored=back, removed=new, before=self.choice.score, after=outcome.scores[block])
        self.choice = Choice((*stay, block), outcome, (*self.choice.swaps, swap))
        self.problem.swapped(swap)


def _without(removals: tuple[int, ...], *blocks: int) -> tuple[int, ...]:
    return tuple(block for block in removals if block not in blocks)


def _without_each(score: Score, spans: Sequence[tuple[int, ...]]) -> Outcome:
    return Outcome({span[-1]: score(span[:-1], [span[-1]]).scores[span[-1]] for span in spans})


def free_spans(candidates: Candidates, size: int) -> list[tuple[int, ...]]:
    """Return the spans of `size` consecutive blocks that may be removed.

    Raises:
        UsageError: there is none.
    """
    free = candidates(())
    spans = [tuple(range(start, start + size)) for start in free]
    spans = [s for s in spans if set(s) <= set(free) and s[-1] in _allowed(candidates, s[:-1])]
    if not spans:
        raise UsageError(
            f"No {size} consecutive blocks can be removed.",
            hint="Remove fewer, protect fewer, or use --strategy greedy.",
        )
    return spans


def _allowed(candidates: Candidates, removed: tuple[int, ...]) -> Sequence[int]:
    """Return the candidates after `removed`; none is no error here, since other sets may have some."""
    try:
        return candidates(removed)
    except UnsupportedModelError:
        return []


def _score_next(problem: Problem, removed: tuple[int, ...], among: Sequence[int] | None = None) -> Outcome:
    """Score the candidates after `removed`; only those in `among`, if given."""
    allowed = _allowed(problem.candidates, removed)
    candidates = [block for block in allowed if among is None or block in among]
    return problem.score(tuple(sorted(removed)), candidates) if candidates else Outcome({})


@dataclass(frozen=True)
class Strategy:
    """A search strategy, and what it needs from a metric.

    Attributes:
        search: yields one size after another.
        evaluations: takes the number of candidates of the dense model, of removals, and the beam's width; returns the
            number of sets scored for each size, or an upper bound.
        races: whether the scores of the surviving candidates of a race suffice.
        needs_sets: whether it compares sets of blocks, which a metric of single blocks cannot score.
    """

    search: Callable[[Problem], Iterator[Choice]]
    evaluations: Callable[[int, int, int], Sequence[int]]
    races: bool = False
    needs_sets: bool = False


def _each_step(candidates: int, remove: int, width: int) -> list[int]:
    return [candidates - gone for gone in range(remove)]


def _with_swaps(candidates: int, remove: int, width: int) -> list[int]:
    """Count two rounds of single swaps and one of pairs."""
    *steps, end = _each_step(candidates, remove, width)
    one = remove * (candidates - remove)
    two = remove * (remove - 1) // 2 * min(NEAR_MISSES, candidates - remove) * (NEAR_MISSES - 1) // 2
    return [*steps, end + 2 * one + two]


STRATEGIES: Mapping[StrategyName, Strategy] = MappingProxyType(
    {
        "greedy": Strategy(greedy, _each_step, races=True),
        "oneshot": Strategy(oneshot, lambda candidates, remove, width: [candidates] + [0] * (remove - 1)),
        "contiguous": Strategy(contiguous, _each_step),
        "last": Strategy(last, lambda candidates, remove, width: [1] * remove),
        "refine": Strategy(refine, _with_swaps, races=True, needs_sets=True),
        "beam": Strategy(
            beam,
            lambda candidates, remove, width: [
                (candidates - gone) * (1 if gone == 0 else width) for gone in range(remove)
            ],
            races=True,
            needs_sets=True,
        ),
    }
)


def strategy_name(text: str) -> StrategyName:
    """Read the name of a strategy.

    Raises:
        UsageError: no strategy has this name.
    """
    for name in STRATEGIES:
        if name == text:
            return name
    raise UsageError(f"There is no strategy {text!r}.", hint=did_you_mean(text, list(STRATEGIES)))
