"""What a removal gains: sizes, times, memory and energy, measured or estimated."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from sleb_cli.requests import TRANSFORMERS
from sleb_cli.results import BenchResult, EstimateResult, PrunedTiming, Timing, WorkloadResult
from sleb_cli.tables.table import Columns, Scored, Table, between, model_name, tabulate
from sleb_cli.units import format_bytes, format_count, format_milliseconds, three_digits

_TIMES, _COUNT = "{:.2f}x".format, "{}".format


def workload_name(result: WorkloadResult) -> str:
    """Return what is run: prompt 1x512, or generation 4x64+32, llama.cpp, compiled."""
    workload = result.workload
    engine = [] if workload.engine == TRANSFORMERS else [workload.engine]
    options = {"compiled": workload.compiled, "static cache": workload.static_cache}
    return ", ".join([workload.label, *engine, *(name for name, is_set in options.items() if is_set)])


def tokens_per_second(timing: Timing) -> float:
    """Return generated tokens per second, or those of the prompt if none are generated."""
    return timing.output_throughput or timing.total_token_throughput


def speeds(timed: Iterable[Scored], blocks: int) -> Table:
    """Return the speedup of each workload, beside its bounds; `blocks` are those of the dense model."""
    columns: Columns = [
        ("workload", str), ("model", str), ("median", format_milliseconds), ("tokens/s", "{:,.1f}".format),
        ("speedup", _TIMES), ("95%", partial(between, form="{:.2f}".format)), ("bound", _TIMES), ("blocks", _TIMES),
        ("outliers", _COUNT),
    ]  # fmt: skip
    rows = []
    for _, workload, model, timing in timed:
        speedups: list[Any] = [None] * 4
        if isinstance(timing, PrunedTiming):
            speedups = [timing.speedup, timing.interval, timing.bound, blocks / (blocks - len(timing.removals))]
        row = [workload, model, timing.median_e2el_ms, tokens_per_second(timing)]
        rows.append([*row, *speedups, timing.outliers])
    notes = [
        "Workloads: batch x prompt tokens + new tokens. bound: what the operations and bytes of both models allow; "
        "blocks: the ratio of their block counts. Outliers are kept."
    ]
    return tabulate("Speed", columns, rows, notes, ["outliers", "blocks", "tokens/s"])


def latencies(timed: Iterable[Scored]) -> Table:
    """Return when tokens arrive, of what generates more than one."""
    names = ("TTFT", "90%", "99%", "ITL", "90%", "99%", "TPOT")
    values = ("median_ttft", "p90_ttft", "p99_ttft", "median_itl", "p90_itl", "p99_itl", "mean_tpot")
    rows = [
        [workload, model, *(getattr(timing, f"{value}_ms") for value in values)]
        for _, workload, model, timing in timed
        if timing.itls and timing.itls[0]
    ]
    columns: Columns = [("workload", str), ("model", str), *((name, format_milliseconds) for name in names)]
    notes = ["TTFT: time to first token; ITL: between tokens; TPOT: mean time per token after the first."]
    return tabulate("Latency", columns, rows, notes, ["TPOT", "90%", "99%"])


def memory(timed: Iterable[Scored]) -> Table:
    """Return the peak memory and the energy of each workload, where they were measured."""
    columns: Columns = [
        ("workload", str), ("model", str), ("peak", format_bytes), ("weights", format_bytes),
        ("KV cache", format_bytes), ("rest", format_bytes), ("per iteration", _joules),
        ("per token", _joules), ("by", str),
    ]  # fmt: skip
    parts = ("peak_bytes", "weights_bytes", "kv_cache_bytes", "rest_bytes")
    spent = ("joules_per_iteration", "joules_per_token", "source")
    rows = []
    for _, workload, model, timing in timed:
        if timing.memory or timing.energy:
            bytes_and_joules = [getattr(timing.memory, part, None) for part in parts]
            bytes_and_joules += [getattr(timing.energy, part, None) for part in spent]
            rows.append([workload, model, *bytes_and_joules])
    return tabulate("Peak memory and energy", columns, rows, optional=["by", "per iteration", "rest", "KV cache"])


def _joules(value: float) -> str:
    return f"{three_digits(value)} J"


def _seconds(value: float) -> str:
    return format_milliseconds(1000 * value)


def sizes(result: BenchResult | EstimateResult) -> Table:
    """Return the parameters and bytes of each model, measured or predicted."""
    columns: Columns = [
        ("model", str), ("blocks", _COUNT), ("parameters", format_count), ("weights", format_bytes),
        ("loads in", _seconds), ("KV cache", format_bytes),
    ]  # fmt: skip
    rows = [
        [
            model_name(range(result.dense.blocks - size.blocks)), size.blocks, size.parameters, size.weights_bytes,
            getattr(size, "load_seconds", None), getattr(size, "kv_cache_bytes", None),
        ]
        for size in (result.dense, *result.pruned)
    ]  # fmt: skip
    return tabulate("Sizes", columns, rows)


def estimated_speeds(result: EstimateResult) -> Table:
    """Return the predicted time and speedup of each workload on each model."""
    columns: Columns = [
        ("workload", str), ("model", str), ("predicted", _seconds), ("speedup", _TIMES)
    ]  # fmt: skip
    rows = [
        [
            f"{workload.name} {workload.batch_size}x{workload.prompt_length}"
            + (f"+{workload.new_tokens}" if workload.new_tokens else ""),
            model_name(range(size.removed)),
            timing.seconds,
            timing.speedup if size.removed else None,
        ]
        for number, workload in enumerate(result.workloads)
        for size in (result.dense, *result.pruned)
        for timing in [size.timings[number]]
    ]
    return tabulate("Predicted speed", columns, rows, ["Workloads: batch x prompt tokens + new tokens."])


def llama_bench(result: BenchResult) -> Table:
    """Return the table that `llama-bench` of llama.cpp prints, a row for each workload on each model.

    `pp512` reads 512 tokens, and `tg32 @ d64` generates 32 after a prompt of 64, whose time does not count. llama-bench
    has no batches of sequences, so a column names them if one is not 1; tokens per second are of the whole batch.
    """
    several = any(measured.workload.batch_size > 1 for measured in result.workloads)
    columns: Columns = [
        ("model", str), ("size", _mebibytes), ("params", _parameters), ("backend", str), ("threads", _COUNT),
        ("batch", _COUNT), ("test", "{}".format), ("t/s", "{}".format),
    ]  # fmt: skip
    models = {size.removals: size for size in (result.dense, *result.pruned)}
    rows = []
    for measured in result.workloads:
        workload = measured.workload
        batch, length = workload.batch_size, workload.prompt_length
        is_generation = workload.new_tokens > 1
        test = f"tg{workload.new_tokens} @ d{length}" if is_generation else f"pp{length}"
        for removals, timing in {(): measured.dense, **{each.removals: each for each in measured.pruned}}.items():
            if is_generation:
                speeds = [batch * len(steps) / sum(steps) for steps in timing.itls]
            else:
                speeds = [batch * length / seconds for seconds in timing.ttfts]
            spread = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
            fewer = [f"-{len(removals)} blocks"] if removals else []
            name = " ".join([Path(result.model.id).name, *fewer, result.dtype])
            sizes = [models[removals].weights_bytes, models[removals].parameters]
            where = [result.device.upper(), result.threads, batch if several else None]
            rows.append([name, *sizes, *where, test, f"{statistics.mean(speeds):.2f} ± {spread:.2f}"])
    return tabulate("", columns, rows)


def _mebibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
