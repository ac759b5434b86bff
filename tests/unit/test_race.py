"""The racing rule on plain numbers."""

import math
import statistics

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from sleb_cli.engine.search.race import DRIFT, NEGLIGIBLE, PRIOR_FREEDOM, Race, expected_improvement

FIELD = [0.02 * block for block in range(28)]


def run(matrix):
    """Race candidates whose 64 scores are known; return the race and its winner."""
    race = Race(list(matrix), 64)
    for seen in range(2, 66, 2):
        race.drop_beaten({block: matrix[block][:seen] for block in race.contenders})
    means = {block: statistics.fmean(matrix[block]) for block in race.contenders}
    return race, race.outcome(means).best


DRAWS = {
    "normal": lambda rng: rng.standard_normal((28, 64)),
    "skewed": lambda rng: rng.standard_exponential((28, 64)),
    "heavy tails, where a few sequences decide": lambda rng: rng.standard_t(3, (28, 64)),
    "a winner that scatters five times as much": lambda rng: rng.normal(0, OF_THE_WINNER, (28, 64)),
}
OF_THE_WINNER = np.array([[5.0]] + [[1.0]] * 27)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_most_work_is_saved_at_a_small_cost(draw):
    """As in SmolLM2, neighbours are .02 nats apart, less than chance on few sequences."""
    rng = np.random.default_rng(0)
    field = 0.02 * np.arange(28)
    shares = []
    costs = []
    for _ in range(100):
        scores = draw(rng)
        scores *= 0.1 / scores[1:].std()
        scores += field[:, None] - scores.mean(1, keepdims=True)
        level = 3 + rng.standard_normal(64) / 2  # what a sequence is like
        race, best = run(dict(enumerate((level + scores).tolist())))
        shares.append(race.evaluations / (28 * 64))
        costs.append(field[best])
    assert statistics.fmean(shares) < 0.15
    assert costs.count(0) > 60
    assert statistics.fmean(costs) < 0.01  # half of what neighbours differ by


# Of these sequences, the second is 0.1 worse on average, with an error of 0.02 on all of them.
CLEARLY = {0: [1.0, 2.0, 3.0, 4.0] * 4, 1: [1.2, 2.0, 3.2, 4.0] * 4}


@pytest.mark.parametrize(
    ("matrix", "sequences", "drops"),
    [
        (CLEARLY, 64, [1]),
        (CLEARLY, 17, []),  # near the end, little is saved
        ({0: [1.0, 3.0] * 2, 1: [2.0, 2.1] * 2}, 64, []),  # behind by less than chance
        ({0: [1.0], 1: [9.0]}, 64, []),  # one sequence says nothing of chance
        ({block: [1.0] * 7 for block in range(4)}, 16, []),  # equal scores
        ({0: [1.0] * 2, 1: [2.0] * 2}, 16, [1]),  # a constant lead is certain at once
    ],
)
def test_one_look_drops_who_is_behind_for_certain(matrix, sequences, drops):
    race = Race(list(matrix), sequences)
    race.drop_beaten(matrix)
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
