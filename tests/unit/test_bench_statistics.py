"""Statistics of timed runs: known answers, vLLM's names, and intervals that keep their promise."""

import numpy as np
import pytest

from sleb_cli.engine.speed import statistics
from sleb_cli.engine.speed.in_turn import Measured, Sample
from sleb_cli.engine.speed.statistics import (
    FEWEST_ROUNDS,
    count_outliers,
    latency_statistics,
    speedup_interval,
)
from sleb_cli.engine.speed.timings import DENSE, Compared, Facts, workload_result
from sleb_cli.results import WarmupRecord, Workload
from sleb_plugins.engine import TimedRun

WORKLOAD = Workload(
    name="generation", engine="transformers", batch_size=2, prompt_length=8, new_tokens=4, iterations=2, warmup=1,
    cooldown=0.0, seed=0, compiled=False, static_cache=False,
)  # fmt: skip
RUNS = [TimedRun(1.0, (0.4, 0.5, 0.7, 0.9)), TimedRun(2.0, (0.8, 1.0, 1.4, 1.8))]


def test_known_answers():
    found = latency_statistics(WORKLOAD, RUNS)
    assert (found["duration"], found["completed"]) == (3.0, 4)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (32, 16)
    assert found["request_throughput"] == pytest.approx(4 / 3)
    assert found["output_throughput"] == pytest.approx(16 / 3)
    assert found["total_token_throughput"] == pytest.approx(48 / 3)
    assert found["ttfts"] == (0.4, 0.8)
    assert found["itls"] == (pytest.approx((0.1, 0.2, 0.2)), pytest.approx((0.2, 0.4, 0.4)))
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(600)
    assert found["std_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx((500 / 3 + 1000 / 3) / 2)
    assert found["median_itl_ms"] == pytest.approx(200)
    assert found["p90_itl_ms"] == pytest.approx(400)
    assert found["p99_e2el_ms"] == pytest.approx(1990)


def test_a_prompt_has_no_tokens_in_between_and_its_first_is_its_end():
    prompt = WORKLOAD.model_copy(update={"name": "prompt", "new_tokens": 0})
    found = latency_statistics(prompt, [TimedRun(1.0), TimedRun(3.0)])
    assert found["ttfts"] == found["e2els"] == (1.0, 3.0)
    assert found["itls"] == ()
    assert found["mean_itl_ms"] is found["p99_tpot_ms"] is None
    assert found["output_throughput"] == 0
    assert found["total_token_throughput"] == 2 * 2 * 8 / 4


@pytest.mark.parametrize(
    ("sample", "expected"), [([1, 2, 3, 4, 5], 0), ([1, 1, 1, 1, 9], 1), ([0, 10, 10.1, 10.2, 10.3, 30], 2), ([3], 0)]
)
def test_outliers_lie_beyond_the_fences(sample, expected):
    assert count_outliers(sample) == expected


def noise(kind, runs, rng):
    """Return the noise of consecutive runs, in log time."""
    if kind == "a slow drift":
        return np.linspace(0, 0.1, runs) + rng.normal(size=runs) * 0.01
    if kind == "spikes":
        return rng.normal(size=runs) * 0.005 + (rng.random(runs) < 0.08) * 0.3
    correlation = {"independent": 0.0, "correlated": 0.5, "long phases": 0.9}[kind]
    values = [rng.normal()]
    for _ in range(runs - 1):
        values.append(correlation * values[-1] + rng.normal() * np.sqrt(1 - correlation**2))
    return np.array(values) * 0.03


def rounds(kind, count, rng, ratio=1.0):
    """Return the times of two models in `count` rounds, to and fro."""
    times = np.exp(noise(kind, 2 * count, rng)).reshape(count, 2)
    times[1::2] = times[1::2, ::-1]
    return times[:, 0] * ratio, times[:, 1]


@pytest.mark.parametrize("kind", ["independent", "correlated", "long phases", "a slow drift", "spikes"])
@pytest.mark.parametrize("count", [10, 20])
def test_a_model_beside_itself_is_as_fast_in_19_of_20_intervals(kind, count, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(0)
    intervals = [speedup_interval(*rounds(kind, count, rng)) for _ in range(100)]
    covered = sum(found.low <= 1 <= found.high for found in intervals)
    assert covered >= 93
    pairs = zip(intervals[::2], intervals[1::2], strict=True)
    assert sum(a.low <= b.high and b.low <= a.high for a, b in pairs) >= 49


def test_a_real_speedup_is_told_from_none():
    rng = np.random.default_rng(0)
    intervals = [speedup_interval(*rounds("correlated", 10, rng, ratio=1.2)) for _ in range(50)]
    assert sum(found.low <= 1.2 <= found.high for found in intervals) >= 46
    assert all(found.low > 1 for found in intervals)


def test_the_same_samples_give_the_same_interval_and_too_few_none():
    # So many rounds that other resamples would give another interval.
    dense, pruned = rounds("spikes", 20, np.random.default_rng(0))
    found = [speedup_interval(dense, pruned) for _ in range(4)]
    assert found == found[:1] * 4
    assert speedup_interval(dense[:FEWEST_ROUNDS], pruned[:FEWEST_ROUNDS]) is not None
    assert speedup_interval(dense[: FEWEST_ROUNDS - 1], pruned[: FEWEST_ROUNDS - 1]) is None


def sample(*seconds):
    return Sample(tuple(TimedRun(value) for value in seconds), "RAPL", tuple(10 * value for value in seconds))


def test_sizes_timed_in_pairs_have_a_speedup_over_the_dense_runs_of_their_own_rounds():
    prompt = WORKLOAD.model_copy(update={"name": "prompt", "new_tokens": 0})
    warmups = [WarmupRecord(runs=3, deviation=0.01, stable=True), WarmupRecord(runs=9, deviation=0.03, stable=False)]
    compared = [
        Compared(Measured(warmups[0], {DENSE: sample(2, 2), "a": sample(1, 1)}), {"a": (3,)}),
        Compared(Measured(warmups[1], {DENSE: sample(6, 6), "b": sample(2, 2)}), {"b": (3, 4)}),
    ]
    found = workload_result(prompt, compared, Facts())
    assert found.dense.e2els == (2, 2, 6, 6)
    assert [(timing.removals, timing.speedup) for timing in found.pruned] == [((3,), 2), ((3, 4), 3)]
    assert (found.warmup.runs, found.warmup.deviation, found.warmup.stable) == (9, 0.03, False)
    assert found.dense.energy.joules_per_iteration == 40
    assert found.dense.energy.joules_per_token == 40 / 16
    assert found.pruned[0].interval is found.pruned[0].bound is found.dense.memory is None
