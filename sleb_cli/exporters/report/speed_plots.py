"""Pictures of what a removal gains: speed beside its bound, the raw latencies, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sleb_cli.exporters.findings import Data, Findings, Removals, of_size, workload_label
from sleb_cli.exporters.headline import between, speedup
from sleb_cli.exporters.report.drawing import (
    DENSE,
    GREEN,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    PRUNED,
    PURPLE,
    SERIES,
    Canvas,
    Plot,
    whole_ticks,
)
from sleb_cli.units import format_bytes, format_milliseconds, plural

_MOST_WORKLOADS = 5
_MOST_PANELS = 6
_MOST_BETWEEN = 3
_MOST_POINTS = 80


def speed_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the pictures of the benchmark."""
    results = [result for result in findings.workloads if of_size(result, findings.removals)]
    if not results:
        return
    yield _speedups(findings, results)
    yield _latencies(
        findings, results, "e2els", "latency", "Latency of every run", "end to end, ms", lambda samples: list(samples)
    )
    timed = [result for result in results if result["dense"]["itls"]]
    if timed:
        yield _latencies(
            findings, timed, "itls", "inter-token-latency", "Latency between tokens", "between tokens, ms",
            lambda samples: [value for run in samples for value in run],
        )  # fmt: skip
    if memory := [result for result in findings.main_workloads if _memory(result, findings.removals)]:
        yield _memory_split(findings, memory[0])


def _speedups(findings: Findings, results: list[Data]) -> Plot:
    words = []
    for result in results:
        entry = of_size(result, findings.removals) or {}
        measured = speedup(entry)
        bound = f", at most {entry['bound']:.2f} by its work" if entry["bound"] else ""
        interval = f", 95 % interval {between(measured)}" if between(measured) else ""
        words.append(f"{workload_label(result['workload'])}: {measured.value:.2f} times as fast{interval}{bound}")
    return Plot(
        "speedup",
        "Measured speed-up over blocks removed, and its bound",
        f"With {plural(len(findings.removals), 'block')} removed, {'; '.join(words)}.",
        lambda canvas: _draw_speedups(canvas, findings, _shown(findings, results, _MOST_WORKLOADS)),
    )


def _draw_speedups(canvas: Canvas, findings: Findings, results: list[Data]) -> None:
    canvas.height(360 if canvas.narrow else 300)
    axis = canvas.figure.add_subplot()
    most = 0
    for number, result in enumerate(results):
        entries = [entry for size in findings.by_size if (entry := of_size(result, size))]
        counts = [0, *(len(entry["removals"]) for entry in entries)]
        most = max(most, *counts)
        measured = [speedup(entry) for entry in entries]
        errors = [[0.0, *(value.errors[side] for value in measured)] for side in (0, 1)]
        axis.errorbar(
            counts, [1.0, *(value.value for value in measured)], yerr=errors, capsize=2.5, elinewidth=1.2,
            color=SERIES[number], marker=MARKERS[number], label=workload_label(result["workload"]),
        )  # fmt: skip
        bounds = [(len(entry["removals"]), entry["bound"]) for entry in entries if entry["bound"]]
        if bounds:
            axis.plot(*zip((0, 1.0), *bounds, strict=True), ":", color=SERIES[number], linewidth=1.4)
    kept = [findings.blocks / (findings.blocks - count) for count in range(most + 1)]
    axis.plot(range(most + 1), kept, "--", color=MUTED, linewidth=1, label="ratio of the blocks")
    axis.plot([], [], ":", color=INK, linewidth=1.4, label="bound by work")
    axis.set(xlabel="blocks removed", ylabel="times as fast")
    whole_ticks(axis, range(most + 1), 8 if canvas.narrow else 20)
    axis.grid()
    canvas.figure.legend(loc="outside upper left", ncols=1 if canvas.narrow else 3, columnspacing=1.6)


