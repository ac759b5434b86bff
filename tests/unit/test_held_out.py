"""Sequences that are held out: which they are, and when their losses part from those searched."""

import math
import random
import statistics

import pytest
import torch

from sleb_cli.engine.search.held_out import ERROR, compare_growth, compare_with_held_out, hold_out
from sleb_cli.engine.text.calibration import Calibration
from sleb_plugins import UsageError


def calibration_of(count):
    sequences = torch.arange(2 * count).reshape(count, 2)
    return Calibration(sequences, None, sequences % 3 == 0)


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(16, 0.2, 3), (10, 0.25, 2), (2, 0.01, 1), (2, 0.99, 1), (16, 0.999, 15), (3, 0.5, 2), (4, 0, 0)],
)
def test_the_last_are_held_out_and_both_parts_keep_one(count, share, held):
    whole = calibration_of(count)
    searched, kept = hold_out(whole, share)
    assert (0 if kept is None else len(kept.sequences)) == held
    parts = [searched, kept] if kept else [searched]
    assert torch.equal(torch.cat([part.sequences for part in parts]), whole.sequences)
    assert torch.equal(torch.cat([part.loss_mask for part in parts]), whole.loss_mask)


def test_one_sequence_cannot_be_split():
    with pytest.raises(UsageError, match="cannot be split"):
        hold_out(calibration_of(1), 0.2)


@pytest.mark.parametrize(
    ("searched", "held_out", "error", "overfits"),
    [
        ([0.1, 0.3, 0.2, 0.4], [0.5, 0.9], math.sqrt(0.13 / 4 * (1 / 4 + 1 / 2)), True),  # 2.88 standard errors
        ([0.5, 0.9], [0.1, 0.3, 0.2, 0.4], math.sqrt(0.13 / 4 * (1 / 4 + 1 / 2)), False),
        ([0.1], [9.0], 0.0, False),  # too few say nothing
        ([0.1, 0.1, 0.1], [9.0], 0.0, False),
    ],
)
def test_the_gap_and_its_error_are_those_of_students_t(searched, held_out, error, overfits):
    gap = statistics.fmean(held_out) - statistics.fmean(searched)
    assert compare_growth(searched, held_out, 0.05) == (pytest.approx(gap), pytest.approx(error), overfits)


@pytest.mark.parametrize(("searched", "held_out"), [(13, 3), (51, 13), (12, 1)])
def test_chance_alone_warns_as_rarely_as_said(searched, held_out):
    rng = random.Random(0)
    rounds = 4000
    warned = sum(
        compare_growth(*([rng.gauss(0.3, 0.1) for _ in range(count)] for count in (searched, held_out)), ERROR)[2]
        for _ in range(rounds)
    )
    assert warned / rounds == pytest.approx(ERROR, abs=3 * math.sqrt(ERROR * (1 - ERROR) / rounds))


def test_each_sequence_is_paired_with_itself_in_the_dense_model():
    losses = {
        (): ([1.0, 5.0, 2.0, 8.0], [3.0, 7.0]),
        (2,): ([1.1, 5.11, 2.1, 8.09], [3.1, 7.1]),
        (2, 4): ([1.2, 5.21, 2.2, 8.19], [3.8, 7.81]),
    }
    of_part = [lambda removed, part=part: losses[removed][part] for part in (0, 1)]
    dense, same, worse = (compare_with_held_out(*of_part, removed, math.exp, 2) for removed in losses)
    assert (dense.loss, dense.generalization_gap, dense.overfits) == (5.0, 0.0, False)
    assert (same.overfits, worse.overfits) == (False, True)
    assert worse.loss == pytest.approx(statistics.fmean([3.8, 7.81]))
    assert worse.perplexity == math.exp(worse.loss)
    assert worse.generalization_gap == pytest.approx(0.805 - 0.2)
