"""Timing models in turn, statistics of the runs, and intervals that hold what they promise."""

from functools import partial
from itertools import chain, repeat

import numpy as np
import pytest

from sleb_cli.engine import statistics
from sleb_cli.engine.speed.timing import (
    WARMUP_LIMIT,
    Measured,
    draw_prompts,
    latencies,
    time_in_turn,
    workload_result,
)
from sleb_cli.engine.statistics import MIN_ROUNDS, count_outliers, median_ratio_interval
from sleb_cli.events import Notice, ignore
from sleb_cli.results import WarmupRecord, Workload
from sleb_cli.tables.speed import tokens_per_second
from sleb_plugins.engine import TimedRun


def workload(name="generation", new_tokens=4, iterations=4, warmup=0):
    return Workload(
        name=name,
        engine="transformers",
        batch_size=2,
        prompt_length=8,
        new_tokens=new_tokens,
        iterations=iterations,
        warmup=warmup,
        compiled=False,
    )


PROMPT = workload("prompt", new_tokens=0)


class Machine:
    """Models that run in no time; each run takes the next of `seconds`, then the last."""

    def __init__(self, names, *seconds):
        self.names = names
        self.times = {name: chain(seconds, repeat(seconds[-1])) for name in names}
        self.runs = []
        self.prompts = []

    def run(self, name, prompts, new_tokens):
        assert new_tokens == 4
        self.runs.append(name)
        self.prompts.append(prompts)
        return TimedRun(next(self.times[name]))

    def time(self, workload, vocabulary, notify=ignore):
        models = {name: partial(self.run, name) for name in self.names}
        return time_in_turn(models, workload, vocabulary, notify)


def test_every_other_round_is_reversed_and_has_its_own_prompts():
    machine = Machine("abc", 1.0)
    measured = machine.time(workload(iterations=3), 1000)
    assert "".join(machine.runs) == "abc" + "cba" + "abc"
    assert measured.rounds == [dict.fromkeys("abc", TimedRun(1.0))] * 3
    first = machine.prompts[::3]
    assert machine.prompts[1::3] == machine.prompts[2::3] == first
    assert len({str(of_round) for of_round in first}) == 3
    assert [len(prompts) for prompts in first[0]] == [8, 8]
    assert all(0 <= token < 1000 for of_round in first for prompt in of_round for token in prompt)
    assert draw_prompts(workload(), 1000, 1) != first[0] == draw_prompts(workload(), 1000, 0)


@pytest.mark.parametrize(
    ("seconds", "asked", "runs", "stable"),
    [
        ((1.0,), None, 3, True),
        ((9.0, 5.0, 1.0, 1.0, 1.01), None, 5, True),
        ((1.0, 1.1) * 20, None, WARMUP_LIMIT, False),
        ((1.0, 2.0, 1.0), 5, 5, None),
    ],
)
def test_models_warm_up_until_their_times_are_stable(seconds, asked, runs, stable):
    heard = []
    machine = Machine(["dense", "pruned"], *seconds)
    measured = machine.time(workload(warmup=asked), 10, heard.append)
    assert (measured.warmup.runs, measured.warmup.stable) == (runs, stable)
    assert len(machine.runs) == 2 * (runs + 4)
    assert len(measured.rounds) == 4
    told = [event.text for event in heard if isinstance(event, Notice)]
    assert len(told) == (stable is False)
    assert all("times still vary by 4.4% after 10 warm-up runs" in text for text in told)


def test_the_statistics_have_known_answers():
    runs = [TimedRun(1.0, (0.4, 0.5, 0.7, 0.9)), TimedRun(2.0, (0.8, 1.0, 1.4, 1.8))]
    found = latencies(workload(), runs)
    assert found["tokens_per_second"] == pytest.approx(16 / 3)
    assert found["ttfts"] == (0.4, 0.8)
    assert np.array(found["itls"]) == pytest.approx(np.array([(0.1, 0.2, 0.2), (0.2, 0.4, 0.4)]))
    means = [found[name].mean for name in ("ttft_ms", "tpot_ms")]
    assert means == pytest.approx([600, 250])
    assert [found["itl_ms"].median, found["itl_ms"].p90] == pytest.approx([200, 400])
    assert found["e2el_ms"].p99 == pytest.approx(1990)


