"""Sequences that are held out: which they are, and when their losses part from those searched."""

import math
import random
import statistics

import pytest
import torch

from sleb_cli.engine.search.held_out import MAX_ERROR_RATE, hold_out, overfitting_test
from sleb_cli.engine.text.calibration import Calibration


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [
        (16, 0.2, 3),
        (10, 0.25, 2),
        (2, 0.01, 1),
        (2, 0.99, 1),
        (16, 0.999, 15),
        (3, 0.5, 2),
        (4, 0, 0),
    ],
)
def test_the_last_are_held_out_and_both_parts_keep_one(count, share, held):
    sequences = torch.arange(2 * count).reshape(count, 2)
    searched, kept = hold_out(
        Calibration(sequences, None, sequences % 3 == 0, ("c4",) * count), share
    )
    assert (0 if kept is None else len(kept.sequences)) == held
    parts = [searched, kept] if kept else [searched]
    assert torch.equal(torch.cat([part.sequences for part in parts]), sequences)
    assert torch.equal(torch.cat([part.loss_mask for part in parts]), sequences % 3 == 0)


@pytest.mark.parametrize(
    ("searched", "held_out", "error", "overfits"),
    [
        (
            [0.1, 0.3, 0.2, 0.4],
            [0.5, 0.9],
            math.sqrt(0.13 / 4 * (1 / 4 + 1 / 2)),
            True,
        ),  # 2.88 standard errors
        ([0.5, 0.9], [0.1, 0.3, 0.2, 0.4], math.sqrt(0.13 / 4 * (1 / 4 + 1 / 2)), False),
        ([0.1], [9.0], 0.0, False),  # too few say nothing
        ([0.1, 0.1, 0.1], [9.0], 0.0, False),
        ([0.1] * 4, [9.0, 9.0], 0.0, False),  # nor does one text over and over
    ],
)
def test_the_gap_and_its_error_are_those_of_students_t(searched, held_out, error, overfits):
    gap = statistics.fmean(held_out) - statistics.fmean(searched)
    assert overfitting_test(searched, held_out, 0.05) == (
        pytest.approx(gap),
        pytest.approx(error),
        overfits,
    )


@pytest.mark.parametrize(("searched", "held_out"), [(13, 3), (12, 1)])
def test_chance_alone_warns_at_the_stated_rate(searched, held_out):
    rng = random.Random(0)
    rounds = 4000
    warned = sum(
        overfitting_test(
            *([rng.gauss(0.3, 0.1) for _ in range(count)] for count in (searched, held_out)),
            MAX_ERROR_RATE,
        )[2]
        for _ in range(rounds)
    )
    assert warned / rounds == pytest.approx(
        MAX_ERROR_RATE, abs=3 * math.sqrt(MAX_ERROR_RATE * (1 - MAX_ERROR_RATE) / rounds)
    )
