"""How a search goes about it: pure code over what candidates score, free of any model.

A strategy gives one size after another, each as soon as it is decided, so that whoever listens may stop early. Which
candidates may go is asked before they are scored; the order of the blocks that are gone has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from sleb_cli.engine.search.choices import Candidates, Choice, Outcome, Score, Swap, best_of, require_finite
from sleb_cli.plan import StrategyName
from sleb_cli.plugin_manager import suggestion
from sleb_plugins import UnsupportedModelError, UsageError

DEFAULT_BEAM_WIDTH = 4

# Of the kept blocks, so many that came closest to an exchange are tried two at a time.
NEAR_MISSES = 4

ScoreSpans = Callable[[Sequence[tuple[int, ...]]], Outcome]
"""From spans of consecutive blocks, all of one length, to what each scores, by the block that it ends with."""


@dataclass(frozen=True)
class Problem:
    """What a strategy works on.

    Attributes:
        score: what each candidate scores after given removals.
        candidates: which blocks may go after given removals.
        remove: how many are to go.
        removed: what is gone from the start; only `greedy` goes on from there.
        score_spans: what spans score; None asks `score` for the model without each.
        width: how many sets a beam keeps.
        exchanged: told of every exchange as it is made.
    """

    score: Score
    candidates: Candidates
    remove: int
    removed: tuple[int, ...] = ()
    score_spans: ScoreSpans | None = None
    width: int = DEFAULT_BEAM_WIDTH
    swapped: Callable[[Swap], None] = lambda swap: None


def greedy(problem: Problem) -> Iterator[Choice]:
    """Remove the block whose absence scores lowest, again and again (SLEB, Song et al., ICML 2024, Algorithm 1).

    Ties go to the lower block, so that two runs write the same plan.

    Raises:
        ModelError: a score is not finite; the sentence names the block.
    """
    gone = list(problem.removed)
    while len(gone) < problem.remove:
        outcome = _finite(problem.score(tuple(gone), problem.candidates(tuple(gone))), gone)
        gone.append(best_of(outcome))
        yield Choice(tuple(gone), outcome)


def oneshot(problem: Problem) -> Iterator[Choice]:
    """Score every block once, on the dense model, and remove those that score lowest."""
    outcome = _finite(problem.score((), problem.candidates(())), ())
    gone: list[int] = []
    while len(gone) < problem.remove:
        allowed = problem.candidates(tuple(gone))
        left = Outcome({block: score for block, score in outcome.scores.items() if block in allowed})
        if not left.scores:
            raise UsageError(
                f"After {', '.join(map(str, gone))}, no block may go that was scored.", hint="Take --strategy greedy."
            )
        gone.append(best_of(left))
        yield Choice(tuple(gone), left)


def contiguous(problem: Problem) -> Iterator[Choice]:
    """For each size, remove the span of so many consecutive blocks that scores lowest."""
    score_spans = problem.score_spans or (lambda spans: _without_each(problem.score, spans))
    for size in range(1, problem.remove + 1):
        outcome = _finite(score_spans(free_spans(problem.candidates, size)), ())
        end = best_of(outcome)
        yield Choice(tuple(range(end - size + 1, end + 1)), outcome)


def last(problem: Problem) -> Iterator[Choice]:
    """Remove the last block that may go, again and again; whatever it scores. A baseline."""
    gone: list[int] = []
    while len(gone) < problem.remove:
        block = problem.candidates(tuple(gone))[-1]
        outcome = _finite(problem.score(tuple(gone), [block]), gone)
        gone.append(block)
        yield Choice(tuple(gone), outcome)


def beam(problem: Problem) -> Iterator[Choice]:
    """For each size keep the `width` sets of blocks that score lowest, and go on from all of them; give the lowest."""
    kept: list[tuple[int, ...]] = [()]
    for _ in range(problem.remove):
        found: dict[frozenset[int], tuple[float, tuple[int, ...], Outcome]] = {}
        for removed in kept:
            outcome = _score_next(problem, removed)
            for block, score in outcome.scores.items():
                found.setdefault(frozenset({*removed, block}), (score, (*removed, block), outcome))
        ranked = sorted(found.values(), key=lambda entry: (entry[0], sorted(entry[1])))[: problem.width]
        if not ranked:
            problem.candidates(kept[0])  # says why there is none
        kept = [removals for _, removals, _ in ranked]
        yield Choice(kept[0], ranked[0][2])


def refine(problem: Problem) -> Iterator[Choice]:
    """Search greedily, and then exchange removed and kept blocks as long as the score falls.

    One for one, until no exchange of one block lowers the score; then two for two among the kept blocks that came
    closest; and one for one again where that changed something. It ends, since every exchange lowers the score.
    """
    for choice in greedy(problem):
        if len(choice.removals) == problem.remove:
            choice = _Refinement(problem, choice).run()
        yield choice


class _Refinement:
    """Exchanges from one set of removed blocks to a better one."""

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.choice = problem, choice
        self.closest: dict[int, float] = {}

    def run(self) -> Choice:
        """Exchange until nothing is gained."""
        while True:
            while self._one_for_one():
                pass
            if not self._two_for_two():
                return self.choice

    def _one_for_one(self) -> bool:
        """Try a kept block in every removed one's place; say whether anything changed."""
        before, self.closest = self.choice, {}
        for back in before.removals:
            stay = _without(self.choice.removals, back)
            outcome = _score_next(self.problem, stay)
            for block, score in outcome.scores.items():
                if block not in self.choice.removals:
                    self.closest[block] = min(score, self.closest.get(block, score))
            self._take((back,), stay, outcome)
        return self.choice is not before

    def _two_for_two(self) -> bool:
        """Try two of the near misses in the place of every two that are removed; say whether anything changed."""
        near = sorted(sorted(self.closest, key=lambda block: (self.closest[block], block))[:NEAR_MISSES])
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
        """Make the exchange that scored lowest, where it lowers the score."""
        block = best_of(outcome) if outcome.scores else None
        if block is None or block in self.choice.removals or not outcome.scores[block] < self.choice.score:
            return
        new = tuple(b for b in (*stay, block) if b not in self.choice.removals)
        swap = Swap(back, new, self.choice.score, outcome.scores[block])
        self.choice = Choice((*stay, block), outcome, (*self.choice.swaps, swap))
        self.problem.swapped(swap)


