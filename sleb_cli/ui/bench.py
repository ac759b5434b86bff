"""Show the result of `sleb bench`: a row for each model, the dense one first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sleb_cli.ui.console import stdout
from sleb_cli.ui.llama_bench import markdown_lines
from sleb_cli.ui.names import short_name
from sleb_cli.ui.tables import new_table, print_line, print_title, print_written, setting
from sleb_cli.units import format_bytes, format_count

if TYPE_CHECKING:
    from sleb_cli.results import BenchResult, Interval, ModelSize, PrunedTiming, Timing, WorkloadResult

NONE = "-"


def show_benchmark(result: BenchResult, output: Path | None) -> None:
    """Show the size, speed, memory and energy of each model."""
    console = stdout()
    print_title(console, short_name(result.model.id))
    for size in result.pruned:
        print_line(f"{_name(size.removals)}: without blocks {', '.join(map(str, size.removals))}")
    _show_sizes(console, result)
    for measured in result.workloads:
        _show_speed(console, result, measured)
    _show_memory(console, result)
    _show_energy(console, result)
    _show_setting(result)
    print_written(output)


def show_markdown(result: BenchResult) -> None:
    """Print the result in the shape of llama-bench."""
    for line in markdown_lines(result):
        print_line(line)


def _name(removals: tuple[int, ...]) -> str:
    """Return how a row is called: dense, or -6 blocks."""
    return f"-{len(removals)}" if removals else "dense"


def _models(measured: WorkloadResult) -> Iterator[tuple[str, Timing]]:
    yield _name(()), measured.dense
    for timing in measured.pruned:
        yield _name(timing.removals), timing


def _show_sizes(console: Console, result: BenchResult) -> None:
    table = new_table("", "blocks", "parameters", "weights", "loads in")
    for size in (result.dense, *result.pruned):
        loading = NONE if size.load_seconds is None else duration(size.load_seconds)
        counts = (str(size.blocks), format_count(size.parameters), format_bytes(size.weights_bytes))
        table.add_row(_name(size.removals), *counts, loading)
    console.print(table)


def _show_speed(console: Console, result: BenchResult, measured: WorkloadResult) -> None:
    """Show a workload: the speedups beside what allows them, then how tokens arrive."""
    workload = measured.workload
    options = [*(["compiled"] if workload.compiled else []), *(["static cache"] if workload.static_cache else [])]
    engine = [] if workload.engine == "transformers" else [workload.engine]
    print_title(console, f"\n{workload.name}: {', '.join([str(workload), *options, *engine])}")
    table = new_table(
        "", "median", "tokens/s", "speedup", "95 %", "bound", "blocks", "params", optional=("params", "blocks")
    )
    sizes = {size.removals: size for size in result.pruned}
    table.add_row(_name(()), *_speed(measured.dense), *[""] * 5)
    for timing in measured.pruned:
        allowed = NONE if timing.bound is None else f"{timing.bound:.2f}x"
        ratios = _ratios(result.dense, sizes[timing.removals])
        table.add_row(_name(timing.removals), *_speed(timing), *_speedup(timing), allowed, *ratios)
    console.print(table)
    if workload.new_tokens > 1:
        _show_latency(console, measured)
    many = [f"{timing.outliers} of {len(timing.e2els)} {name}" for name, timing in _models(measured) if timing.outliers]
    if many:
        print_line(f"outliers, kept: {', '.join(many)}")


def _speed(timing: Timing) -> tuple[str, str]:
    throughput = timing.output_throughput or timing.total_token_throughput
    return duration(timing.median_e2el_ms / 1000), f"{throughput:,.1f}"


def _speedup(timing: PrunedTiming) -> tuple[str, str]:
    """Return the speedup and its interval, coloured if it is one, or the contrary."""
    interval = timing.interval
    text = f"{timing.speedup:.2f}x"
    if interval is None:
        return text, NONE
    colour = "bold green" if interval.low > 1 else "bold red" if interval.high < 1 else "bold"
    return f"[{colour}]{text}[/]", _between(interval)


def _between(interval: Interval) -> str:
    return f"{interval.low:.2f}-{interval.high:.2f}"


def _ratios(dense: ModelSize, pruned: ModelSize) -> tuple[str, str]:
    return f"{dense.blocks / pruned.blocks:.2f}x", f"{dense.parameters / pruned.parameters:.2f}x"


def _show_latency(console: Console, measured: WorkloadResult) -> None:
    columns = ("", "first\ntoken", "first\np99", "between\ntokens", "between\np90", "between\np99")
    table = new_table(*columns, optional=("first\np99", "between\np99"))
    for name, timing in _models(measured):
        values = (
            timing.median_ttft_ms, timing.p99_ttft_ms, timing.median_itl_ms, timing.p90_itl_ms, timing.p99_itl_ms,
        )  # fmt: skip
        table.add_row(name, *(NONE if value is None else duration(value / 1000) for value in values))
    console.print(table)


def _show_memory(console: Console, result: BenchResult) -> None:
    table = new_table("\npeak memory", "", "\npeak", "\nweights", "KV\ncache", "\nrest")
    for measured in result.workloads:
        table.add_section()
        label = measured.workload.label
        for name, timing in _models(measured):
            memory = timing.memory
            if memory is not None:
                parts = (memory.peak_bytes, memory.weights_bytes, memory.kv_cache_bytes, memory.rest_bytes)
                table.add_row(label, name, *map(format_bytes, parts))
                label = ""
    if table.row_count:
        print_title(console, "")
        console.print(table)


def _show_energy(console: Console, result: BenchResult) -> None:
    table = new_table("energy", "", "per iteration", "per token", "by")
    for measured in result.workloads:
        table.add_section()
        label = measured.workload.label
        for name, timing in _models(measured):
            energy = timing.energy
            if energy is not None:
                spent = (energy.joules_per_iteration, energy.joules_per_token)
                table.add_row(label, name, *(f"{joules:.3g} J" for joules in spent), energy.source)
                label = ""
    if table.row_count:
        console.print(table)


def _show_setting(result: BenchResult) -> None:
    governor = f", governor {result.governor}" if result.governor else ""
    print_line(f"{setting(result)}, {result.processor}{governor}")
    attention = dict.fromkeys(f"{found.attention} attention" for found in result.workloads if found.attention)
    if attention:
        print_line(", ".join([f"torch {result.torch}", f"transformers {result.transformers}", *attention]))
    others = dict.fromkeys(found.engine_version for found in result.workloads if not found.attention)
    for version in filter(None, others):
        print_line(version)
    for measured in result.workloads:
        runs, warmup = measured.workload.iterations, measured.warmup
        stable = ", which was not enough for stable times" if warmup.stable is False else ""
        print_line(f"{measured.workload.label}: {runs} runs of each after {warmup.runs} to warm up{stable}")
    if result.pruned:
        print_line("bound: what the operations and bytes of the two models allow")


def duration(seconds: float) -> str:
    """Return a duration in seconds or milliseconds."""
    if seconds >= 0.1:
        return f"{seconds:.3f} s" if seconds < 100 else f"{seconds:.1f} s"
    return f"{seconds * 1000:.2f} ms"
