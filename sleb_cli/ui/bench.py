"""Show the results of `sleb bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.tables.table import by_model, to_markdown
from sleb_cli.ui.names import short_name
from sleb_cli.ui.tables import print_line, print_title, print_to_copy, print_written, show_table
from sleb_cli.units import three_digits

if TYPE_CHECKING:
    from sleb_cli.results import BenchResult, EstimateResult


def show_benchmark(result: BenchResult, output: Path | None) -> None:
    """Show the size, speed, memory and energy of each model."""
    from sleb_cli.tables import settings, speed  # pydantic, so here

    print_title(short_name(result.model.id))
    for size in result.pruned:
        print_line(f"-{len(size.removals)}: without blocks {', '.join(map(str, size.removals))}")
    timed = by_model(result.workloads, map(speed.workload_name, result.workloads))
    tables = [speed.sizes(result), speed.speeds(timed, result.model.blocks), speed.latencies(timed)]
    for table in (*tables, speed.memory(timed), settings.result_settings(result)):
        show_table(table)
    print_written(output)


def show_markdown(result: BenchResult) -> None:
    """Print the result as llama-bench does."""
    from sleb_cli.tables.speed import llama_bench

    for line in to_markdown(llama_bench(result)):
        print_to_copy(line)


def show_estimate(result: EstimateResult, output: Path | None) -> None:
    """Show the predicted sizes and speeds, and what they are predicted from."""
    from sleb_cli.tables import speed

    print_title(short_name(result.model.id))
    show_table(speed.estimated_sizes(result))
    show_table(speed.estimated_speeds(result))
    flops, read = result.flops_per_second, result.bytes_per_second
    if result.device == "described":
        print_line(f"predicted for {result.dtype} on a device of {flops / 1e12:.4g} TFLOP/s and {read / 1e12:.4g} TB/s")
    else:
        print_line(f"predicted for {result.model.computed_in(result.dtype)} on {result.device}, {result.processor}")
        print_line(f"measured here: {three_digits(flops / 1e9)} GFLOP/s and {three_digits(read / 1e9)} GB/s")
    if any(size.removals is None for size in result.pruned):
        print_line("Assumes that the removed blocks are of average size.")
    print_written(output)
