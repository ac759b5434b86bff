"""Strategies on plain arithmetic, against brute force."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from sleb_cli.engine.search.choices import Outcome, Protection
from sleb_cli.engine.search.strategies import STRATEGIES, Problem, free_spans, strategy_name
from sleb_plugins import ModelError, UnsupportedModelError, UsageError


class Costs:
    """A cost of every set of blocks: a sum, and something random for every pair."""

    def __init__(self, blocks, seed, pairs=2.0):
        rng = random.Random(seed)
        self.blocks = blocks
        self.single = [rng.random() for _ in range(blocks)]
        self.pair = {pair: pairs * (rng.random() - 0.4) for pair in itertools.combinations(range(blocks), 2)}
        self.asked = []

    def of(self, gone):
        pairs = itertools.combinations(sorted(gone), 2)
        return sum(self.single[b] for b in sorted(gone)) + sum(self.pair[pair] for pair in pairs)

    def score(self, removed, candidates):
        self.asked += [frozenset({*removed, block}) for block in candidates]
        return Outcome({block: self.of({*removed, block}) for block in candidates})

    def candidates(self, removed):
        return Protection(1, 1).candidates(self.blocks, removed)

    def search(self, strategy, remove, **options):
        problem = Problem(self.score, self.candidates, remove, **options)
        choices = list(STRATEGIES[strategy].search(problem))
        for size, choice in enumerate(choices, start=1):
            assert len(set(choice.removals)) == size
            assert choice.outcome.scores[choice.block] == choice.score
        assert len(choices) == remove
        return choices

    def best(self, size):
        return min(itertools.combinations(range(1, self.blocks - 1), size), key=self.of)


SEEDS = range(20)


def nested(choices):
    return all(a.removals == b.removals[:-1] for a, b in itertools.pairwise(choices))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_as_wide_as_there_are_sets_finds_the_best_of_every_size(seed):
    costs = Costs(7, seed)
    for size, choice in enumerate(costs.search("beam", 3, width=100), start=1):
        assert sorted(choice.removals) == list(costs.best(size))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_of_one_is_greedy_and_a_wider_one_is_not_worse_at_the_first_two_sizes(seed):
    costs = Costs(9, seed)
    greedy = costs.search("greedy", 4)
    assert [c.removals for c in costs.search("beam", 4, width=1)] == [c.removals for c in greedy]
    wide = costs.search("beam", 2, width=4)
    assert wide[1].score <= greedy[1].score


@pytest.mark.parametrize("seed", SEEDS)
def test_after_refine_no_swap_of_one_block_is_better(seed):
    costs = Costs(10, seed)
    greedy, refined = costs.search("greedy", 4), costs.search("refine", 4)
    assert [c.removals for c in refined[:-1]] == [c.removals for c in greedy[:-1]]
    end = refined[-1]
    assert end.score <= greedy[-1].score
    assert end.score == pytest.approx(costs.of(end.removals))
    kept = set(range(1, 9)) - set(end.removals)
    for back, block in itertools.product(end.removals, kept):
        assert costs.of({*end.removals, block} - {back}) >= end.score - 1e-12


def test_refine_finds_what_only_a_swap_of_two_blocks_finds():
    found = [(Costs(9, seed).search("refine", 3)[-1], Costs(9, seed).best(3)) for seed in range(60)]
    two = [choice for choice, _ in found if any(len(swap.removed) == 2 for swap in choice.swaps)]
    assert two
    assert sum(sorted(choice.removals) == list(best) for choice, best in found) > 45


def test_pairs_are_tried_of_the_four_kept_blocks_that_came_closest_and_of_no_others():
    checked = 0
    for seed in SEEDS:
        costs = Costs(12, seed, pairs=0.3)
        (end,) = costs.search("refine", 3)[-1:]
        if end.swaps:
            continue
        gone = frozenset(end.removals)
        closest = {block: min(costs.of(gone - {back} | {block}) for back in gone) for block in set(range(1, 11)) - gone}
        near = sorted(closest, key=closest.__getitem__)[:4]
        expected = {
            gone - set(back) | set(pair)
            for back in itertools.combinations(gone, 2)
            for pair in itertools.combinations(near, 2)
        }
        assert {asked for asked in costs.asked if len(asked) == 3 and len(asked - gone) == 2} == expected
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_swaps_lead_from_greedy_to_the_result_of_refine(seed):
    told = []
    costs = Costs(10, seed)
    removals = set(costs.search("greedy", 4)[-1].removals)
    score = costs.of(removals)
    end = costs.search("refine", 4, swapped=told.append)[-1]
    assert tuple(told) == end.swaps
    for swap in end.swaps:
        assert swap.before == pytest.approx(score)
        assert removals >= set(swap.restored)
        assert not removals & set(swap.removed)
        removals = removals - set(swap.restored) | set(swap.removed)
        score = swap.after
        assert score < swap.before
        assert costs.of(removals) == pytest.approx(score)
    assert removals == set(end.removals)


def test_refine_of_one_block_or_of_all_but_one_has_nothing_to_swap():
    costs = Costs(6, 0)
    assert costs.search("refine", 1)[0].swaps == ()
    assert sorted(costs.search("refine", 4)[-1].removals) == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", SEEDS)
def test_oneshot_takes_the_lowest_of_one_scoring(seed):
    costs = Costs(9, seed)
    choices = costs.search("oneshot", 4)
    ranked = sorted(range(1, 8), key=lambda block: costs.of({block}))
    assert choices[-1].removals == tuple(ranked[:4])
    assert nested(choices)
    assert len(costs.asked) == 7


def test_oneshot_passes_over_what_may_no_longer_go():
    costs = Costs(6, 3)
    best, second, third = sorted(range(1, 5), key=lambda block: costs.of({block}))[:3]
    rule = lambda removed: [b for b in range(1, 5) if b not in removed and not (removed and b == second)]  # noqa: E731
    choices = list(STRATEGIES["oneshot"].search(Problem(costs.score, rule, 2)))
    assert choices[-1].removals == (best, third)


@pytest.mark.parametrize("seed", SEEDS)
def test_contiguous_finds_the_best_span_of_each_size(seed):
    costs = Costs(9, seed)
    for size, choice in enumerate(costs.search("contiguous", 4), start=1):
        spans = [tuple(range(start, start + size)) for start in range(1, 9 - size)]
        assert choice.removals == min(spans, key=costs.of)
        assert len(choice.outcome.scores) == len(spans)


def test_contiguous_asks_for_spans_where_it_is_told_how():
    asked = []

    def score_spans(spans):
        asked.append(spans)
        return Outcome({span[-1]: abs(span[0] - 2) for span in spans})

    choices = Costs(7, 0).search("contiguous", 2, score_spans=score_spans)
    assert [choice.removals for choice in choices] == [(2,), (2, 3)]
    assert asked == [[(b,) for b in range(1, 6)], [(b, b + 1) for b in range(1, 5)]]


def test_spans_are_of_blocks_that_may_go():
    candidates = lambda removed: [b for b in (1, 2, 4, 5, 6) if b not in removed]  # noqa: E731
    assert free_spans(candidates, 2) == [(1, 2), (4, 5), (5, 6)]
    assert free_spans(candidates, 3) == [(4, 5, 6)]
    assert free_spans(lambda removed: [b for b in (1, 2) if b not in removed], 2) == [(1, 2)]
    with pytest.raises(UsageError, match="No 4 consecutive blocks can be removed"):
        free_spans(candidates, 4)


def test_last_takes_the_last():
    choices = Costs(9, 0).search("last", 3)
    assert choices[-1].removals == (7, 6, 5)
    assert nested(choices)


@pytest.mark.parametrize("strategy", ["beam", "contiguous"])
def test_sets_after_which_nothing_may_go_are_passed_over(strategy):
    costs = Costs(8, 1)

    def candidates(removed):
        if 3 in removed:
            raise UnsupportedModelError("No block is left.", hint="")
        return costs.candidates(removed)

    choices = list(STRATEGIES[strategy].search(Problem(costs.score, candidates, 3)))
    assert 3 not in choices[-1].removals[:-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_makes_a_score_not_finite_is_never_removed(strategy, bad):
    """Whatever includes block 3 scores `bad`; the lowest finite scores win, as without it."""

    def score(removed, candidates):
        return Outcome({block: bad if 3 in {*removed, block} else 10.0 - block for block in candidates})

    problem = Problem(score, Costs(7, 0).candidates, 2)
    if strategy == "last":
        problem = replace(problem, remove=3)
        with pytest.raises(ModelError, match="Without block 3 \\(with 5, 4 already removed\\)"):
            list(STRATEGIES[strategy].search(problem))
        return
    choices = list(STRATEGIES[strategy].search(problem))
    assert set(choices[-1].removals) == {4, 5}
    assert all(math.isfinite(choice.score) for choice in choices)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_candidate_is_chosen_if_none_scores_a_finite_number(strategy):
    problem = Problem(
        lambda removed, candidates: Outcome(dict.fromkeys(candidates, math.nan)), Costs(6, 0).candidates, 2
    )
    with pytest.raises(ModelError, match="numbers that are not finite"):
        list(STRATEGIES[strategy].search(problem))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_go_to_the_lowest_blocks(strategy):
    problem = Problem(lambda removed, candidates: Outcome(dict.fromkeys(candidates, 1.0)), Costs(8, 0).candidates, 3)
    removals = [choice.removals for choice in STRATEGIES[strategy].search(problem)][-1]
    assert removals == ((6, 5, 4) if strategy == "last" else (1, 2, 3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whoever_listens_may_stop_early(strategy):
    costs = Costs(12, 0)
    choices = STRATEGIES[strategy].search(Problem(costs.score, costs.candidates, 5))
    first = next(choices)
    assert len(first.removals) == 1
    assert len(costs.asked) <= 10


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"refine"}))
def test_as_many_sets_are_scored_as_progress_expects(strategy):
    costs = Costs(12, 0)
    costs.search(strategy, 4, width=3)
    assert len(costs.asked) == sum(STRATEGIES[strategy].evaluations(10, 4, 3))


def test_a_strategy_nobody_knows():
    with pytest.raises(UsageError) as error:
        strategy_name("gredy")
    assert error.value.hint == "Did you mean 'greedy'?"
