"""Errors and intervals, on synthetic data with known answers."""

import math
import random
from statistics import fmean

import pytest
import torch
from scipy import stats

from sleb_cli.engine.statistics import (
    clustered_mean,
    items_needed,
    mcnemar,
    paired_difference,
    paired_proportions_interval,
    wilson_interval,
)


def wald(difference, variance, count):
    """Return Bonett and Price's interval of a mean difference, with two items added."""
    return difference - 1.96 * variance**0.5 / count, difference + 1.96 * variance**0.5 / count


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (
            wilson_interval(81, 263),
            (0.2553, 0.3662),
        ),  # Newcombe, Statist. Med. 17 (1998), Table I, method 3
        (wilson_interval(0, 20), (0.0, 0.1611)),
        (wilson_interval(1, 1), (0.2065, 1.0)),
        # 2/12 of 12 items; 4/22 and 2/22 of 22; and what would lie beyond what a difference can be
        (paired_proportions_interval(0, 0, 10), wald(0, 2, 12)),
        (paired_proportions_interval(3, 1, 20), wald(-2 / 22, 6 - 4 / 22, 22)),
        (paired_proportions_interval(1, 0, 1), (-1.0, wald(-1 / 3, 3 - 1 / 3, 3)[1])),
        (paired_proportions_interval(0, 1, 1), (wald(1 / 3, 3 - 1 / 3, 3)[0], 1.0)),
    ],
)
def test_intervals_of_proportions_are_the_published_ones(interval, expected):
    assert (interval.low, interval.high) == pytest.approx(expected, abs=5e-5)


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
    alone = paired_difference([1.5], [0.5])
    assert (alone.mean, alone.standard_error, alone.interval) == (-1.0, None, None)
    assert paired_difference([1.0, 0.0], [0.0, 0.0]).interval == paired_proportions_interval(
        1, 0, 2
    )


def test_mcnemars_exact_test():
    tail = 2 * sum(math.comb(15, n) for n in range(4)) / 2**15
    for lost, gained, p in ((0, 0, 1.0), (3, 3, 1.0), (0, 10, 2 / 2**10), (12, 3, tail)):
        assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(p)


def test_the_items_needed_show_the_effect_with_its_power():
    # Miller, arXiv 2411.00640, section 5: (1.96 + 0.84)^2 times the variance over the squared
    # effect.
    assert items_needed(1 / 3) == math.ceil((1.959964 + 0.841621) ** 2 / 9 / 0.01**2)
    assert items_needed(0.0) is None


def test_a_cluster_is_one_observation():
    values, clusters = torch.tensor([1.0, 4.0, 2.0, 7.0]), torch.tensor([3, 9, 5, 1])
    once = clustered_mean(values, clusters)
    assert once.mean == 3.5
    assert once.standard_error == pytest.approx(float(values.double().std()) / 2)
    reach = stats.t.ppf(0.975, 3) * once.standard_error
    assert (once.interval.low, once.interval.high) == pytest.approx((3.5 - reach, 3.5 + reach))
    often = clustered_mean(values.repeat_interleave(10), clusters.repeat_interleave(10))
    assert often.standard_error == pytest.approx(once.standard_error)
    alone = clustered_mean(torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64))
    assert (alone.mean, alone.standard_error, alone.interval) == (1.5, None, None)
