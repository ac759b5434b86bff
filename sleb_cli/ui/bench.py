"""Show the result of `sleb bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.ui.console import stdout
from sleb_cli.ui.tables import new_table, print_line, print_title, print_written, setting, subject_title
from sleb_cli.units import format_bytes, format_count

if TYPE_CHECKING:
    from sleb_cli.results import BenchResult


def show_benchmark(result: BenchResult, output: Path | None) -> None:
    """Show the speed and size of the dense and the pruned model."""
    console = stdout()
    print_title(console, subject_title(result))
    table = new_table("", "dense", *(["pruned", "dense / pruned"] if result.pruned else []))

    def row(label: str, values: Sequence[float], describe: Callable[[float], str]) -> None:
        table.add_row(label, *map(describe, values), *([f"{values[0] / values[1]:.2f}x"] if values[1:] else []))

    sizes = [measured for measured in (result.dense, result.pruned) if measured]
    row("blocks", [model.blocks for model in sizes], str)
    row("parameters", [model.parameters for model in sizes], format_count)
    row("weights", [model.weights_bytes for model in sizes], format_bytes)
    for measured in result.workloads:
        timings = [timing for timing in (measured.dense, measured.pruned) if timing]
        faster = [_speedup(measured.speedup)] if measured.speedup else []
        table.add_section()
        table.add_row(f"{measured.workload.name}, median", *(duration(t.median_seconds) for t in timings), *faster)
        table.add_row("  fastest to slowest", *(_spread(t.seconds) for t in timings))
        table.add_row("  tokens/s", *(f"{t.tokens_per_second:,.1f}" for t in timings))
        peaks = [t.peak_memory_bytes for t in timings if t.peak_memory_bytes]
        if peaks:
            row("  peak memory", peaks, format_bytes)
    console.print(table)
    print_line(f"{setting(result)}, {result.processor}")
    for measured in result.workloads:
        print_line(f"{measured.workload.name}: {measured.workload}")
    print_written(output)


def duration(seconds: float) -> str:
    """Return a duration in seconds or milliseconds."""
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1000:.2f} ms"


def _speedup(ratio: float) -> str:
    return f"[bold green]{ratio:.2f}x faster[/]" if ratio >= 1 else f"[bold red]{ratio:.2f}x, slower[/]"


def _spread(seconds: Sequence[float]) -> str:
    return f"{duration(min(seconds))} to {duration(max(seconds))}"
