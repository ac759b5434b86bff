"""The clustered error of a mean, on data whose answer is known."""

import math

import pytest
import torch
from scipy import stats

from sleb_cli.engine.statistics import clustered_mean


def test_clusters_of_one_give_the_ordinary_standard_error():
    values = torch.tensor([1.0, 4.0, 2.0, 7.0])
    found = clustered_mean(values, torch.arange(4))
    assert found.mean == 3.5
    assert found.standard_error == pytest.approx(float(values.double().std()) / 2)
    reach = stats.t.ppf(0.975, 3) * found.standard_error
    assert (found.interval.low, found.interval.high) == pytest.approx((3.5 - reach, 3.5 + reach))


def test_copies_of_an_observation_add_no_certainty():
    values, clusters = torch.tensor([1.0, 4.0, 2.0, 7.0]), torch.tensor([3, 9, 5, 1])
    once = clustered_mean(values, clusters)
    often = clustered_mean(values.repeat_interleave(10), clusters.repeat_interleave(10))
    assert often.standard_error == pytest.approx(once.standard_error)
    assert clustered_mean(values.repeat_interleave(10), torch.arange(40)).standard_error < once.standard_error / 3


def test_one_cluster_has_no_error():
    found = clustered_mean(torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64))
    assert (found.mean, found.standard_error, found.interval) == (1.5, None, None)


@pytest.mark.parametrize("clusters", [8, 30])
def test_the_interval_covers_the_truth_in_19_of_20_worlds(clusters):
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        sizes = torch.randint(5, 15, (clusters,), generator=generator)
        which = torch.arange(clusters).repeat_interleave(sizes)
        shared = torch.randn(clusters, generator=generator)[which]
        interval = clustered_mean(shared + torch.randn(len(which), generator=generator), which).interval
        covered += interval.low <= 0 <= interval.high
    # Up to a few points of undercoverage is known of few clusters of unequal size.
    assert 0.92 <= covered / 2000 <= 0.965
    naive = clustered_mean(shared + torch.randn(len(which), generator=generator), torch.arange(len(which)))
    assert naive.standard_error < math.sqrt(1 / clusters) * 0.8
