"""Errors and intervals, on synthetic data with known answers."""

import math
import random
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from sleb_cli.engine.statistics import (
    items_needed,
    mcnemar,
    normal_interval,
    paired_difference,
    paired_proportions_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statist. Med. 17 (1998), Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
        (0, 1, 0.0, 0.7935),
    ],
)
def test_wilsons_interval_is_the_published_one(right, count, low, high):
    found = wilson_interval(right, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_interval_covers_as_promised():
    rng = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.97):
        drawn = rng.binomial(60, share, 2000)
        intervals = {right: wilson_interval(int(right), 60) for right in set(drawn)}
        covered = fmean(intervals[right].low <= share <= intervals[right].high for right in drawn)
        assert 0.93 <= covered <= 0.98


def test_a_paired_difference_is_that_of_students_test():
    rng = random.Random(0)
    before = [rng.gauss(0, 1) for _ in range(30)]
    after = [value + rng.gauss(0.4, 0.5) for value in before]
    found = paired_difference(before, after)
    expected = stats.ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(fmean(after) - fmean(before))
    assert found.mean / found.standard_error == pytest.approx(expected.statistic)
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high))
    # What the items have in common is not part of the error.
    assert found.standard_error < math.hypot(stdev(before), stdev(after)) / math.sqrt(30) / 2


def test_a_paired_difference_covers_as_promised():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(1500):
        before = rng.normal(0, 3, 12)
        found = paired_difference(list(before), list(before + rng.normal(0.2, 1, 12)))
        covered.append(found.interval.low <= 0.2 <= found.interval.high)
    assert 0.93 <= fmean(covered) <= 0.97


def test_one_item_has_a_difference_without_an_error_and_two_have_one():
    found = paired_difference([1.0], [0.0])
    assert (found.mean, found.standard_error, found.interval) == (-1.0, None, None)
    found = paired_difference([1.0, 1.0], [2.0, 4.0])  # Student's t of one degree of freedom: 12.706
    assert (found.mean, found.standard_error) == (2.0, 1.0)
    assert (found.interval.low, found.interval.high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


def test_items_must_be_paired():
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 0.0], [1.0])


def test_the_interval_of_paired_proportions_covers_as_promised_where_few_items_flip():
    rng = np.random.default_rng(2)
    for lose, gain, count in ((0.02, 0.01, 100), (0.1, 0.05, 50), (0.4, 0.0, 40), (0.0, 0.0, 30)):
        covered = []
        for lost, gained, _ in rng.multinomial(count, (lose, gain, 1 - lose - gain), 2000):
            found = paired_proportions_interval(int(lost), int(gained), count)
            covered.append(found.low <= gain - lose <= found.high)
        assert fmean(covered) >= 0.93


@pytest.mark.parametrize(
    ("lost", "gained", "count", "low", "high"),
    [  # 2/12 of 12 items; 4/22 and 2/22 of 22; and what would lie beyond what a difference can be
        (0, 0, 10, -1.96 * (2 / 12 / 12) ** 0.5, 1.96 * (2 / 12 / 12) ** 0.5),
        (3, 1, 20, (-2 - 1.96 * (6 - 4 / 22) ** 0.5) / 22, (-2 + 1.96 * (6 - 4 / 22) ** 0.5) / 22),
        (1, 3, 20, (2 - 1.96 * (6 - 4 / 22) ** 0.5) / 22, (2 + 1.96 * (6 - 4 / 22) ** 0.5) / 22),
        (1, 0, 1, -1.0, (-1 + 1.96 * (3 - 1 / 3) ** 0.5) / 3),
        (0, 1, 1, (1 - 1.96 * (3 - 1 / 3) ** 0.5) / 3, 1.0),
    ],
)
def test_the_interval_of_paired_proportions_is_that_of_bonett_and_price(lost, gained, count, low, high):
    found = paired_proportions_interval(lost, gained, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("lost", "gained", "count"), [(0, 0, 1), (0, 0, 100), (5, 5, 10), (1, 0, 1), (9, 0, 9)])
def test_the_interval_of_paired_proportions_holds_the_difference(lost, gained, count):
    found = paired_proportions_interval(lost, gained, count)
    assert -1 <= found.low <= (gained - lost) / count <= found.high <= 1
    # Even models that agreed on every item may differ on another.
    assert found.low < found.high


def test_more_items_narrow_the_interval_of_paired_proportions():
    few, many = (paired_proportions_interval(count // 10, count // 20, count) for count in (20, 2000))
    assert many.high - many.low < (few.high - few.low) / 5


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 2**5),
        (0, 10, 2 / 2**10),
        (3, 3, 1.0),
        (8, 1, 2 * (1 + 9) / 2**9),
        (12, 3, 2 * sum(math.comb(15, n) for n in range(4)) / 2**15),
    ],
)
def test_mcnemars_exact_test(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p)
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_mcnemars_test_finds_a_difference_that_is_none_no_more_often_than_promised():
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(200, (0.1, 0.1, 0.8), 2000)
    assert fmean(mcnemar(int(lost), int(gained)) < 0.05 for lost, gained, _ in drawn) <= 0.055


def test_so_many_items_show_the_effect_with_the_promised_power():
    # Miller, arXiv 2411.00640, section 5: (1.96 + 0.84)^2 times the variance over the squared effect.
    assert items_needed(1 / 3, effect=0.03) == math.ceil((1.959964 + 0.841621) ** 2 / 9 / 0.03**2)
    rng = np.random.default_rng(4)
    count = items_needed(0.5, effect=0.1)
    found = (paired_difference([0.0] * count, list(rng.normal(0.1, 0.5, count))) for _ in range(1500))
    assert 0.76 <= fmean(estimate.interval.low > 0 for estimate in found) <= 0.84


def test_items_that_never_differ_tell_nothing_about_others():
    assert items_needed(0.0) is None


def test_a_normal_interval():
    found = normal_interval(0.5, 0.1)
    assert (found.low, found.high) == pytest.approx((0.304, 0.696), abs=1e-3)
