"""The racing rule on plain numbers."""

import math
import random
import statistics
from types import MappingProxyType

import numpy as np
import pytest
from scipy.stats import binom, t

from sleb_cli.engine.search.choices import comparable
from sleb_cli.engine.search.race import ERROR, Race, look_schedule


def run(matrix, *, batch=2, before=MappingProxyType({})):
    """Race candidates whose scores on all sequences are known."""
    total = len(next(iter(matrix.values())))
    race = Race(list(matrix), total, before)
    for seen in range(batch, total + batch, batch):
        race.drop_beaten({block: matrix[block][:seen] for block in race.contenders})
    return race


def looked(matrix, sequences):
    """Let a race look once at these scores, of which there will be more."""
    race = Race(list(matrix), sequences)
    race.drop_beaten(matrix)
    return race


def draws(means, *, sequences=64, seed=0, scatter=0.06):
    """Make scores as real ones are: what a sequence is like, and a little of each candidate's own."""
    rng = random.Random(seed)
    level = [rng.gauss(3, 0.5) for _ in range(sequences)]
    return {block: [at + mean + rng.gauss(0, scatter) for at in level] for block, mean in means.items()}


def test_most_work_is_saved():
    field = {block: 0.02 * block for block in range(28)}
    share = [run(draws(field, seed=seed)).evaluations / (64 * 28) for seed in range(50)]
    assert statistics.fmean(share) < 0.25


NORMAL, HEAVY = (lambda rng, shape: rng.standard_normal(shape)), (lambda rng, shape: rng.standard_t(3, shape))


@pytest.mark.parametrize("tails", [NORMAL, HEAVY])
@pytest.mark.parametrize(
    ("candidates", "sequences", "races", "likeness"),
    [(3, 64, 200, 0), (28, 24, 100, 0), (3, 64, 200, 0.9), (28, 24, 100, 0.9)],
)
def test_a_true_winner_drops_out_as_rarely_as_stated(candidates, sequences, races, likeness, tails):
    """Over all sequences, the winner is hardly better; all scatter alike, or one five times as much.

    In the step before, scores were correlated to these by `likeness`, and candidates dropped out early, or never.
    If the rate were just `ERROR`, one case in a thousand would fail.
    """
    rng = np.random.default_rng(candidates)
    wrong = 0
    for odd in (None, 0, candidates - 1):
        for _ in range(races):
            before, scores = tails(rng, (2, candidates, sequences))
            scores = likeness * before + (1 - likeness**2) ** 0.5 * scores
            if odd is not None:
                scores[odd] *= 5
                before[odd] *= 5
            scores -= scores.mean(1, keepdims=True)
            scores[1:] += 1e-6
            ends = rng.choice([4, 8, sequences], candidates)
            known = {block: list(before[block, :end]) for block, end in enumerate(ends) if likeness}
            matrix = dict(enumerate(scores.tolist()))
            race = run(matrix, batch=max(1, sequences // 32), before=known)
            wrong += 0 in race.dropped
    assert wrong <= binom.ppf(0.999, 3 * races, ERROR)


@pytest.mark.parametrize(
    ("matrix", "sequences", "drops"),
    [
        (draws({0: 0.0, 1: 3.0}, sequences=52), 64, []),  # near the end, little is saved
        ({0: [1.0, 1.1, 1.0], 1: [9.0, 9.0, 9.1]}, 64, []),  # three sequences say nothing of chance
        ({block: [1.0] * 7 for block in range(4)}, 16, []),  # equal scores
        ({0: [1.0] * 4, 1: [2.0] * 4}, 16, [1]),  # a constant lead is certain at once
    ],
)
def test_who_drops_out_at_one_look(matrix, sequences, drops):
    race = looked(matrix, sequences)
    assert list(race.dropped) == drops
    assert all(drop.errors == 1e9 for drop in race.dropped.values())


@pytest.mark.parametrize(("seen", "looks"), [(4, 1), (5, 2), (16, 7), (40, 11)])
@pytest.mark.parametrize("rivals", [1, 5])
def test_a_contender_drops_out_just_beyond_the_limit(seen, looks, rivals):
    """Several looks in one spend their shares together; all rivals are as far behind."""
    tail = ERROR * looks / len(look_schedule(10_000)) / rivals
    freedom = seen - 1 + min(6, math.comb(1 + rivals, 2) - 1)
    scatter = [(-1.0) ** n for n in range(seen)]
    error = (statistics.variance(scatter) * (1 / seen - 1 / 10_000)) ** 0.5
    for times, drops in ((0.999, False), (1.001, True)):
        behind = times * t.isf(tail, freedom) * error - statistics.fmean(scatter)
        scores = {0: [0.0] * seen} | {1 + block: [behind + by for by in scatter] for block in range(rivals)}
        race = looked(scores, 10_000)
        assert list(race.dropped) == (list(range(1, 1 + rivals)) if drops else [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_disturb_no_other(bad):
    matrix = draws({block: 0.02 * block for block in range(12) if block != 3})
    race = run(matrix | {3: [-9.0, comparable(bad), *[-9.0] * 62]})
    assert race.dropped == run(matrix).dropped != {}
    assert 3 in race.contenders
