"""From measured runs to the record of a workload, whatever engine ran them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sleb_cli.engine.speed.bound import speedup_bound
from sleb_cli.engine.speed.in_turn import Measured, Sample, joined
from sleb_cli.engine.speed.statistics import latency_statistics, speedup_interval
from sleb_cli.engine.speed.work import Work
from sleb_cli.results import (
    EnergyRecord,
    MemoryRecord,
    PrunedTiming,
    Timing,
    WarmupRecord,
    Workload,
    WorkloadResult,
    WorkRecord,
)

DENSE = "dense"
"""The dense model's name among those that are timed together."""

Removals = tuple[int, ...]


@dataclass(frozen=True)
class Compared:
    """Runs of the dense model and, in the same rounds, of `sizes`: the removals of each by its name."""

    measured: Measured
    sizes: Mapping[str, Removals]


@dataclass(frozen=True)
class Facts:
    """What else is known of a workload: the memory it takes without these removals, its work, and what ran it."""

    memory: Mapping[Removals, MemoryRecord | None] = field(default_factory=dict)
    work: Work | None = None
    engine_version: str | None = None
    attention: str | None = None


def workload_result(workload: Workload, compared: Sequence[Compared], facts: Facts) -> WorkloadResult:
    """Return the record of a workload. A speedup is that over the dense model's runs in the same rounds."""
    dense = joined([one.measured.samples[DENSE] for one in compared])
    return WorkloadResult(
        workload=workload,
        engine_version=facts.engine_version,
        attention=facts.attention,
        warmup=_warmup([one.measured.warmup for one in compared]),
        dense=Timing(**_timing(workload, dense, (), facts)),
        pruned=tuple(
            _pruned(workload, one.measured.samples, name, removals, facts)
            for one in compared
            for name, removals in one.sizes.items()
        ),
    )


def _pruned(
    workload: Workload, samples: Mapping[str, Sample], name: str, removals: Removals, facts: Facts
) -> PrunedTiming:
    dense, pruned = samples[DENSE].seconds, samples[name].seconds
    return PrunedTiming(
        **_timing(workload, samples[name], removals, facts),
        removals=removals,
        speedup=statistics.median(dense) / statistics.median(pruned),
        interval=speedup_interval(dense, pruned),
        bound=speedup_bound(facts.work, removals) if facts.work else None,
    )


def _timing(workload: Workload, sample: Sample, removals: Removals, facts: Facts) -> dict[str, Any]:
    return {
        **latency_statistics(workload, sample.runs),
        "memory": facts.memory.get(removals),
        "energy": _energy(workload, sample),
        "work": _work(facts.work, removals) if facts.work else None,
    }


def _energy(workload: Workload, sample: Sample) -> EnergyRecord | None:
    if sample.energy_source is None:
        return None
    mean = sum(sample.joules) / len(sample.joules)
    tokens = workload.batch_size * (workload.new_tokens or workload.prompt_length)
    return EnergyRecord(
        source=sample.energy_source,
        joules=sample.joules,
        joules_per_iteration=mean,
        joules_per_token=mean / tokens,
    )


def _work(work: Work, removals: Removals) -> WorkRecord:
    prefill, decode = work.prefill, work.decode
    return WorkRecord(
        prefill_flops=prefill.flops.without(removals),
        prefill_bytes=prefill.bytes.without(removals),
        decode_flops=decode.flops.without(removals) if decode else 0.0,
        decode_bytes=decode.bytes.without(removals) if decode else 0.0,
    )


def _warmup(records: Sequence[WarmupRecord]) -> WarmupRecord:
    """Return the most runs and the worst deviation of several comparisons."""
    deviations = [record.deviation for record in records if record.deviation is not None]
    stable = [record.stable for record in records if record.stable is not None]
    return WarmupRecord(
        runs=max(record.runs for record in records),
        deviation=max(deviations, default=None),
        stable=all(stable) if stable else None,
    )
