"""The racing rule on plain numbers."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy.stats import binom

from sleb_cli.engine.search.race import ERROR, Race, look_schedule, student_quantile


def run(matrix, *, batch=2, winners=1):
    """Race candidates whose scores on all sequences are known."""
    total = len(next(iter(matrix.values())))
    race = Race(total, {block: [] for block in matrix}, winners=winners)
    for start in range(0, total, batch):
        for block in race.contenders:
            race.add(block, matrix[block][start : start + batch])
        race.drop_beaten()
    return race


def draws(means, *, sequences=64, seed=0, scatter=0.06):
    """Make scores as real ones are: what a sequence is like, and a little of each candidate's own."""
    rng = random.Random(seed)
    level = [rng.gauss(3, 0.5) for _ in range(sequences)]
    return {block: [at + mean + rng.gauss(0, scatter) for at in level] for block, mean in means.items()}


def best(matrix):
    return min(matrix, key=lambda block: (sum(matrix[block]), block))


FIELD = {block: 0.02 * block for block in range(28)}


def test_the_beaten_drop_out_early_and_the_winner_is_seen_on_every_sequence():
    matrix = draws({0: 0.0, 1: 0.01, 2: 0.5, 3: 3.0})
    race = run(matrix)
    outcome = race.outcome(fast=True)
    assert outcome.scores[best(matrix)] == pytest.approx(sum(matrix[best(matrix)]) / 64)
    assert race.dropped[3].sequences <= race.dropped[2].sequences <= 14
    assert race.dropped[3].behind == pytest.approx(3.0, abs=0.3)
    assert set(outcome.scores) == {0, 1, 2, 3} - set(race.dropped)
    assert outcome.race.dropped == race.dropped


def test_most_work_is_saved():
    share = [run(draws(FIELD, seed=seed)).evaluations / (64 * 28) for seed in range(50)]
    assert statistics.fmean(share) < 0.25


NORMAL, HEAVY = (lambda rng, shape: rng.standard_normal(shape)), (lambda rng, shape: rng.standard_t(3, shape))


