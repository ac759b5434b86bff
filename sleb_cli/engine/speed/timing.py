"""Time models in turn, and report the times in the terms of `vllm bench serve`."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from sleb_cli.engine.statistics import count_outliers, median_ratio_interval, relative_deviation
from sleb_cli.events import Advance, Notice, Notify, task
from sleb_cli.order import SizeKey
from sleb_cli.results import (
    Distribution,
    MemoryRecord,
    PrunedTiming,
    Timing,
    WarmupRecord,
    Workload,
    WorkloadResult,
)
from sleb_plugins.engine import TimedRun

Run = Callable[[Sequence[Sequence[int]], int], TimedRun]
"""Process the prompts together, and generate this many new tokens for each."""

Round = Mapping[SizeKey, TimedRun]

WARMUP_LIMIT = 10
"""Untimed runs of each model, unless the user asks for a number."""

STABLE_DEVIATION = 0.02
STABLE_RUNS = 3
"""Times are stable once the relative standard deviation of the last three is below 2%."""


@dataclass(frozen=True)
class Measured:
    """Rounds in which models were timed together, after warming up."""

    warmup: WarmupRecord
    rounds: Sequence[Round]


def time_in_turn(
    models: Mapping[SizeKey, Run], workload: Workload, vocabulary: int, notify: Notify
) -> Measured:
    """Time the models in turn, after warming up until times are stable."""
    limit = WARMUP_LIMIT if workload.warmup is None else workload.warmup
    total = (limit + workload.iterations) * len(models)
    with (
        task(notify, f"Timing {workload.label}", total, "runs") as advance,
        _without_garbage_collection(),
    ):
        rounds = _Rounds(models, workload, vocabulary, advance)
        warmup = _warm_up(rounds, limit, all_rounds=workload.warmup is not None)
        advance(done=(limit - warmup.runs) * len(models))
        timed = [rounds.run() for _ in range(workload.iterations)]
    if warmup.stable is False:
        varying = f"times still vary by {warmup.deviation:.1%} after {warmup.runs} warm-up runs"
        notify(Notice(f"{workload.label}: {varying}. Something else may be using this machine."))
    return Measured(warmup, timed)


@dataclass
class _Rounds:
    """Rounds in which each model runs once."""

    models: Mapping[SizeKey, Run]
    workload: Workload
    vocabulary: int
    advance: Advance
    number: int = 0

    def run(self) -> Round:
        """Run the next round."""
        # Each round has its own prompts, so that nothing is answered from a cache. Every other
        # round runs the models in reverse order (ABBA), so that a machine that slows down affects
        # all of them.
        prompts = draw_prompts(self.workload, self.vocabulary, self.number)
        order = list(self.models)
        if self.number % 2 == 1:
            order.reverse()
        self.number += 1
        done: dict[SizeKey, TimedRun] = {}
        for removals in order:
            done[removals] = self.models[removals](prompts, self.workload.new_tokens)
            name = f"{len(removals)} fewer" if removals else "dense"
            self.advance(note=f"{name}: {done[removals].seconds:.3f} s")
        return done


def draw_prompts(workload: Workload, vocabulary: int, number: int) -> list[list[int]]:
    """Return the prompts of a round: random tokens."""
    shape = (workload.batch_size, workload.prompt_length)
    return list(np.random.default_rng([0, number]).integers(vocabulary, size=shape).tolist())


def _warm_up(rounds: _Rounds, limit: int, *, all_rounds: bool) -> WarmupRecord:
    """Run rounds up to the limit; unless `all_rounds` are asked for, until times are stable."""
    done: list[Round] = []
    deviation: float | None = None
    stable: bool | None = None
    while len(done) < limit and (all_rounds or not stable):
        done.append(rounds.run())
        if len(done) >= STABLE_RUNS:
            deviation = 0.0  # of the model that varies most
            for model in done[0]:
                seconds = [round[model].seconds for round in done[-STABLE_RUNS:]]
                deviation = max(deviation, relative_deviation(seconds))
            stable = deviation < STABLE_DEVIATION
    return WarmupRecord(runs=len(done), deviation=deviation, stable=None if all_rounds else stable)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def workload_result(
    workload: Workload,
    measured: Sequence[Measured],
    memory: Mapping[SizeKey, MemoryRecord | None],
    **about: Any,
) -> WorkloadResult:
    """Return the result for models timed together, or each size in turn with the dense model."""
    rounds: list[Round] = []
    for group in measured:
        rounds += group.rounds
    sizes = {removals for done in rounds for removals in done}
    pruned = []
    for removals in sorted(sizes - {()}, key=len):
        fields = _timing(workload, rounds, removals)
        # The dense model's runs in the same rounds, as the machine may be slower in others.
        dense = [done[()].seconds for done in rounds if removals in done]
        speedup = statistics.median(dense) / statistics.median(fields["e2els"])
        timing = PrunedTiming(
            **fields,
            memory=memory.get(removals),
            removals=removals,
            speedup=speedup,
            interval=median_ratio_interval(dense, fields["e2els"]),
        )
        pruned.append(timing)
    return WorkloadResult(
        workload=workload,
        warmup=_worst([group.warmup for group in measured]),
        dense=Timing(**_timing(workload, rounds, ()), memory=memory.get(())),
        pruned=tuple(pruned),
        **about,
    )


def _timing(workload: Workload, rounds: Sequence[Round], removals: SizeKey) -> dict[str, Any]:
    return latencies(workload, [done[removals] for done in rounds if removals in done])


def _worst(warmups: Sequence[WarmupRecord]) -> WarmupRecord:
    deviations = [warmup.deviation for warmup in warmups if warmup.deviation is not None]
    stable = [warmup.stable for warmup in warmups if warmup.stable is not None]
    return WarmupRecord(
        runs=max(warmup.runs for warmup in warmups),
        deviation=max(deviations, default=None),
        stable=all(stable) if stable else None,
    )


def latencies(workload: Workload, runs: Sequence[TimedRun]) -> dict[str, Any]:
    """Return the fields of a `Timing` that follow from its runs."""
    e2els = [run.seconds for run in runs]
    ttfts = []
    itls = []
    for run in runs:
        ttfts.append(run.token_seconds[0] if run.token_seconds else run.seconds)
        if len(run.token_seconds) > 1:
            itls.append(tuple(np.diff(run.token_seconds).tolist()))
    tokens = workload.batch_size * (workload.new_tokens or workload.prompt_length) * len(runs)
    return {
        "tokens_per_second": tokens / sum(e2els),
        "ttft_ms": _distribution(ttfts),
        "tpot_ms": _distribution([statistics.fmean(steps) for steps in itls]),
        "itl_ms": _distribution(list(chain.from_iterable(itls))),
        "e2el_ms": _distribution(e2els),
        "ttfts": tuple(ttfts),
        "itls": tuple(itls),
        "e2els": tuple(e2els),
        "outliers": count_outliers(e2els),
    }


def _distribution(seconds: Sequence[float]) -> Distribution | None:
    if not seconds:
        return None
    median, p90, p99 = np.percentile(seconds, (50, 90, 99)).tolist()
    mean = statistics.fmean(seconds)
    return Distribution(mean=1000 * mean, median=1000 * median, p90=1000 * p90, p99=1000 * p99)