def _without(removals: tuple[int, ...], *blocks: int) -> tuple[int, ...]:
    return tuple(block for block in removals if block not in blocks)


def _without_each(score: Score, spans: Sequence[tuple[int, ...]]) -> Outcome:
    return Outcome({span[-1]: score(span[:-1], [span[-1]]).scores[span[-1]] for span in spans})


def free_spans(candidates: Candidates, size: int) -> list[tuple[int, ...]]:
    """Give the spans of `size` consecutive blocks that may go.

    Raises:
        UsageError: there is none.
    """
    free = candidates(())
    spans = [tuple(range(start, start + size)) for start in free]
    spans = [s for s in spans if set(s) <= set(free) and s[-1] in _allowed(candidates, s[:-1])]
    if not spans:
        raise UsageError(
            f"No {size} consecutive blocks may go.", hint="Ask for fewer, protect fewer, or take --strategy greedy."
        )
    return spans


def _allowed(candidates: Candidates, removed: tuple[int, ...]) -> Sequence[int]:
    """Give the blocks that may go after `removed`; it is no error that none may, since there are other sets."""
    try:
        return candidates(removed)
    except UnsupportedModelError:
        return []


def _score_next(problem: Problem, removed: tuple[int, ...], among: Sequence[int] | None = None) -> Outcome:
    """Score the blocks that may go after `removed`, those of `among` where only they are asked for."""
    allowed = _allowed(problem.candidates, removed)
    candidates = [block for block in allowed if among is None or block in among]
    outcome = problem.score(tuple(sorted(removed)), candidates) if candidates else Outcome({})
    return _finite(outcome, removed)


def _finite(outcome: Outcome, removed: Sequence[int]) -> Outcome:
    for block in sorted(outcome.scores):
        require_finite(outcome.scores[block], removed, block)
    return outcome


@dataclass(frozen=True)
class Strategy:
    """A way to search, and what it asks of a metric.

    Attributes:
        search: gives one size after another.
        evaluations: from the candidates of the dense model, how many go, and the beam's width to how many sets are
            scored for each size, or at most.
        races: whether it can do with the scores of those candidates that were not beaten.
        needs_sets: whether it compares whole sets of blocks, which a metric that looks at single ones cannot tell.
    """

    search: Callable[[Problem], Iterator[Choice]]
    evaluations: Callable[[int, int, int], Sequence[int]]
    races: bool = False
    needs_sets: bool = False


def _each_step(candidates: int, remove: int, width: int) -> list[int]:
    return [candidates - gone for gone in range(remove)]


def _with_swaps(candidates: int, remove: int, width: int) -> list[int]:
    """Two rounds of one for one, and one of two for two."""
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
        UsageError: there is none of that name.
    """
    for name in STRATEGIES:
        if name == text:
            return name
    raise UsageError(f"There is no strategy {text!r}.", hint=suggestion(text, list(STRATEGIES)))