def test_the_first_token_of_a_prompt_is_its_end():
    found = latencies(PROMPT, [TimedRun(1.0), TimedRun(3.0)])
    assert found["ttfts"] == found["e2els"] == (1.0, 3.0)
    assert found["itl_ms"] is found["tpot_ms"] is None
    assert found["tokens_per_second"] == 2 * 2 * 8 / 4


@pytest.mark.parametrize(
    ("sample", "expected"),
    [([1, 2, 3, 4, 5], 0), ([1, 1, 1, 1, 9], 1), ([0, 10, 10.1, 10.2, 10.3, 30], 2), ([3], 0)],
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


@pytest.mark.parametrize(
    "kind", ["independent", "correlated", "long phases", "a slow drift", "spikes"]
)
@pytest.mark.parametrize("runs", [10, 20])
def test_a_model_is_as_fast_as_itself_in_19_of_20_intervals(kind, runs, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(0)
    intervals = [median_ratio_interval(*rounds(kind, runs, rng)) for _ in range(100)]
    assert sum(found.low <= 1 <= found.high for found in intervals) >= 93
    pairs = zip(intervals[::2], intervals[1::2], strict=True)
    assert sum(a.low <= b.high and b.low <= a.high for a, b in pairs) >= 49


def test_a_real_speedup_is_told_from_none():
    rng = np.random.default_rng(0)
    intervals = [
        median_ratio_interval(*rounds("correlated", 10, rng, ratio=1.2)) for _ in range(50)
    ]
    assert all(found.low > 1 for found in intervals)


def test_an_interval_is_reproducible_and_needs_enough_rounds():
    # With so many rounds, other resamples would give another interval.
    dense, pruned = rounds("spikes", 20, np.random.default_rng(0))
    assert median_ratio_interval(dense, pruned) == median_ratio_interval(dense, pruned)
    assert median_ratio_interval(dense[:MIN_ROUNDS], pruned[:MIN_ROUNDS]) is not None
    assert median_ratio_interval(dense[: MIN_ROUNDS - 1], pruned[: MIN_ROUNDS - 1]) is None


def test_a_speedup_is_over_the_dense_runs_of_the_same_rounds():
    steady = WarmupRecord(runs=3, deviation=0.03, stable=True)
    varying = WarmupRecord(runs=9, deviation=0.09, stable=False)
    pairs = [
        Measured(steady, [{(): TimedRun(2), (3,): TimedRun(1)}] * 2),
        Measured(varying, [{(): TimedRun(6), (3, 4): TimedRun(2)}] * 2),
    ]
    found = workload_result(PROMPT, pairs, {}, engine_version=None, attention=None)
    assert found.dense.e2els == (2, 2, 6, 6)
    assert {timing.removals: timing.speedup for timing in found.pruned} == {(3,): 2, (3, 4): 3}
    assert (found.warmup.runs, found.warmup.deviation, found.warmup.stable) == (9, 0.09, False)
    assert found.pruned[0].interval is found.dense.memory is None


def test_a_slow_run_makes_no_row_contradict_itself():
    rounds = [{(): TimedRun(2), (3,): TimedRun(1)}] * 4
    rounds.append({(): TimedRun(2), (3,): TimedRun(9)})
    warmup = WarmupRecord(runs=3, deviation=0.03, stable=True)
    measured = [Measured(warmup, rounds)]
    result = workload_result(PROMPT, measured, {}, engine_version=None, attention=None)
    dense, pruned = result.dense, result.pruned[0]
    assert pruned.speedup == 2
    assert pruned.tokens_per_second < dense.tokens_per_second
    assert [tokens_per_second(result.workload, timing) for timing in (dense, pruned)] == [8, 16]
