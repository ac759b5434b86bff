"""What one step keeps for the next, without a model."""

import pytest

from sleb_cli.engine.forward.states import BASE, States, depths_to_keep


def states(kept):
    found = States()
    for depth, branches in kept.items():
        found.at[depth] = {branch: f"{branch}@{depth}" for branch in branches}
    return found


@pytest.mark.parametrize(
    ("removals", "left"),
    [
        ([3], {1: {BASE: "-1@1"}, 3: {BASE: "-1@3", 1: "1@3", 2: "2@3"}, 5: {BASE: "3@5"}}),
        ([3, 2], {1: {BASE: "-1@1"}, 3: {BASE: "2@3"}}),
        ([0], {}),
    ],
)
def test_a_removal_leaves_what_lies_below_it_and_its_branch(removals, left):
    known = states({1: [BASE], 3: [BASE, 1, 2], 5: [BASE, 1, 2, 3]})
    for block in removals:
        known.after_removal(block)
    assert known.at == left


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, set()), (1, {1}), (3, {1, 9}), (4, {1, 4}), (6, {1, 4, 9}), (9, {1, 4, 6, 9})]
)
def test_the_least_wanted_goes_first(limit, kept):
    known = states({1: [BASE], 4: [BASE, 1, 2], 6: [BASE, 1, 2], 9: [BASE, 3]})
    known.shrink(limit, wanted=[1, 4, 9])
    assert set(known.at) == kept


@pytest.mark.parametrize(
    ("ranking", "limit", "depths"),
    [
        pytest.param([5, 2, 7, 3], 100, {1: 1, 5: 5, 2: 2, 7: 7}, id="of the first and the best"),
        pytest.param([5, 2, 7], 8, {1: 1, 5: 5, 2: 2}, id="what fits"),
        pytest.param([5, 2, 7], 4, {1: 1, 5: 3}, id="the lowest branches of what does not fit"),
        pytest.param([5], 0, {}, id="none"),
    ],
)
def test_depths_to_keep(ranking, limit, depths):
    assert depths_to_keep(ranking, range(1, 9), limit, count=3) == depths


def test_before_anything_is_known_depths_are_spread():
    assert depths_to_keep([], range(1, 29), 1000, count=4) == {depth: depth for depth in range(1, 29, 3)}
