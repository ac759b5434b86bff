"""A result of `sleb bench` as the Markdown table that `llama-bench` of llama.cpp prints, to paste beside its own."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sleb_cli.results import BenchResult, ModelSize, Timing, Workload


@dataclass(frozen=True)
class _Column:
    """A column: its heading, its least width, and whether its values are numbers."""

    heading: str
    width: int
    is_number: bool = True


_MODEL = (_Column("model", 30, is_number=False), _Column("size", 10), _Column("params", 10))
_BACKEND = (_Column("backend", 10, is_number=False), _Column("threads", 7))
_BATCH = _Column("batch", 7)
_TEST = (_Column("test", 15), _Column("t/s", 20))


def markdown_lines(result: BenchResult) -> list[str]:
    """Return the table, a row for each workload on each model.

    Names are llama-bench's: `pp512` reads 512 tokens, and `tg32 @ d64` generates 32 after a prompt of 64, whose time
    does not count. It has no batches of sequences, so there is a column for them, as for each of its other settings, if
    one is not 1; tokens per second are those of the whole batch.
    """
    batches = any(measured.workload.batch_size > 1 for measured in result.workloads)
    columns = (*_MODEL, *_BACKEND, *([_BATCH] if batches else []), *_TEST)
    headings = [column.heading for column in columns]
    return [_line(headings, columns), _rule(columns), *(_line(row, columns) for row in _rows(result, batches=batches))]


def _rows(result: BenchResult, *, batches: bool) -> Iterator[list[str]]:
    sizes = {size.removals: size for size in (result.dense, *result.pruned)}
    for measured in result.workloads:
        workload = measured.workload
        for removals, timing in [((), measured.dense), *((timing.removals, timing) for timing in measured.pruned)]:
            yield [
                *_model(result, sizes[removals]),
                result.device.upper(),
                str(result.threads),
                *([str(workload.batch_size)] if batches else []),
                _test(workload),
                _speed(workload, timing),
            ]


def _model(result: BenchResult, size: ModelSize) -> tuple[str, str, str]:
    fewer = f" -{len(size.removals)} blocks" if size.removals else ""
    gibibytes, parameters = size.weights_bytes / 2**30, size.parameters
    return (
        f"{Path(result.model.id).name}{fewer} {result.dtype}",
        f"{gibibytes:.2f} GiB" if gibibytes >= 1 else f"{gibibytes * 1024:.2f} MiB",
        f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M",
    )


def _test(workload: Workload) -> str:
    if workload.new_tokens > 1:
        return f"tg{workload.new_tokens} @ d{workload.prompt_length}"
    return f"pp{workload.prompt_length}"


def _speed(workload: Workload, timing: Timing) -> str:
    """Return the mean of tokens per second and its standard deviation: of the prompt, or of the steps after it."""
    if workload.new_tokens > 1:
        speeds = [workload.batch_size * len(steps) / sum(steps) for steps in timing.itls]
    else:
        speeds = [workload.batch_size * workload.prompt_length / seconds for seconds in timing.ttfts]
    spread = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
    return f"{statistics.mean(speeds):.2f} ± {spread:.2f}"


def _line(cells: Sequence[str], columns: Sequence[_Column]) -> str:
    padded = (
        f"{cell:>{column.width}}" if column.is_number else f"{cell:<{column.width}}"
        for cell, column in zip(cells, columns, strict=True)
    )
    return f"| {' | '.join(padded)} |"


def _rule(columns: Sequence[_Column]) -> str:
    return _line(["-" * (column.width - column.is_number) + ":" * column.is_number for column in columns], columns)
