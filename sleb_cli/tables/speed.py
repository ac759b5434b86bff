"""What does a removal gain, in speed, latency, memory and size?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from sleb_cli.order import Order
from sleb_cli.requests import TRANSFORMERS
from sleb_cli.results import BenchResult, PrunedTiming, WorkloadResult
from sleb_cli.tables.table import Columns, Scored, Table, between, model_name, tabulate
from sleb_cli.units import format_bytes, format_count, format_milliseconds

_TIMES, _COUNT = "{:.2f}x".format, "{}".format


def workload_name(result: WorkloadResult) -> str:
    """Name a workload: prompt 1x512, or generation 4x64+32, llama.cpp, compiled."""
    workload = result.workload
    engine = [] if workload.engine == TRANSFORMERS else [workload.engine]
    return ", ".join([workload.label, *engine, *(["compiled"] if workload.compiled else [])])


def speeds(timed: Iterable[Scored], order: Order) -> Table:
    """List the speedup of each workload, without the parts of `order`."""
    columns: Columns = [
        ("workload", str), ("model", str), ("median", format_milliseconds), ("tokens/s", "{:,.1f}".format),
        ("speedup", _TIMES), ("95%", partial(between, form="{:.2f}".format)), ("blocks", _TIMES),
    ]  # fmt: skip
    rows = []
    for workload, model, timing in timed:
        speedups: list[Any] = [None] * 3
        if isinstance(timing, PrunedTiming):
            speedups = [
                timing.speedup,
                timing.interval,
                order.block_ratio(len(timing.removals)),
            ]
        rows.append([workload, model, timing.e2el_ms.median, timing.tokens_per_second, *speedups])
    notes = ["Workloads: batch x prompt tokens + new tokens."]
    if order.whole_blocks:
        notes[0] += " blocks: dense over remaining blocks, about the speedup of a large model."
    return tabulate("Speed", columns, rows, notes)


def latencies(timed: Iterable[Scored]) -> Table:
    """List the latencies of each workload that generates more than one token."""
    names = ("TTFT", "99%", "ITL", "99%", "TPOT")
    rows = [
        [workload, model, ttft.median, ttft.p99, itl.median, itl.p99, tpot.mean]
        for workload, model, timing in timed
        for ttft, itl, tpot in [(timing.ttft_ms, timing.itl_ms, timing.tpot_ms)]
        if itl and tpot
    ]
    columns: Columns = [
        ("workload", str),
        ("model", str),
        *((name, format_milliseconds) for name in names),
    ]
    notes = [
        "TTFT: time to first token; ITL: between tokens; TPOT: mean time per token after the first."
    ]
    return tabulate("Latency", columns, rows, notes)


def memory(timed: Iterable[Scored]) -> Table:
    """List the peak memory of each workload, where it was measured."""
    columns: Columns = [
        ("workload", str), ("model", str), ("peak", format_bytes), ("weights", format_bytes),
        ("KV cache", format_bytes), ("rest", format_bytes),
    ]  # fmt: skip
    rows = [
        [workload, model, peak.peak_bytes, peak.weights_bytes, peak.kv_cache_bytes, peak.rest_bytes]
        for workload, model, timing in timed
        if (peak := timing.memory)
    ]
    notes = ["rest: activations and, on a CPU, the program itself."]
    return tabulate("Peak memory", columns, rows, notes)


def sizes(result: BenchResult) -> Table:
    """List the parameters and bytes of each model."""
    columns: Columns = [
        ("model", str), ("blocks", _COUNT), ("parameters", format_count), ("weights", format_bytes),
        ("loads in", lambda seconds: format_milliseconds(1000 * seconds)),
    ]  # fmt: skip
    rows = [
        [
            name,
            size.blocks if result.order.whole_blocks else None,
            size.parameters,
            size.weights_bytes,
            size.load_seconds,
        ]
        for size in (result.dense, *result.pruned)
        for name in [model_name(size.removals, alone=not result.pruned)]
    ]
    return tabulate("Sizes", columns, rows)
