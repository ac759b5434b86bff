"""Errors and intervals of proportions, means, paired differences and ratios of medians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np
import torch
from scipy import special
from torch import Tensor

from sleb_cli.results import Interval

CONFIDENCE = 0.95
POWER = 0.8
EFFECT = 0.01

_QUANTILE = float(special.ndtri((1 + CONFIDENCE) / 2))


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and 95% interval; both None if there is only one observation."""

    mean: float
    standard_error: float | None
    interval: Interval | None


def wilson_interval(right: int, count: int) -> Interval:
    """Return Wilson's score interval of a proportion (J.

    Am. Stat. Assoc. 22, 1927), which also suits 0 and 1.
    """
    from scipy import stats  # slow to import, and only tasks need it

    bounds = stats.binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(low=float(bounds.low), high=float(bounds.high))


def normal_interval(value: float, standard_error: float) -> Interval:
    """Return the interval of a normally distributed estimate."""
    reach = _QUANTILE * standard_error
    return Interval(low=value - reach, high=value + reach)


def _student(mean: float, error: float, count: int) -> Estimate:
    reach = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Estimate(mean, error, Interval(low=mean - reach, high=mean + reach))


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Estimate the mean of `after - before` over the same items (Miller, arXiv 2411.00640, section
    4.2).

    The interval is Student's, or for 0 and 1 as of `paired_proportions_interval`.
    """
    differences = [second - first for first, second in zip(before, after, strict=True)]
    mean = fmean(differences)
    count = len(differences)
    estimate = Estimate(mean, None, None)
    if count > 1:
        estimate = _student(mean, stdev(differences) / math.sqrt(count), count)
    if is_binary((*before, *after)):
        lost = differences.count(-1)
        interval = paired_proportions_interval(lost, differences.count(1), count)
        return replace(estimate, interval=interval)
    return estimate


def is_binary(scores: Sequence[float]) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(scores) and {*scores} <= {0.0, 1.0}


def clustered_mean(values: Tensor, clusters: Tensor) -> Estimate:
    """Estimate the mean of values, [n], of which each cluster is one observation (Miller, section
    2.2).
    """
    values = values.double()
    mean = float(values.mean())
    cluster_of = torch.unique(clusters, return_inverse=True)[1]
    residuals = torch.zeros(int(cluster_of.max()) + 1, dtype=torch.float64).index_add(
        0, cluster_of, values - mean
    )
    count = len(residuals)
    if count < 2:
        return Estimate(mean, None, None)
    variance = count / (count - 1) * float(residuals.square().sum())
    return _student(mean, math.sqrt(variance) / len(values), count)


def ratio_difference(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Estimate:
    """Estimate how a ratio of two sums changes, such as of bits to bytes.

    Each pair has the parts of both sums, [n], of which each is one observation; the error is that
    of the ratios' first-order terms (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    ratios = []
    terms = []
    for parts, sizes in (before, after):
        ratio = parts.sum() / sizes.sum()
        ratios.append(float(ratio))
        terms.append((parts - ratio * sizes) / sizes.sum())
    mean = ratios[1] - ratios[0]
    count = len(before[0])
    if count < 2:
        return Estimate(mean, None, None)
    variance = count / (count - 1) * float((terms[1] - terms[0]).square().sum())
    return _student(mean, math.sqrt(variance), count)


def paired_proportions_interval(lost: int, gained: int, count: int) -> Interval:
    """Return the interval of `(gained - lost) / count`, of two proportions of the same items.

    This is the Wald interval with one more lost and one more gained item (Bonett and Price, J.
    Educ. Behav. Stat. 37, 2012). Without them, models that agree on a few items would seem to agree
    on all.
    """
    count += 2
    gains = (gained + 1) / count
    losses = (lost + 1) / count
    difference = gains - losses
    error = math.sqrt((gains + losses - difference**2) / count)
    interval = normal_interval(difference, error)
    return Interval(low=max(-1.0, interval.low), high=min(1.0, interval.high))


def mcnemar(lost: int, gained: int) -> float:
    """Return the p-value of the exact McNemar test (Psychometrika 12, 1947): are flips chance?"""
    from scipy import stats

    if not lost + gained:
        return 1.0
    return float(stats.binomtest(lost, lost + gained).pvalue)


def items_needed(deviation: float) -> int | None:
    """Return how many items show a change of a hundredth with 95% confidence and 80% power.

    `deviation` is of the paired difference; without any, None. Source: Miller, arXiv 2411.00640,
    equation 9, where one answer per item leaves the variance of the paired difference.
    """
    if not deviation:
        return None
    return math.ceil(((_QUANTILE + float(special.ndtri(POWER))) * deviation / EFFECT) ** 2)


RESAMPLES = 9_999
MIN_ROUNDS = 5
"""With fewer rounds, no bootstrap interval would hold its 95%."""


def median_ratio_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Return the 95% interval of median(first) / median(second), from the same rounds; None if too
    few.
    """
    rounds = len(first)
    if rounds < MIN_ROUNDS:
        return None
    # Whole rounds are drawn, because what slows a machine for a while slows both runs of a round.
    chosen = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
    above = np.median(np.asarray(first)[chosen], axis=1)
    ratios = above / np.median(np.asarray(second)[chosen], axis=1)
    # The percentiles of a small sample's bootstrap are too narrow, so they move apart as Student's
    # t demands (Hesterberg, "What Teachers Should Know About the Bootstrap", section 5.3). The
    # root: a bootstrap's variance divides by the number of rounds, Student's by one less.
    reach = special.stdtrit(rounds - 1, (1 + CONFIDENCE) / 2)
    tail = special.ndtr(-np.sqrt(rounds / (rounds - 1)) * reach)
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Interval(low=float(low), high=float(high))


def relative_deviation(sample: Sequence[float]) -> float:
    """Return the standard deviation as a share of the mean."""
    return float(np.std(sample) / np.mean(sample))


def count_outliers(sample: Sequence[float]) -> int:
    """Count the values more than 1.5 interquartile ranges beyond the quartiles (Tukey)."""
    low, high = np.percentile(sample, (25, 75))
    margin = 1.5 * (high - low)
    return sum(not low - margin <= value <= high + margin for value in sample)
