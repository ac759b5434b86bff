"""What a removal gains: sizes, times, memory and energy, measured or estimated."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from sleb_cli.results import (
    BenchResult,
    EstimatedSize,
    EstimateResult,
    ModelSize,
    PrunedTiming,
    Timing,
    Workload,
    WorkloadResult,
)
from sleb_cli.tables.quality import model_name
from sleb_cli.tables.table import Table, between
from sleb_cli.units import format_bytes, format_count, format_milliseconds

Timed = tuple[str, str, Timing]
"""The names of a workload and of a model, and the times of both."""


def workload_name(workload: Workload) -> str:
    """Return what is run: prompt 1x512, or generation 4x64+32, llama.cpp, compiled."""
    engine = [] if workload.engine == "transformers" else [workload.engine]
    options = {"compiled": workload.compiled, "static cache": workload.static_cache}
    return ", ".join([workload.label, *engine, *(name for name, is_set in options.items() if is_set)])


def by_model(workloads: Iterable[WorkloadResult]) -> Iterator[Timed]:
    """Yield the times of each workload on the dense and each pruned model."""
    for result in workloads:
        name = workload_name(result.workload)
        yield name, "dense", result.dense
        yield from ((name, model_name(timing.removals), timing) for timing in result.pruned)


def tokens_per_second(timing: Timing) -> float:
    """Return generated tokens per second, or those of the prompt if none are generated."""
    return timing.output_throughput or timing.total_token_throughput


def speeds(timed: Iterable[Timed], blocks: int) -> Table:
    """Return the speedup of each workload, beside its bounds; `blocks` are those of the dense model."""
    columns = ["workload", "model", "median", "tokens/s", "speedup", "95%", "bound", "blocks", "outliers"]
    rows = []
    for workload, model, timing in timed:
        row = [workload, model, format_milliseconds(timing.median_e2el_ms), f"{tokens_per_second(timing):,.1f}"]
        speedups = ["", "", "", ""]
        if isinstance(timing, PrunedTiming):
            ratio = blocks / (blocks - len(timing.removals))
            speedups = [
                f"{timing.speedup:.2f}x", between(timing.interval, "{:.2f}".format),
                f"{timing.bound:.2f}x" if timing.bound else "", f"{ratio:.2f}x",
            ]  # fmt: skip
        rows.append([*row, *speedups, str(timing.outliers)])
    notes = [
        "Workloads: batch x prompt tokens + new tokens. bound: what the operations and bytes of both models allow; "
        "blocks: the ratio of their numbers. Outliers are kept."
    ]
    return Table("Speed", columns, rows, notes, words={"model"}, optional=["outliers", "blocks", "tokens/s"]).filled()


def latencies(timed: Iterable[Timed]) -> Table:
    """Return when tokens arrive, of what generates more than one."""
    columns = ["workload", "model", "TTFT", "90%", "99%", "ITL", "90%", "99%", "TPOT"]
    rows = [
        [
            workload,
            model,
            *(
                "" if value is None else format_milliseconds(value)
                for value in (
                    timing.median_ttft_ms, timing.p90_ttft_ms, timing.p99_ttft_ms,
                    timing.median_itl_ms, timing.p90_itl_ms, timing.p99_itl_ms, timing.mean_tpot_ms,
                )
            ),
        ]
        for workload, model, timing in timed
        if timing.itls and timing.itls[0]
    ]  # fmt: skip
    notes = ["TTFT: time to first token; ITL: between tokens; TPOT: mean time per token after the first."]
    return Table("Latency", columns, rows, notes, words={"model"}, optional=["TPOT", "90%", "99%"])


def memory(timed: Iterable[Timed]) -> Table:
    """Return the peak memory and the energy of each workload, where they were measured."""
    columns = ["workload", "model", "peak", "weights", "KV cache", "rest", "per iteration", "per token", "by"]
    rows = []
    for workload, model, timing in timed:
        parts, energy = timing.memory, timing.energy
        if parts or energy:
            sizes = (parts.peak_bytes, parts.weights_bytes, parts.kv_cache_bytes, parts.rest_bytes) if parts else ()
            row = [workload, model, *(map(format_bytes, sizes) if sizes else [""] * 4)]
            joules = (energy.joules_per_iteration, energy.joules_per_token) if energy else ()
            row += [*(f"{spent:.3g} J" for spent in joules), energy.source] if energy else [""] * 3
            rows.append(row)
    optional = ["by", "per iteration", "rest", "KV cache"]
    return Table("Peak memory and energy", columns, rows, words={"model", "by"}, optional=optional).filled()


def sizes(result: BenchResult) -> Table:
    """Return the parameters and bytes of each model."""
    rows = [
        [*_size(size), "" if size.load_seconds is None else format_milliseconds(1000 * size.load_seconds)]
        for size in (result.dense, *result.pruned)
    ]
    return Table("Sizes", ["model", "blocks", "parameters", "weights", "loads in"], rows).filled()


def _size(size: ModelSize | EstimatedSize) -> list[str]:
    gone = size.removed if isinstance(size, EstimatedSize) else len(size.removals)
    name = f"-{gone}" if gone else "dense"
    return [name, str(size.blocks), format_count(size.parameters), format_bytes(size.weights_bytes)]


def estimated_sizes(result: EstimateResult) -> Table:
    """Return the predicted parameters and bytes of each model."""
    rows = [
        [*_size(size), "" if size.kv_cache_bytes is None else format_bytes(size.kv_cache_bytes)]
        for size in (result.dense, *result.pruned)
    ]
    return Table("Sizes", ["model", "blocks", "parameters", "weights", "KV cache"], rows).filled()


def estimated_speeds(result: EstimateResult) -> Table:
    """Return the predicted time and speedup of each workload on each model."""
    rows = [
        [
            f"{workload.name} {workload.batch_size}x{workload.prompt_length}"
            + (f"+{workload.new_tokens}" if workload.new_tokens else ""),
            _size(size)[0],
            format_milliseconds(1000 * size.timings[number].seconds),
            f"{size.timings[number].speedup:.2f}x" if size.removed else "",
        ]
        for number, workload in enumerate(result.workloads)
        for size in (result.dense, *result.pruned)
    ]
    notes = ["Workloads: batch x prompt tokens + new tokens."]
    return Table("Predicted speed", ["workload", "model", "predicted", "speedup"], rows, notes, words={"model"})


def llama_bench(result: BenchResult) -> Table:
    """Return the table that `llama-bench` of llama.cpp prints, a row for each workload on each model.

    `pp512` reads 512 tokens, and `tg32 @ d64` generates 32 after a prompt of 64, whose time does not count. llama-bench
    has no batches of sequences, so a column names them if one is not 1; tokens per second are of the whole batch.
    """
    columns = ["model", "size", "params", "backend", "threads", "batch", "test", "t/s"]
    batches = any(measured.workload.batch_size > 1 for measured in result.workloads)
    models = {size.removals: size for size in (result.dense, *result.pruned)}
    rows = []
    for measured in result.workloads:
        workload = measured.workload
        batch = str(workload.batch_size) if batches else ""
        is_generation = workload.new_tokens > 1
        test = f"tg{workload.new_tokens} @ d" if is_generation else "pp"
        timings = {(): measured.dense} | {timing.removals: timing for timing in measured.pruned}
        for removals, timing in timings.items():
            if is_generation:
                speeds = [workload.batch_size * len(steps) / sum(steps) for steps in timing.itls]
            else:
                speeds = [workload.batch_size * workload.prompt_length / seconds for seconds in timing.ttfts]
            spread = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
            name = " ".join(filter(None, [Path(result.model.id).name, _fewer(removals), result.dtype]))
            model = [name, *_llama_bench_sizes(models[removals])]
            where = [result.device.upper(), str(result.threads), batch]
            speed = f"{statistics.mean(speeds):.2f} ± {spread:.2f}"
            rows.append([*model, *where, f"{test}{workload.prompt_length}", speed])
    return Table("", columns, rows, words={"backend"}).filled()


def _fewer(removals: tuple[int, ...]) -> str:
    return f"-{len(removals)} blocks" if removals else ""


def _llama_bench_sizes(size: ModelSize) -> tuple[str, str]:
    gibibytes, parameters = size.weights_bytes / 2**30, size.parameters
    return (
        f"{gibibytes:.2f} GiB" if gibibytes >= 1 else f"{gibibytes * 1024:.2f} MiB",
        f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M",
    )
