"""Strategies on plain arithmetic, against brute force."""

import itertools
import random

import pytest

from sleb_cli.engine.search.choices import NoBlockLeft, Outcome, Protection
from sleb_cli.engine.search.strategies import ALGORITHMS, Problem

SEEDS = pytest.mark.parametrize("seed", range(10))
EACH = pytest.mark.parametrize("strategy", ALGORITHMS)


def candidates(blocks, first=1, last=1, kept=()):
    return lambda removed: Protection(first, last, kept).candidates(blocks, removed)


def search(strategy, score, candidates, remove, **options):
    def score_spans(spans):
        return Outcome({span[-1]: score(span[:-1], span[-1:]).scores[span[-1]] for span in spans})

    problem = Problem(score, candidates, remove, score_spans=score_spans, **options)
    choices = list(ALGORITHMS[strategy](problem))
    for choice in choices:
        assert len(set(choice.removals)) == len(choice.removals)
        assert choice.outcome.scores[choice.block] == choice.score
    return choices


def test_protection_can_leave_no_candidate():
    assert Protection(1, 35).candidates(30, ()) == Protection(7).candidates(6, ()) == []
    assert Protection(0, 0).candidates(3, (0, 2)) == []  # one block stays


class Costs:
    """A cost of every set of blocks: a sum, and something random for every pair."""

    def __init__(self, blocks, seed, pairs=2.0):
        rng = random.Random(seed)
        self.blocks = blocks
        self.single = [rng.random() for _ in range(blocks)]
        self.pair = {
            pair: pairs * (rng.random() - 0.4) for pair in itertools.combinations(range(blocks), 2)
        }
        self.asked = []

    def of(self, gone):
        pairs = itertools.combinations(sorted(gone), 2)
        return sum(self.single[b] for b in sorted(gone)) + sum(self.pair[pair] for pair in pairs)

    def score(self, removed, blocks):
        self.asked += [frozenset({*removed, block}) for block in blocks]
        return Outcome({block: self.of({*removed, block}) for block in blocks})

    def search(self, strategy, remove, **options):
        choices = search(strategy, self.score, candidates(self.blocks), remove, **options)
        assert [len(choice.removals) for choice in choices] == list(range(1, remove + 1))
        return choices

    def best(self, size):
        return min(itertools.combinations(range(1, self.blocks - 1), size), key=self.of)


@pytest.mark.parametrize(
    ("costs", "protected", "removals"),
    [
        ([0, 5, 1, 3, 2, 0], {}, (2, 4, 3)),
        ([0, 4, -1, 2, 0], {}, (2, 3)),  # a removal may improve the score
        ([0, 3, 2, 1], {"first": 0, "last": 0}, (0, 3)),
        ([0, 0, 5, 4, 0, 0], {"first": 2, "last": 2}, (3, 2)),  # of the blocks that remain
        ([0, 5, 1, 3, 2, 0], {"kept": (2, 4)}, (3, 1)),
    ],
)
def test_greedy_removes_the_cheapest_that_is_not_protected(costs, protected, removals):
    def score(removed, blocks):
        return Outcome({block: sum(costs[b] for b in (*removed, block)) for block in blocks})

    free = candidates(len(costs), **protected)
    assert search("greedy", score, free, len(removals))[-1].removals == removals
    later = search("greedy", score, free, len(removals), removed=removals[:1])
    assert [choice.removals for choice in later] == [
        removals[:size] for size in range(2, len(removals) + 1)
    ]


@SEEDS
def test_swaps_lead_from_greedy_to_where_none_is_better(seed):
    told, costs = [], Costs(10, seed)
    greedy, refined = costs.search("greedy", 4), costs.search("refine", 4, swapped=told.append)
    assert [c.removals for c in refined[:-1]] == [c.removals for c in greedy[:-1]]
    removals, score, end = set(greedy[-1].removals), greedy[-1].score, refined[-1]
    assert tuple(told) == end.swaps
    for swap in end.swaps:
        assert swap.before == pytest.approx(score)
        removals, score = removals - set(swap.restored) | set(swap.removed), swap.after
        assert swap.before > score == pytest.approx(costs.of(removals))
    assert removals == set(end.removals)
    assert end.score == pytest.approx(score)
    for back, block in itertools.product(removals, set(range(1, 9)) - removals):
        assert costs.of({*removals, block} - {back}) >= end.score - 1e-12


def test_refine_swaps_two_blocks_at_once():
    found = [(Costs(9, seed).search("refine", 3)[-1], Costs(9, seed).best(3)) for seed in range(60)]
    assert any(len(swap.removed) == 2 for choice, _ in found for swap in choice.swaps)
    assert sum(sorted(choice.removals) == list(best) for choice, best in found) > 45


@SEEDS
def test_oneshot_takes_the_lowest_of_one_scoring(seed):
    costs = Costs(9, seed)
    ranked = sorted(range(1, 8), key=lambda block: costs.of({block}))
    assert [c.removals for c in costs.search("oneshot", 4)] == [
        tuple(ranked[:size]) for size in range(1, 5)
    ]
    assert len(costs.asked) == 7
    second = ranked[1]  # may not follow the first
    rule = lambda removed: [  # noqa: E731
        b for b in range(1, 8) if b not in removed and not (removed and b == second)
    ]
    assert search("oneshot", costs.score, rule, 2)[-1].removals == (ranked[0], ranked[2])


@SEEDS
def test_contiguous_finds_the_best_span_of_what_may_go(seed):
    costs = Costs(9, seed)
    for size, choice in enumerate(
        search("contiguous", costs.score, candidates(9, kept=[2]), 4), start=1
    ):
        spans = [
            span
            for start in range(1, 9 - size)
            if 2 not in (span := tuple(range(start, start + size)))
        ]
        assert choice.removals == min(spans, key=costs.of)
        assert len(choice.outcome.scores) == len(spans)


def test_a_set_that_leaves_no_candidate_is_passed_over():
    def rule(removed):
        if 3 in removed:
            raise NoBlockLeft("No block is left.", hint="")
        return candidates(8)(removed)

    assert 3 not in search("contiguous", Costs(8, 1).score, rule, 3)[-1].removals[:-1]


@EACH
def test_ties_go_to_the_lowest_blocks(strategy):
    choices = search(
        strategy, lambda removed, blocks: Outcome(dict.fromkeys(blocks, 1.0)), candidates(8), 3
    )
    assert choices[-1].removals == (1, 2, 3)


@pytest.mark.parametrize(
    ("strategy", "sets"), [("greedy", 34), ("oneshot", 10), ("contiguous", 34)]
)
def test_as_many_sets_are_scored_as_the_docs_say(strategy, sets):
    costs = Costs(12, 0)
    costs.search(strategy, 4)
    assert len(costs.asked) == sets
