"""From timed runs to statistics: percentiles, outliers, and the interval of a speedup. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from sleb_cli.results import Interval, Workload
from sleb_plugins.engine import TimedRun

RESAMPLES = 9_999
FEWEST_ROUNDS = 5
"""With fewer, no interval that a bootstrap finds would hold its 95 %."""

_BOOTSTRAP_SEED = 0


def latency_statistics(workload: Workload, runs: Sequence[TimedRun]) -> dict[str, Any]:
    """Return the fields of a `Timing` that follow from its runs, under the names of `vllm bench serve`."""
    e2els = [run.seconds for run in runs]
    ttfts = [run.token_seconds[0] if run.token_seconds else run.seconds for run in runs]
    itls = [tuple(np.diff(run.token_seconds).tolist()) for run in runs if len(run.token_seconds) > 1]
    tpots = [sum(steps) / len(steps) for steps in itls]
    prompts, duration = workload.batch_size * len(runs), sum(e2els)
    read, written = prompts * workload.prompt_length, prompts * workload.new_tokens
    return {
        "duration": duration,
        "completed": prompts,
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": prompts / duration,
        "output_throughput": written / duration,
        "total_token_throughput": (read + written) / duration,
        **_milliseconds("ttft", ttfts),
        **_milliseconds("tpot", tpots),
        **_milliseconds("itl", [seconds for steps in itls for seconds in steps]),
        **_milliseconds("e2el", e2els),
        "ttfts": tuple(ttfts),
        "itls": tuple(itls),
        "e2els": tuple(e2els),
        "outliers": count_outliers(e2els),
    }


def _milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Return mean, median, standard deviation and percentiles; all None without samples."""
    names = ("mean", "median", "std", "p50", "p90", "p99")
    if not seconds:
        return {f"{statistic}_{name}_ms": None for statistic in names}
    sample = np.asarray(seconds) * 1000
    values = (sample.mean(), np.median(sample), sample.std(), *np.percentile(sample, (50, 90, 99)))
    return {f"{statistic}_{name}_ms": float(value) for statistic, value in zip(names, values, strict=True)}


def count_outliers(sample: Sequence[float]) -> int:
    """Count what lies beyond Tukey's fences: 1.5 interquartile ranges below or above the quartiles."""
    low, high = np.percentile(sample, (25, 75))
    margin = 1.5 * (high - low)
    return sum(not low - margin <= value <= high + margin for value in sample)


def relative_deviation(sample: Sequence[float]) -> float:
    """Return the standard deviation as a share of the mean."""
    return float(np.std(sample) / np.mean(sample))


def speedup_interval(dense: Sequence[float], pruned: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of the ratio of the medians, dense over pruned; None if there are too few rounds.

    Resamples whole rounds, since what slows a machine for a while slows both runs of a round; the rounds themselves go
    to and fro, so a steady drift favours neither. Percentiles of a small sample's bootstrap are too narrow, so they are
    moved apart as Student's t demands (Hesterberg, "What Teachers Should Know About the Bootstrap", section 5.3).
    """
    rounds = len(dense)
    if rounds < FEWEST_ROUNDS:
        return None
    chosen = np.random.default_rng(_BOOTSTRAP_SEED).integers(rounds, size=(RESAMPLES, rounds))
    ratios = np.median(np.asarray(dense)[chosen], axis=1) / np.median(np.asarray(pruned)[chosen], axis=1)
    tail = norm.cdf(-np.sqrt(rounds / (rounds - 1)) * t.ppf(0.975, rounds - 1))
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Interval(low=float(low), high=float(high))
