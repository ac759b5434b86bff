"""Run models in turn and time them, whatever engine runs them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sleb_cli.engine.speed.energy import Meter
from sleb_cli.engine.speed.statistics import relative_deviation
from sleb_cli.events import Advance, Notice, Notify, task
from sleb_cli.results import EnergySource, WarmupRecord, Workload
from sleb_plugins.engine import TimedRun

Run = Callable[[Sequence[Sequence[int]], int], TimedRun]
"""Process the prompts together, and generate so many new tokens for each."""

WARMUP_LIMIT = 10
"""Most untimed runs of each model, unless their number is asked for."""

STABLE_DEVIATION = 0.02
STABLE_RUNS = 3
"""Times are stable once the relative standard deviation of the last three is below 2 %."""


@dataclass(frozen=True)
class Sample:
    """The timed runs of one model, round by round, and the energy of each, if there is a meter."""

    runs: tuple[TimedRun, ...]
    energy_source: EnergySource | None = None
    joules: tuple[float, ...] = ()

    @property
    def seconds(self) -> list[float]:
        """How long each run took."""
        return [run.seconds for run in self.runs]


def joined(samples: Sequence[Sample]) -> Sample:
    """Return several samples of one model as one."""
    return Sample(
        tuple(run for sample in samples for run in sample.runs),
        samples[0].energy_source,
        tuple(joules for sample in samples for joules in sample.joules),
    )


@dataclass(frozen=True)
class Measured:
    """The sample of each model by its name, from the same rounds."""

    warmup: WarmupRecord
    samples: dict[str, Sample]


def measure(
    models: Mapping[str, Run], workload: Workload, vocabulary: int, notify: Notify, meter: Meter | None = None
) -> Measured:
    """Time the models in turn, after runs to warm up until times are stable.

    Every other round goes through them in reverse (ABBA), so that a machine that gets slower affects all alike. The
    prompts of a round are the same for all models, and no other round's, so none is answered from a cache.
    """
    limit = WARMUP_LIMIT if workload.warmup is None else workload.warmup
    total = (limit + workload.iterations) * len(models)
    with task(notify, f"Timing {workload.label}", total, "runs") as advance, _without_garbage_collection():
        rounds = _Rounds(models, workload, vocabulary, meter, advance)
        warmup = rounds.warm_up(limit)
        advance(done=(limit - warmup.runs) * len(models))
        timed = [rounds.run() for _ in range(workload.iterations)]
    if warmup.stable is False:
        notify(_unstable(workload, warmup))
    return Measured(warmup, {name: _sample([done[name] for done in timed], meter) for name in models})


def _sample(done: Sequence[_Done], meter: Meter | None) -> Sample:
    runs = tuple(one.run for one in done)
    return Sample(runs, meter.source, tuple(one.joules for one in done)) if meter else Sample(runs)


def draw_prompts(workload: Workload, vocabulary: int, number: int) -> list[list[int]]:
    """Return the prompts of a round: random tokens."""
    generator = np.random.default_rng([workload.seed, number])
    prompts: list[list[int]] = generator.integers(
        vocabulary, size=(workload.batch_size, workload.prompt_length)
    ).tolist()
    return prompts


@dataclass(frozen=True)
class _Done:
    """One run, and the energy it took; 0 if that is not measured."""

    run: TimedRun
    joules: float


class _Rounds:
    """Rounds of runs, one of each model."""

    def __init__(
        self, models: Mapping[str, Run], workload: Workload, vocabulary: int, meter: Meter | None, advance: Advance
    ) -> None:
        self._models, self._workload, self._vocabulary = models, workload, vocabulary
        self._meter, self._advance = meter, advance
        self._done = 0

    def warm_up(self, limit: int) -> WarmupRecord:
        """Run until times are stable, at most `limit` rounds; if the user chose their number, exactly so many."""
        asked = self._workload.warmup is not None
        seconds: dict[str, list[float]] = {name: [] for name in self._models}
        deviation: float | None = None
        while self._done < limit and (asked or deviation is None or deviation >= STABLE_DEVIATION):
            for name, done in self.run().items():
                seconds[name].append(done.run.seconds)
            if self._done >= STABLE_RUNS:
                deviation = max(relative_deviation(times[-STABLE_RUNS:]) for times in seconds.values())
        stable = None if asked or deviation is None else deviation < STABLE_DEVIATION
        return WarmupRecord(runs=self._done, deviation=deviation, stable=stable)

    def run(self) -> dict[str, _Done]:
        """Run each model once on the next prompts."""
        prompts = draw_prompts(self._workload, self._vocabulary, self._done)
        names = list(self._models)
        done = {name: self._run(name, prompts) for name in (names[::-1] if self._done % 2 else names)}
        self._done += 1
        return done

    def _run(self, name: str, prompts: list[list[int]]) -> _Done:
        if self._workload.cooldown:
            time.sleep(self._workload.cooldown)
        before = self._meter.joules() if self._meter else 0.0
        run = self._models[name](prompts, self._workload.new_tokens)
        joules = self._meter.joules() - before if self._meter else 0.0
        self._advance(note=f"{name}: {run.seconds:.3f} s")
        return _Done(run, joules)


def _unstable(workload: Workload, warmup: WarmupRecord) -> Notice:
    return Notice(
        f"{workload.label}: times still varied by {warmup.deviation:.1%} after {warmup.runs} runs to warm up; "
        "something else may be using this machine."
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running while something is timed."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
