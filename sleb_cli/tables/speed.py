"""What a removal gains, in speed, latency, memory and size."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from sleb_cli.requests import TRANSFORMERS
from sleb_cli.results import BenchResult, PrunedTiming, Timing, Workload, WorkloadResult
from sleb_cli.tables.table import Column, Scored, Table, between, by_model, model_name, tabulate
from sleb_cli.units import format_bytes, format_count, format_milliseconds

_format_times = "{:.2f}x".format


def benchmark_tables(result: BenchResult) -> list[Table]:
    """List the size, speed, latency and memory of each model."""
    timed = by_model(result.workloads, map(workload_name, result.workloads))
    return [sizes(result), speeds(timed, result), latencies(timed), memory(timed)]


def workload_name(result: WorkloadResult) -> str:
    """Name a workload: prompt 1x512, or generation 4x64+32, llama.cpp, compiled."""
    workload = result.workload
    name = workload.label
    if workload.engine != TRANSFORMERS:
        name += f", {workload.engine}"
    if workload.compiled:
        name += ", compiled"
    return name


def texts_per_second(workload: Workload, timing: Timing) -> float | None:
    """Return the texts that a model reads in a second, by the median; None for other workloads."""
    if workload.name != "texts":
        return None
    return 1000 * workload.batch_size / timing.e2el_ms.median


def tokens_per_second(workload: Workload, timing: Timing) -> float:
    """Return the new tokens in a second, or those of prompts without any, by the median."""
    tokens = workload.batch_size * (workload.new_tokens or workload.prompt_length)
    return 1000 * tokens / timing.e2el_ms.median


def speeds(timed: Iterable[Scored], result: BenchResult) -> Table:
    """List the speedup of each workload."""
    order = result.order
    reads = result.model.output is not None
    workloads = {workload_name(measured): measured.workload for measured in result.workloads}
    columns: list[Column] = [
        ("workload", str),
        ("model", str),
        ("median", format_milliseconds),
        ("tokens/s", "{:,.1f}".format),
        ("texts/s", "{:,.1f}".format),
        ("speedup", _format_times),
        ("95%", partial(between, form="{:.2f}".format)),
        ("blocks", _format_times),
    ]
    rows = []
    for workload, model, timing in timed:
        speedup = interval = ratio = None
        if isinstance(timing, PrunedTiming):
            speedup = timing.speedup
            interval = timing.interval
            ratio = order.block_ratio(len(timing.removals))
        median = timing.e2el_ms.median
        rates = [tokens_per_second(workloads[workload], timing), None]
        if reads:
            rates = [None, texts_per_second(workloads[workload], timing)]
        rows.append([workload, model, median, *rates, speedup, interval, ratio])
    note = "Workloads: batch x prompt tokens + new tokens."
    if reads:
        note = "Workloads: batch x tokens of a text."
    note += " 95%: interval of the speedup."
    if order.whole_blocks:
        note += " blocks: dense over remaining blocks, about the speedup of a large model."
    return tabulate("Speed", columns, rows, [note])


def latencies(timed: Iterable[Scored]) -> Table:
    """List the latencies of each workload that generates more than one token."""
    columns: list[Column] = [
        ("workload", str),
        ("model", str),
        ("TTFT", format_milliseconds),
        ("99%", format_milliseconds),
        ("ITL", format_milliseconds),
        ("99%", format_milliseconds),
        ("TPOT", format_milliseconds),
    ]
    rows: list[list[Any]] = []
    for workload, model, timing in timed:
        first = timing.ttft_ms
        between_tokens = timing.itl_ms
        per_token = timing.tpot_ms
        if between_tokens and per_token:
            row = [workload, model, first.median, first.p99]
            rows.append([*row, between_tokens.median, between_tokens.p99, per_token.mean])
    notes = [
        "TTFT: time to first token; ITL: between tokens; TPOT: mean time per token after the first."
    ]
    return tabulate("Latency", columns, rows, notes)


def memory(timed: Iterable[Scored]) -> Table:
    """List the peak memory of each workload, where it was measured."""
    columns: list[Column] = [
        ("workload", str),
        ("model", str),
        ("peak", format_bytes),
        ("weights", format_bytes),
        ("KV cache", format_bytes),
        ("rest", format_bytes),
    ]
    rows = []
    for workload, model, timing in timed:
        peak = timing.memory
        if peak:
            parts = [peak.weights_bytes, peak.kv_cache_bytes or None, peak.rest_bytes]
            rows.append([workload, model, peak.peak_bytes, *parts])
    notes = ["rest: activations and, on a CPU, the program itself."]
    return tabulate("Peak memory", columns, rows, notes)


def sizes(result: BenchResult) -> Table:
    """List the parameters and bytes of each model."""
    columns: list[Column] = [
        ("model", str),
        ("blocks", "{}".format),
        ("parameters", format_count),
        ("weights", format_bytes),
        ("loads in", _format_seconds),
    ]
    rows = []
    for size in (result.dense, *result.pruned):
        name = model_name(size.removals, alone=not result.pruned)
        blocks = size.blocks if result.order.whole_blocks else None
        rows.append([name, blocks, size.parameters, size.weights_bytes, size.load_seconds])
    return tabulate("Sizes", columns, rows)


def _format_seconds(seconds: float) -> str:
    return format_milliseconds(1000 * seconds)
