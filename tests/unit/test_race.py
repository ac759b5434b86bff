"""The racing rule on plain numbers."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from sleb_cli.engine.search.race import DRIFT, NEGLIGIBLE, PRIOR_FREEDOM, Race, expected_improvement

FIELD = [0.02 * block for block in range(28)]


def run(matrix, *, batch=2, before=None):
    """Race candidates whose scores on all sequences are known; return the race and its winner."""
    total = len(next(iter(matrix.values())))
    race = Race(list(matrix), total, before)
    for seen in range(batch, total + batch, batch):
        race.drop_beaten({block: matrix[block][:seen] for block in race.contenders})
    return race, race.outcome(
        {block: statistics.fmean(matrix[block]) for block in race.contenders}
    ).best


def looked(matrix, sequences):
    """Let a race look once at these scores, of which there will be more."""
    race = Race(list(matrix), sequences)
    race.drop_beaten(matrix)
    return race


def draws(means, *, sequences=64, seed=0, scatter=0.06):
    """Make scores as real ones are: what a sequence is like, and a little of each candidate's own."""
    rng = random.Random(seed)
    level = [rng.gauss(3, 0.5) for _ in range(sequences)]
    return {
        block: [at + mean + rng.gauss(0, scatter) for at in level] for block, mean in means.items()
    }


@pytest.mark.parametrize(
    ("tails", "odd"),
    [
        pytest.param("standard_normal", None, id="normal"),
        pytest.param("standard_exponential", None, id="skewed"),
        pytest.param("standard_t", None, id="heavy tails, where a few sequences decide"),
        pytest.param("standard_normal", 0, id="a winner that scatters five times as much"),
    ],
)
def test_most_work_is_saved_at_a_small_cost(tails, odd):
    """As in SmolLM2, neighbours in the ranking are .02 nats apart, less than chance on few
    sequences.
    """
    rng = np.random.default_rng(0)
    shares, costs = [], []
    for _ in range(100):
        scores = getattr(rng, tails)(*([3] if tails == "standard_t" else []), size=(28, 64))
        scores *= 0.1 / scores.std()
        if odd is not None:
            scores[odd] *= 5
        scores += np.array(FIELD)[:, None] - scores.mean(1, keepdims=True)
        race, best = run(dict(enumerate((3 + rng.standard_normal(64) / 2 + scores).tolist())))
        shares.append(race.evaluations / (28 * 64))
        costs.append(FIELD[best])
    assert statistics.fmean(shares) < 0.15
    assert costs.count(0) > 60
    assert statistics.fmean(costs) < 0.01  # half of what neighbours differ by


@pytest.mark.parametrize(
    ("matrix", "sequences", "drops"),
    [
        (draws({0: 0.0, 1: 3.0}, sequences=58), 64, []),  # near the end, little is saved
        ({0: [1.0], 1: [9.0]}, 64, []),  # one sequence says nothing of chance
        ({block: [1.0] * 7 for block in range(4)}, 16, []),  # equal scores
        ({0: [1.0] * 2, 1: [2.0] * 2}, 16, [1]),  # a constant lead is certain at once
    ],
)
def test_one_look_drops_who_is_behind_for_certain(matrix, sequences, drops):
    race = looked(matrix, sequences)
    assert list(race.dropped) == drops
    assert all(drop.errors == 1e9 for drop in race.dropped.values())


@pytest.mark.parametrize("sequences", [60, 10_000])
@pytest.mark.parametrize("seen", [2, 5, 16, 40])
def test_a_candidate_unlikely_to_win_is_dropped(seen, sequences):
    """One look, with no step before: d behind, s the standard error of that over all sequences."""
    scatter = [(-1.0) ** n for n in range(seen - seen % 2)] + [0.0] * (seen % 2)
    own, freedom = statistics.variance(scatter), seen - 1
    variance = (freedom * own + PRIOR_FREEDOM * own / (1 - 2 / (9 * freedom)) ** 3) / (
        freedom + PRIOR_FREEDOM
    )
    error = (variance * (1 / seen - 1 / sequences)) ** 0.5
    limits = [
        d
        for d in np.linspace(0, 6 * error, 2000)
        if expected_improvement(d, error) < NEGLIGIBLE * d
    ]
    for times, drops in ((0.99, []), (1.01, [1])):
        race = looked({0: [0.0] * seen, 1: [times * limits[0] + by for by in scatter]}, sequences)
        assert list(race.dropped) == drops


@pytest.mark.parametrize(
    ("behind", "error"), [(0.02, 0.01), (0.0, 0.03), (-0.02, 0.01), (0.5, 0.0), (-0.5, 0.0)]
)
def test_expected_improvement_is_the_mean_of_what_is_better(behind, error):
    if error:
        expected, _ = quad(
            lambda x: -x * norm.pdf(x, behind, error), -1, 0, points=[behind, behind - error]
        )
    else:
        expected = max(0.0, -behind)
    assert expected_improvement(behind, error) == pytest.approx(expected, abs=1e-9)


def test_a_race_starts_from_the_distances_of_the_step_before():
    """All were scored on all sequences, so a pair's error is the change of both; the next look
    weighs it by that.
    """
    first = Race(range(6), 3)
    assert first.outcome(dict(enumerate([5.0, 5.5, 6.0, 7.0, 9.0, math.inf]))).race.margin == 0.5
    race = Race(range(1, 6), 64, first)  # 1 leads; the median was 1.5 behind 0
    error = 2**0.5 * DRIFT * 1.5
    assert {
        block: (drop.sequences, drop.behind, drop.errors) for block, drop in race.dropped.items()
    } == {4: (0, pytest.approx(3.5), pytest.approx(3.5 / error))}
    assert expected_improvement(1.5, error) > NEGLIGIBLE * 1.0 > expected_improvement(3.5, error)
    # 3 was 1.5 behind, and is 3 behind on two sequences, with an error of s.
    race.drop_beaten({1: [1.0, 3.0], 2: [1.0, 3.0], 3: [3.0, 7.0], 5: [math.inf] * 2})
    own, median_pair = 2.0, 2.0 / (1 - 2 / 9) ** 3
    squared = (own + PRIOR_FREEDOM * median_pair) / (1 + PRIOR_FREEDOM) * (1 / 2 - 1 / 64)
    precisions = 1 / error**2, 1 / squared
    expected = (1.5 * precisions[0] + 3.0 * precisions[1]) / sum(precisions)
    assert race._behind[3] == (pytest.approx(expected), pytest.approx(1 / sum(precisions)))