def _latencies(
    findings: Findings, results: list[Data], key: str, name: str, title: str, label: str,
    flat: Callable[[Any], list[float]],
) -> Plot:  # fmt: skip
    """Show the share of runs or tokens that took at most a time: dense, the plan's size, and those between."""
    what = key.removesuffix("s")
    shown = _shown(findings, results, _MOST_PANELS)
    words = []
    for result in shown:
        pruned = of_size(result, findings.removals) or {}
        medians = [format_milliseconds(model[f"median_{what}_ms"]) for model in (result["dense"], pruned)]
        tails = [format_milliseconds(model[f"p99_{what}_ms"]) for model in (result["dense"], pruned)]
        words.append(
            f"{workload_label(result['workload'])}: median {medians[0]} dense and {medians[1]} pruned, "
            f"99 % within {tails[0]} and {tails[1]}"
        )

    def draw(canvas: Canvas) -> None:
        columns = 1 if canvas.narrow else min(3, len(shown))
        rows = -(-len(shown) // columns)
        canvas.height(36 + 215 * rows)
        axes = [axis for row in canvas.figure.subplots(rows, columns, squeeze=False) for axis in row]
        for axis, result in zip(axes, shown, strict=False):
            for entry in _between(findings, result):
                axis.ecdf(_thinned(flat(entry[key])), color=MUTED, linewidth=0.8, alpha=0.7)
            axis.ecdf(_thinned(flat(result["dense"][key])), color=DENSE, label="dense")
            pruned = of_size(result, findings.removals) or {}
            kept = f"{len(findings.removals)} removed"
            axis.ecdf(_thinned(flat(pruned[key])), color=PRUNED, linestyle="--", label=kept)
            axis.set(xlabel=label, ylim=(0, 1.02), yticks=[0, 0.5, 0.9, 1], yticklabels=["0", "50 %", "90 %", "100 %"])
            axis.set_title(workload_label(result["workload"]), fontsize=10.5)
            axis.locator_params(axis="x", nbins=4)
            axis.grid()
        for axis in axes[len(shown) :]:
            axis.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        if _between(findings, shown[0]):
            handles.append(axes[0].plot([], [], color=MUTED, linewidth=0.8)[0])
            labels.append("sizes between")
        canvas.figure.legend(handles, labels, loc="outside upper left", ncols=3)

    return Plot(name, title, f"{'; '.join(words)}.", draw)


def _shown(findings: Findings, results: list[Data], at_most: int) -> list[Data]:
    """Return as many workloads as a picture holds, in their order, the headline's among them; the tables have all."""
    main = findings.main_workloads
    chosen = sorted(results, key=lambda result: result not in main)[:at_most]
    return [result for result in results if result in chosen]


def _between(findings: Findings, result: Data) -> list[Data]:
    """Return the timings of some sizes between the dense model and the plan's, evenly spread."""
    entries = [entry for size in findings.by_size[:-1] if (entry := of_size(result, size))]
    count = min(len(entries), _MOST_BETWEEN)
    return [entries[(2 * number + 1) * len(entries) // (2 * count)] for number in range(count)]


def _thinned(seconds: list[float]) -> list[float]:
    """Return milliseconds; of very many, evenly spread ones, which draw the same curve in fewer bytes."""
    ordered = sorted(1000 * value for value in seconds)
    step = max(1, len(ordered) // _MOST_POINTS)
    return [*ordered[::step], ordered[-1]] if step > 1 else ordered


def _memory(result: Data, removals: Removals) -> Data | None:
    entry = of_size(result, removals)
    memory: Data | None = entry["memory"] if entry and result["dense"]["memory"] else None
    return memory


def _memory_split(findings: Findings, result: Data) -> Plot:
    sizes = [size for size in findings.by_size if _memory(result, size)]
    # Few enough that each bar keeps its label.
    apart = max(1, -(-len(sizes) // 12))
    shown = [*sizes[:-1][::apart], sizes[-1]]
    models: list[tuple[str, Data]] = [("dense", result["dense"]["memory"])]
    models += [(f"{len(size)} removed", memory) for size in shown if (memory := _memory(result, size))]
    words = [f"{name}: {format_bytes(memory['peak_bytes'])}" for name, memory in models]
    return Plot(
        "memory",
        f"Peak memory, {workload_label(result['workload'])}",
        f"{'; '.join(words)}.",
        lambda canvas: _draw_memory(canvas, models),
    )


def _draw_memory(canvas: Canvas, models: list[tuple[str, Data]]) -> None:
    canvas.height(85 + 26 * len(models))
    axis = canvas.figure.add_subplot()
    rows = range(len(models))
    unit, scale = ("GB", 1e9) if max(memory["peak_bytes"] for _, memory in models) >= 2e9 else ("MB", 1e6)
    left = [0.0 for _ in models]
    for key, label, colour, hatch in (
        ("weights_bytes", "weights", GREEN, ""),
        ("kv_cache_bytes", "KV cache", PURPLE, "////"),
        ("rest_bytes", "the rest", ORANGE, "\\\\\\\\"),
    ):
        values = [memory[key] / scale for _, memory in models]
        axis.barh(rows, values, 0.66, left=left, color=colour, hatch=hatch, edgecolor=INK, linewidth=0, label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axis.set_yticks(rows, [name for name, _ in models])
    axis.set(xlabel=f"peak memory, {unit}", ylim=(len(models) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    canvas.figure.legend(loc="outside upper left", ncols=3)
