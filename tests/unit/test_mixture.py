"""How many sequences of a mixture each source gives, and in which order they stand."""

from fractions import Fraction
from random import Random

import pytest

from sleb_cli.checks.mixture import divide, interleave, parse_mixture


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (16, ["1"], [16]),
        (16, ["1/2", "1/2"], [8, 8]),
        (15, ["1/2", "1/2"], [8, 7]),
        (10, ["1/3", "1/3", "1/3"], [4, 3, 3]),
        (10, ["0.55", "0.26", "0.19"], [5, 3, 2]),
        (3, ["0.9", "0.1"], [3, 0]),
    ],
)
def test_the_rest_goes_to_the_largest_remainders(count, shares, expected):
    assert divide(count, [Fraction(share) for share in shares]) == expected


def test_a_share_of_a_file_is_never_computed_for_hours():
    assert list(parse_mixture("c4:1e-999999999")) == ["c4:1e-999999999"]


def test_any_stretch_has_about_its_share_of_each_source():
    rng = Random(0)
    for _ in range(200):
        counts = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
        owner = [part for part, count in enumerate(counts) for _ in range(count)]
        order = interleave(counts)
        assert sorted(order) == list(range(sum(counts)))
        for part, count in enumerate(counts):
            rows = [row for row in order if owner[row] == part]
            assert rows == sorted(rows)
            for stop in range(len(order) + 1):
                share = stop * count / len(order)
                assert abs(sum(owner[row] == part for row in order[:stop]) - share) < len(counts)
        assert {owner[row] for row in order[-len(counts) :]} == set(range(len(counts)))
