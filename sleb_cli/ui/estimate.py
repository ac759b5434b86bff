"""Show the result of `sleb bench --estimate`: a row for each size, the dense model first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sleb_cli.ui.bench import duration
from sleb_cli.ui.console import stdout
from sleb_cli.ui.names import short_name
from sleb_cli.ui.tables import new_table, print_line, print_title, print_written, setting
from sleb_cli.units import format_bytes, format_count

if TYPE_CHECKING:
    from sleb_cli.results import EstimatedSize, EstimatedWorkload, EstimateResult

BESIDE_SIZES = 2
"""How many speedups fit into 80 columns beside the sizes; a sweep may have more, in a table of their own."""


def show_estimate(result: EstimateResult, output: Path | None) -> None:
    """Show the sizes and predicted speedups, and what they are predicted from."""
    console, sizes = stdout(), (result.dense, *result.pruned)
    print_title(console, short_name(result.model.id))
    together = range(len(result.workloads)) if len(result.workloads) <= BESIDE_SIZES else ()
    table = new_table("", "blocks", "parameters", "weights", "KV cache", *_headers(result, together))
    for size in sizes:
        table.add_row(*_size(size), *_speedups(size, together))
    console.print(table)
    if not together:
        for number, workload in enumerate(result.workloads):
            print_title(console, f"\n{_described(workload)}")
            table = new_table("", "predicted", "speedup")
            for size in sizes:
                table.add_row(_name(size), duration(size.timings[number].seconds), *_speedups(size, (number,)))
            console.print(table)
    _show_basis(result)
    print_written(output)


def _headers(result: EstimateResult, numbers: Sequence[int]) -> list[str]:
    return [result.workloads[number].name for number in numbers]


def _name(size: EstimatedSize) -> str:
    return f"-{size.removed}" if size.removed else "dense"


def _size(size: EstimatedSize) -> list[str]:
    cache = "-" if size.kv_cache_bytes is None else format_bytes(size.kv_cache_bytes)
    return [_name(size), str(size.blocks), format_count(size.parameters), format_bytes(size.weights_bytes), cache]


def _speedups(size: EstimatedSize, numbers: Sequence[int]) -> list[str]:
    if not size.removed:
        return [""] * len(numbers)
    return [f"[bold]{size.timings[number].speedup:.2f}x[/]" for number in numbers]


def _show_basis(result: EstimateResult) -> None:
    if result.device == "described":
        flops, read = f"{result.flops_per_second / 1e12:.4g} TFLOP/s", f"{result.bytes_per_second / 1e12:.4g} TB/s"
        print_line(f"predicted for {result.dtype} on a device of {flops} and {read}")
    else:
        flops, read = f"{result.flops_per_second / 1e9:,.4g} GFLOP/s", f"{result.bytes_per_second / 1e9:,.3g} GB/s"
        print_line(f"predicted for {setting(result)}, {result.processor}: {flops} and {read} measured here")
    for number, workload in enumerate(result.workloads):
        dense = duration(result.dense.timings[number].seconds)
        print_line(f"{_described(workload)}: dense {dense}")
    if any(size.removals is None for size in result.pruned):
        print_line("the removed blocks are assumed to be average")


def _described(workload: EstimatedWorkload) -> str:
    new = f", {workload.new_tokens} new tokens each" if workload.new_tokens else ""
    return f"{workload.name}, {workload.batch_size} x {workload.prompt_length} prompt tokens{new}"
