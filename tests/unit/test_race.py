"""The racing rule on plain numbers."""

import random
import statistics

import pytest

from sleb_cli.engine.search.race import ERROR, PRIOR, Race, student_quantile


def run(matrix, *, batch=2):
    """Race candidates whose scores on all sequences are known."""
    total = len(next(iter(matrix.values())))
    race = Race(total, -(-total // batch), {block: [] for block in matrix})
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
    assert race.dropped[3].sequences <= race.dropped[2].sequences <= 12
    assert race.dropped[3].behind == pytest.approx(3.0, abs=0.3)
    assert set(outcome.scores) == {0, 1, 2, 3} - set(race.dropped)
    assert outcome.race.dropped == race.dropped


def test_the_winner_drops_out_no_more_often_than_is_stated_and_most_work_is_saved():
    wrong, share = 0, []
    for seed in range(200):
        matrix = draws(FIELD, seed=seed)
        race = run(matrix)
        wrong += best(matrix) in race.dropped
        share.append(race.evaluations / (64 * 28))
    assert wrong <= ERROR * 200
    assert sum(share) / len(share) < 0.25


def test_of_rivals_that_are_as_good_as_equal_the_better_one_stays():
    matrices = [draws({0: 0.0, 1: 0.0, 2: 0.001}, seed=seed) for seed in range(100)]
    wrong = sum(best(matrix) in run(matrix).dropped for matrix in matrices)
    assert wrong <= ERROR * 100


def test_equal_scores_never_drop_anybody():
    race = run({block: [1.0] * 16 for block in range(4)})
    assert race.contenders == [0, 1, 2, 3]
    assert race.outcome(fast=True).race.margin == 0


def test_one_sequence_says_nothing_of_chance():
    race = Race(8, 8, {0: [1.0], 1: [9.0]})
    race.drop_beaten()
    assert race.contenders == [0, 1]


def test_without_a_race_everybody_has_a_score():
    race = Race(2, 1, {0: [1.0, 2.0], 1: [3.0, 4.0]})
    outcome = race.outcome(fast=False)
    assert outcome.scores == {0: 1.5, 1: 3.5}
    assert outcome.race is None


def test_a_constant_lead_is_certain_at_once():
    race = run({0: [1.0] * 8, 1: [2.0] * 8})
    assert race.dropped[1].sequences == 2
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


@pytest.mark.parametrize(("tail", "freedom", "value"), QUANTILES)
def test_a_rival_drops_out_beyond_the_quantile_of_the_table_and_not_before(tail, freedom, value):
    seen = freedom - PRIOR + 1
    scatter = [(-1.0) ** n for n in range(seen)]
    error = (statistics.variance(scatter) * (1 / seen - 1 / 10_000)) ** 0.5
    for times, drops in ((value - 0.001, False), (value + 0.001, True)):
        behind = times * error - statistics.fmean(scatter)
        race = Race(10_000, round(ERROR / tail), {0: [0.0] * seen, 1: [behind + by for by in scatter]})
        race.drop_beaten()
        assert (1 in race.dropped) == drops