@pytest.mark.parametrize("tails", [NORMAL, HEAVY])
@pytest.mark.parametrize(
    ("candidates", "winners", "sequences", "races"),
    [(2, 1, 24, 300), (3, 1, 64, 200), (4, 1, 24, 250), (28, 1, 24, 100), (8, 3, 24, 200)],
)
def test_a_true_winner_drops_out_as_rarely_as_is_stated(candidates, winners, sequences, races, tails):
    """Over all sequences, the winner is hardly better; all scatter alike, or one five times as much.

    If the rate were just `ERROR`, one case in a thousand would fail.
    """
    rng = np.random.default_rng(candidates)
    wrong = 0
    for odd in (None, 0, candidates - 1):
        for _ in range(races):
            scores = tails(rng, (candidates, sequences))
            if odd is not None:
                scores[odd] *= 5
            scores -= scores.mean(1, keepdims=True)
            scores[winners:] += 1e-6
            race = run(dict(enumerate(scores.tolist())), batch=max(1, sequences // 32), winners=winners)
            wrong += any(block in race.dropped for block in range(winners))
    assert wrong <= binom.ppf(0.999, 3 * races, ERROR)


def test_a_leader_that_scatters_does_not_pass_for_a_second_winner():
    """2 is clearly behind 1, and nothing is known of 0: it may be among the two winners, and so may 2."""
    rng = np.random.default_rng(0)
    level, scatter = rng.normal(size=64), rng.normal(size=64)
    scatter -= scatter[:16].mean()
    matrix = {0: level + 100 * scatter - 1, 1: level, 2: level + 1 + 0.01 * rng.normal(size=64)}
    race = Race(64, {block: list(scores[:16]) for block, scores in matrix.items()}, winners=2)
    assert race.ranking() == [0, 1, 2]
    race.drop_beaten()
    assert race.contenders == [0, 1, 2]


@pytest.mark.parametrize(
    ("sequences", "looks"), [(8, []), (9, [4]), (32, [4, 5, 6, 7, 9, 12, 15]), (38, [4, 5, 6, 7, 9, 12, 15])]
)
def test_looks_are_a_quarter_apart_and_end_before_half_of_the_sequences(sequences, looks):
    assert look_schedule(sequences) == looks


def test_nobody_drops_out_after_half_of_the_sequences():
    """The last sequences can still be unlike all others."""
    matrix = draws({0: 0.0, 1: 3.0})
    race = Race(64, {block: list(scores[:32]) for block, scores in matrix.items()})
    race.drop_beaten()
    assert not race.dropped


def test_equal_scores_never_drop_anybody():
    race = run({block: [1.0] * 16 for block in range(4)})
    assert race.contenders == [0, 1, 2, 3]
    assert race.outcome(fast=True).race.margin == 0


def test_three_sequences_say_nothing_of_chance():
    race = Race(64, {0: [1.0, 1.1, 1.0], 1: [9.0, 9.0, 9.1]})
    race.drop_beaten()
    assert race.contenders == [0, 1]


def test_without_a_race_everybody_has_a_score():
    race = Race(2, {0: [1.0, 2.0], 1: [3.0, 4.0]})
    outcome = race.outcome(fast=False)
    assert outcome.scores == {0: 1.5, 1: 3.5}
    assert outcome.race is None


def test_the_margin_is_that_over_the_second_best():
    race = Race(2, {0: [4.0, 4.0], 1: [1.0, 2.0], 2: [9.0, 9.0], 3: [2.0, 3.0]})
    assert race.outcome(fast=True).race.margin == 1.0
    assert Race(1, {0: [1.0]}).outcome(fast=True).race.margin is None


def test_a_constant_lead_is_certain_at_once():
    race = run({0: [1.0] * 16, 1: [2.0] * 16})
    assert race.dropped[1].sequences == 4
    assert race.dropped[1].errors == 1e9


# Percentage points of Student's t, from tables.
QUANTILES = [
    (0.05, 10, 1.812),
    (0.01, 10, 2.764),
    (0.001, 10, 4.144),
    (0.001, 30, 3.385),
    (0.0005, 20, 3.850),
    (0.05, 1000, 1.646),
]


@pytest.mark.parametrize(("tail", "freedom", "value"), QUANTILES)
def test_students_quantiles(tail, freedom, value):
    assert student_quantile(tail, freedom) == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize(("seen", "looks"), [(4, 1), (5, 2), (16, 7), (40, 11)])
@pytest.mark.parametrize(("rivals", "winners"), [(1, 1), (5, 1), (4, 2)])
def test_a_contender_drops_out_beyond_the_limit_and_not_before(seen, looks, rivals, winners):
    """Several looks in one spend their shares together; the winners are level, and all rivals are as far behind."""
    tail = ERROR * looks / len(look_schedule(10_000)) / (rivals * winners)
    scatter = [(-1.0) ** n for n in range(seen)]
    error = (statistics.variance(scatter) * (1 / seen - 1 / 10_000)) ** 0.5
    for times, drops in ((0.999, False), (1.001, True)):
        behind = times * student_quantile(tail, seen - 1) * error - statistics.fmean(scatter)
        scores = {block: [0.0] * seen for block in range(winners)}
        scores |= {winners + block: [behind + by for by in scatter] for block in range(rivals)}
        race = Race(10_000, scores, winners=winners)
        race.drop_beaten()
        assert list(race.dropped) == (list(range(winners, winners + rivals)) if drops else [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_whose_scores_are_not_finite_never_wins_and_disturbs_no_other(bad):
    matrix = draws({block: 0.02 * block for block in range(12)})
    clean = run({block: scores for block, scores in matrix.items() if block != 3})
    matrix[3] = [bad if number == 1 else -9.0 for number in range(len(matrix[3]))]
    race = run(matrix)
    assert race.ranking()[-1] == 3
    assert race.dropped == clean.dropped
    outcome = race.outcome(fast=True)
    assert outcome.scores.pop(3) == math.inf
    assert outcome == clean.outcome(fast=True)
