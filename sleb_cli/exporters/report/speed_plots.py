"""Pictures of what a removal gains: speed, the raw latencies, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.report.drawing import (
    DENSE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PRUNED,
    PURPLE,
    Plot,
    draw_series,
    whole_ticks,
)
from sleb_cli.results import MemoryRecord, Timing, WorkloadResult
from sleb_cli.tables import speed
from sleb_cli.tables.table import model_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_WORKLOADS = 5
_MOST_PANELS = 6
_MOST_BETWEEN = 3
_MOST_POINTS = 80
_MOST_BARS = 12


def speed_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the pictures of the benchmark."""
    results = [result for result in findings.workloads if findings.own(result.pruned)]
    if not results:
        return
    panels = _shown(findings, results, _MOST_PANELS)
    timed = findings.timed
    few, blocks = _shown(findings, results, _MOST_WORKLOADS), findings.plan.model.blocks
    yield Plot("speedup", 300, partial(_draw_speedups, few, blocks), speed.speeds(timed, blocks))
    latency = partial(_draw_panels, panels, "end to end, ms", lambda timing: timing.e2els)
    yield Plot("latency", _height(panels), latency)
    if writing := _shown(findings, [result for result in results if result.dense.itls], _MOST_PANELS):
        between = partial(_draw_panels, writing, "between tokens, ms", lambda timing: [*chain(*timing.itls)])
        yield Plot("inter-token-latency", _height(writing), between, speed.latencies(timed))
    yield from map(_memory_plot, [result for result, _ in findings.main_workloads[:1] if result.dense.memory])


def _height(panels: Sequence[WorkloadResult]) -> float:
    return 36 + 215 * -(-len(panels) // 3)


def _memory_plot(result: WorkloadResult) -> Plot:
    models = [(model_name(timing.removals), timing.memory) for timing in result.pruned]
    # Few enough that each bar keeps its label.
    models = [*models[:-1][:: max(1, -(-len(models) // _MOST_BARS))], models[-1]]
    bars = [(name, memory) for name, memory in [("dense", result.dense.memory), *models] if memory]
    return Plot("memory", 85 + 26 * len(bars), partial(_draw_memory, bars), workload=speed.workload_name(result))


def _shown(findings: Findings, results: list[WorkloadResult], at_most: int) -> list[WorkloadResult]:
    """Return as many workloads as a picture holds, in their order, the headline's among them; the tables have all."""
    main = {id(result) for result, _ in findings.main_workloads}
    chosen = {id(result) for result in sorted(results, key=lambda result: id(result) not in main)[:at_most]}
    return [result for result in results if id(result) in chosen]


def _draw_speedups(results: list[WorkloadResult], blocks: int, figure: Figure) -> None:
    axis = figure.add_subplot()
    for number, result in enumerate(results):
        counts = [0, *(len(timing.removals) for timing in result.pruned)]
        measured = [(1.0, None), *((timing.speedup, timing.interval) for timing in result.pruned)]
        draw_series(axis, number, speed.workload_name(result), counts, measured, 1)
    sizes = range(max(len(timing.removals) for result in results for timing in result.pruned) + 1)
    ratios = [blocks / (blocks - size) for size in sizes]
    axis.plot(sizes, ratios, "--", color=MUTED, linewidth=1, label="ratio of the blocks")
    axis.set(xlabel="blocks removed", ylabel="times as fast")
    whole_ticks(axis, sizes)
    axis.grid()
    figure.legend(loc="outside upper left", ncols=3)


def _draw_panels(
    results: list[WorkloadResult], label: str, seconds: Callable[[Timing], Sequence[float]], figure: Figure
) -> None:
    """Draw a panel for each workload: the share of runs or tokens that took at most a time."""
    columns = min(3, len(results))
    axes = list(figure.subplots(-(-len(results) // columns), columns, squeeze=False).flat)
    for axis in axes[len(results) :]:
        axis.remove()
    for axis, result in zip(axes, results, strict=False):
        *others, own = result.pruned
        count = min(len(others), _MOST_BETWEEN)
        for number in range(count):
            entry = others[(2 * number + 1) * len(others) // (2 * count)]
            name = "" if number else "sizes between"
            axis.ecdf(_thinned(seconds(entry)), color=MUTED, linewidth=0.8, alpha=0.7, label=name)
        axis.ecdf(_thinned(seconds(result.dense)), color=DENSE, label="dense")
        axis.ecdf(_thinned(seconds(own)), color=PRUNED, linestyle="--", label=f"{len(own.removals)} removed")
        axis.set(xlabel=label, ylim=(0, 1.02), yticks=[0, 0.5, 0.9, 1], yticklabels=["0", "50%", "90%", "100%"])
        axis.set_title(speed.workload_name(result), fontsize=10.5)
        axis.locator_params(axis="x", nbins=4)
        axis.grid()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _thinned(seconds: Sequence[float]) -> list[float]:
    """Return milliseconds; of very many, evenly spread ones, which draw the same curve in fewer bytes."""
    ordered = sorted(1000 * value for value in seconds)
    step = max(1, len(ordered) // _MOST_POINTS)
    return [*ordered[::step], ordered[-1]] if step > 1 else ordered


def _draw_memory(bars: list[tuple[str, MemoryRecord]], figure: Figure) -> None:
    axis, rows = figure.add_subplot(), range(len(bars))
    unit, scale = ("GB", 1e9) if max(memory.peak_bytes for _, memory in bars) >= 2e9 else ("MB", 1e6)
    left = [0.0 for _ in bars]
    for label, colour, hatch, sizes in (
        ("weights", GREEN, "", [memory.weights_bytes for _, memory in bars]),
        ("KV cache", PURPLE, "////", [memory.kv_cache_bytes for _, memory in bars]),
        ("the rest", ORANGE, "\\\\\\\\", [memory.rest_bytes for _, memory in bars]),
    ):
        values = [size / scale for size in sizes]
        axis.barh(rows, values, 0.66, left=left, color=colour, hatch=hatch, edgecolor=INK, linewidth=0, label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axis.set_yticks(rows, [name for name, _ in bars])
    axis.set(xlabel=f"peak memory, {unit}", ylim=(len(bars) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=3)
