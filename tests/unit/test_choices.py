"""The greedy search on plain arithmetic."""

import math
from fractions import Fraction

import pytest

from sleb_cli.engine.search.choices import Outcome, Protection
from sleb_cli.engine.search.strategies import Problem, greedy
from sleb_cli.engine.search.targets import count_to_remove, parse_ratio
from sleb_plugins import ModelError, UsageError


def additive(costs):
    return lambda removed, candidates: Outcome(
        {block: sum(costs[b] for b in (*removed, block)) for block in candidates}
    )


def candidates(blocks, first=1, last=1, kept=()):
    return lambda removed: Protection(first, last, kept).candidates(blocks, removed)


def search(costs, remove, first=1, last=1, kept=()):
    return list(greedy(Problem(additive(costs), candidates(len(costs), first, last, kept), remove)))


def test_removes_the_cheapest_first_and_keeps_the_ends():
    choices = search([0, 5, 1, 3, 2, 0], 3)
    assert [choice.block for choice in choices] == [2, 4, 3]
    assert set(choices[0].outcome.scores) == {1, 2, 3, 4}
    assert set(choices[1].outcome.scores) == {1, 3, 4}


def test_a_tie_goes_to_the_lower_block():
    assert [choice.block for choice in search([9, 1, 1, 1, 9], 2)] == [1, 2]


def test_a_removal_may_improve_the_score():
    assert [choice.block for choice in search([0, 4, -1, 2, 0], 2)] == [2, 3]


def test_without_protection_every_block_is_a_candidate():
    assert [choice.block for choice in search([0, 3, 2, 1], 2, first=0, last=0)] == [0, 3]


def test_protection_counts_remaining_blocks():
    choices = search([0, 0, 5, 4, 0, 0], 2, first=2, last=2)
    assert [choice.block for choice in choices] == [3, 2]


def test_blocks_protected_by_name_never_go():
    assert [choice.block for choice in search([0, 5, 1, 3, 2, 0], 2, kept=(2, 4))] == [3, 1]
    with pytest.raises(UsageError, match=r"Cannot remove 3 of 6 blocks: only 2 can be removed, .*and 2 by name"):
        count_to_remove(6, Protection(1, 1, (2, 4)), ratio=None, remove=3)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_worse_than_any_that_is(score):
    broken = lambda removed, candidates: Outcome({b: score if b == 1 else 1e300 for b in candidates})  # noqa: E731
    (choice,) = greedy(Problem(broken, candidates(5), 1))
    assert choice.block == 2
    assert choice.outcome.scores == {1: math.inf, 2: 1e300, 3: 1e300}
    only = lambda removed, candidates: Outcome({b: score for b in candidates})  # noqa: E731
    with pytest.raises(ModelError, match="Without any one of the candidates, the model computes numbers that are not"):
        list(greedy(Problem(only, candidates(5), 1)))


def test_a_search_goes_on_from_removals_that_are_given():
    costs = [0, 5, 1, 3, 2, 0]
    later = list(greedy(Problem(additive(costs), candidates(6), 3, removed=[2])))
    assert [choice.block for choice in later] == [choice.block for choice in search(costs, 3)[1:]]


def test_only_survivors_of_a_race_can_win():
    choices = greedy(Problem(lambda r, c: Outcome({3: 1.0, 2: 1.0}), candidates(6), 1))
    assert [choice.block for choice in choices] == [2]


@pytest.mark.parametrize(
    ("ratio", "blocks", "count"),
    [
        ("0.2", 35, 7),
        ("0.2", 30, 6),
        ("0.1", 30, 3),
        ("0.3", 10, 3),
        ("0.21", 30, 7),
        ("0.07", 100, 7),
        ("1/3", 30, 10),
    ],
)
def test_the_ratio_is_exact(ratio, blocks, count):
    found = count_to_remove(blocks, Protection(1, 1), ratio=parse_ratio(ratio), remove=None)
    assert found == count


@pytest.mark.parametrize("text", ["0", "1", "1.2", "-0.1", "nan", "inf", "x", "", "1/0"])
def test_a_ratio_outside_of_0_to_1_is_refused(text):
    with pytest.raises(UsageError, match="not between 0 and 1"):
        parse_ratio(text)


def test_more_blocks_than_may_go():
    with pytest.raises(UsageError, match="Cannot remove 5 of 6 blocks: only 4 can be removed"):
        count_to_remove(6, Protection(1, 1), ratio=None, remove=5)
    assert count_to_remove(6, Protection(0, 1), ratio=Fraction(5, 6), remove=None) == 5
    with pytest.raises(UsageError, match="Cannot remove 6 of 6 blocks: only 5 can be removed"):
        count_to_remove(6, Protection(0, 0), ratio=None, remove=6)
