"""Sequences that are held out: which they are, and when their losses part from those searched."""

import math
import random
import statistics

import pytest
import torch

from sleb_cli.engine.search.held_out import ERROR, HeldOut, compare_growth, hold_out
from sleb_cli.engine.text.calibration import Calibration
from sleb_plugins import UsageError


def calibration_of(count, *, loss_mask=False):
    sequences = torch.arange(2 * count).reshape(count, 2)
    return Calibration(sequences, None, sequences % 3 == 0 if loss_mask else None)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(16, 0.2, 3), (10, 0.25, 2), (2, 0.01, 1), (2, 0.99, 1), (16, 0.999, 15), (3, 0.5, 2)]
)
def test_the_last_sequences_are_held_out_at_least_one_and_at_least_one_is_left(count, share, held):
    whole = calibration_of(count, loss_mask=True)
    searched, kept = hold_out(whole, share)
    assert len(kept.sequences) == held
    assert torch.equal(torch.cat([searched.sequences, kept.sequences]), whole.sequences)
    assert torch.equal(torch.cat([searched.loss_mask, kept.loss_mask]), whole.loss_mask)


def test_without_a_share_nothing_is_held_out():
    whole = calibration_of(4)
    assert hold_out(whole, 0) == (whole, None)


def test_one_sequence_cannot_be_split():
    with pytest.raises(UsageError, match="cannot be split"):
        hold_out(calibration_of(1), 0.2)


def test_the_generalization_gap_and_its_error_are_those_of_students_t():
    searched, held_out = [0.1, 0.3, 0.2, 0.4], [0.5, 0.9]
    generalization_gap, error, overfits = compare_growth(searched, held_out, 0.05)
    assert generalization_gap == pytest.approx(0.7 - 0.25)
    squares = 0.15**2 + 0.05**2 + 0.05**2 + 0.15**2 + 0.2**2 + 0.2**2
    assert error == pytest.approx(math.sqrt(squares / 4 * (1 / 4 + 1 / 2)))
    assert overfits is (generalization_gap / error > 2.1318)  # the upper 5 % of Student's t with 4 degrees of freedom
    assert not compare_growth(held_out, searched, 0.05)[2]


def test_too_few_sequences_say_nothing():
    assert compare_growth([0.1], [9.0], 0.05) == (pytest.approx(8.9), 0.0, False)
    assert compare_growth([0.1, 0.1, 0.1], [9.0], 0.05)[2] is False


@pytest.mark.parametrize(("searched", "held_out"), [(13, 3), (51, 13), (12, 1)])
def test_chance_alone_warns_as_rarely_as_said(searched, held_out):
    rng = random.Random(0)
    rounds = 4000
    warned = sum(
        compare_growth(
            [rng.gauss(0.3, 0.1) for _ in range(searched)], [rng.gauss(0.3, 0.1) for _ in range(held_out)], ERROR
        )[2]
        for _ in range(rounds)
    )
    assert warned / rounds == pytest.approx(ERROR, abs=3 * math.sqrt(ERROR * (1 - ERROR) / rounds))


def test_a_comparison_pairs_each_sequence_with_itself_in_the_dense_model():
    losses = {
        (): ([1.0, 5.0, 2.0, 8.0], [3.0, 7.0]),
        (2,): ([1.1, 5.11, 2.1, 8.09], [3.1, 7.1]),
        (2, 4): ([1.2, 5.21, 2.2, 8.19], [3.8, 7.81]),
    }
    compared = HeldOut(lambda removed: losses[removed][0], lambda removed: losses[removed][1], steps=2)
    dense = compared.dense(math.exp)
    same, overfits = (compared.compare(removed, math.exp) for removed in ((2,), (2, 4)))
    assert (dense.loss, dense.generalization_gap, dense.overfits) == (5.0, 0.0, False)
    assert (same.overfits, overfits.overfits) == (False, True)
    assert overfits.loss == pytest.approx(statistics.fmean([3.8, 7.81]))
    assert overfits.perplexity == math.exp(overfits.loss)
    assert overfits.generalization_gap == pytest.approx(0.805 - 0.2)
