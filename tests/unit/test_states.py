"""What one step keeps for the next, without a model."""

import pytest

from sleb_cli.engine.forward.states import BASE, States, depths_to_keep


def states(**depths):
    found = States()
    for depth, branches in depths.items():
        found.at[int(depth.removeprefix("d"))] = {branch: f"{branch}@{depth}" for branch in branches}
    return found


def test_a_removal_leaves_what_lies_below_it():
    known = states(d1=[BASE], d3=[BASE, 1, 2], d5=[BASE, 1, 2, 3])
    known.after_removal(3)
    assert {depth: set(branches) for depth, branches in known.at.items()} == {1: {BASE}, 3: {BASE, 1, 2}, 5: {BASE}}
    assert known.at[5][BASE] == "3@d5"  # without block 3: that is the base now


def test_a_removal_at_the_depth_itself_leaves_it():
    known = states(d3=[BASE, 1, 2])
    known.after_removal(3)
    assert set(known.at[3]) == {BASE, 1, 2}
    known.after_removal(2)
    assert known.at[3] == {BASE: "2@d3"}


def test_the_deepest_is_found():
    known = states(d1=[BASE], d3=[BASE, 1])
    assert known.deepest(BASE, 9) == 3
    assert known.deepest(BASE, 2) == 1
    assert known.deepest(1, 2) is None
    assert known.deepest(7, 9) is None


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, set()), (1, {1}), (3, {1, 9}), (4, {1, 4}), (6, {1, 4, 9}), (9, {1, 4, 6, 9})]
)
def test_the_least_wanted_goes_first(limit, kept):
    known = states(d1=[BASE], d4=[BASE, 1, 2], d6=[BASE, 1, 2], d9=[BASE, 3])
    known.shrink(limit, wanted=[1, 4, 9])
    assert set(known.at) == kept


def test_depths_are_those_of_the_best_candidates_and_the_first():
    assert depths_to_keep([5, 2, 7, 3], range(1, 9), limit=100, count=3) == {1: 1, 5: 5, 2: 2, 7: 7}


def test_depths_fit_the_limit():
    assert depths_to_keep([5, 2, 7], range(1, 9), limit=8, count=3) == {1: 1, 5: 5, 2: 2}
    assert depths_to_keep([5], range(1, 9), limit=0, count=3) == {}


def test_of_a_depth_that_does_not_fit_the_lowest_branches_are_kept():
    assert depths_to_keep([5, 2, 7], range(1, 9), limit=4, count=3) == {1: 1, 5: 3}


def test_before_anything_is_known_depths_are_spread():
    assert depths_to_keep([], range(1, 29), limit=1000, count=4) == {depth: depth for depth in range(1, 29, 3)}
