"""The four pictures of a report."""

from __future__ import annotations

import math
from functools import partial
from itertools import islice
from textwrap import fill
from typing import TYPE_CHECKING

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.report.drawing import (
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Plot,
    draw_series,
    scale_estimates,
    set_whole_ticks,
)
from sleb_cli.plan import Plan
from sleb_cli.results import WorkloadResult
from sleb_cli.tables.quality import Estimate, perplexity_change
from sleb_cli.tables.search_results import perplexities
from sleb_cli.tables.speed import workload_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_TEXTS = 3
_MAX_WORKLOADS = len(SERIES)
_MAX_LABELS = 8
_LARGE_CHANGE = 300  # percent
_COLOURS = "cividis_r"  # readable with any colour vision, and in greys
# The first blocks cost 10 to 10,000 times more than others: a scale up to them would show all
# others in one colour.
_COLOUR_QUANTILE = 0.8

Line = tuple[str, dict[int, Estimate]]
"""A name, and a value for each number of removed blocks."""


def text_lines(findings: Findings) -> list[Line]:
    """Return the perplexity change on each measured text by number of removals."""
    return [
        (
            fill(name, 32, max_lines=3),
            {len(scores.removals): perplexity_change(scores) for scores in text.pruned},
        )
        for name, text in islice(zip(findings.text_names, findings.texts, strict=True), _MAX_TEXTS)
        if text.pruned
    ]


def search_lines(plan: Plan) -> list[Line]:
    """Return the perplexity change on the text of the search and on its held-out sequences, if any."""
    return [
        (
            name,
            {
                size: (perplexity / dense - 1, None)
                for size, perplexity in enumerate(pruned, start=1)
            },
        )
        for name, (dense, *pruned) in perplexities(plan).items()
    ]


def trade_plot(findings: Findings) -> Plot | None:
    """Plot quality against measured speed."""
    if not findings.main_workloads:
        return None
    result, _ = findings.main_workloads[0]
    speeds = {len(timing.removals): (timing.speedup, timing.interval) for timing in result.pruned}
    accuracy = {
        len(size): share for size in findings.plan.size_keys if (share := findings.retention(size))
    }
    kinds = {"perplexity": text_lines(findings), "accuracy": [("accuracy", accuracy)]}
    shown = {
        kind: lines
        for kind, lines in kinds.items()
        if any(speeds.keys() & values for _, values in lines)
    }
    if not shown:
        return None
    caption = (
        f"Each point is a size, named by the {findings.plan.unit} removed; bars are 95% intervals."
    )
    draw = partial(_draw_trade, shown, speeds, f"speedup, {workload_name(result)}")
    return Plot("Quality against measured speed", caption, 290, draw)


def _draw_trade(
    kinds: dict[str, list[Line]], speeds: dict[int, Estimate], label: str, figure: Figure
) -> None:
    (axes,) = figure.subplots(1, len(kinds), squeeze=False)
    for axis, (kind, lines) in zip(axes, kinds.items(), strict=True):
        is_change = kind == "perplexity"
        start = 0.0 if is_change else 100.0
        for number, (name, values) in enumerate(lines):
            counts = [count for count in values if count in speeds]
            xs, bars = scale_estimates([speeds[count] for count in counts], 1)
            ys = [100 * values[count][0] for count in counts]
            axis.plot([1.0, *xs], [start, *ys], "-", color=SERIES[number], linewidth=1.2, alpha=0.6)
            changes = [values[count] for count in counts]
            draw_series(axis, number, xs, changes, 100, label=name, xerr=bars, linestyle="")
            if number == 0:
                points = list(zip(counts, xs, ys, strict=True))
                for count, x, y in points[::-1][:: -(-len(points) // _MAX_LABELS) or 1]:
                    # On the outer side of the curve, where no line runs.
                    offset = (7, -13) if is_change else (7, 6)
                    axis.annotate(
                        f"−{count}", (x, y), offset, textcoords="offset points", fontsize=10
                    )
        axis.plot([1.0], [start], "*", color=INK, markersize=11, label="dense")
        axis.set(
            xlabel=label, ylabel="change in perplexity, %" if is_change else "accuracy kept, %"
        )
        axis.margins(0.1)
        if is_change:
            _spread_large_changes(axis, lines)
        axis.grid()
        axis.legend(loc="upper left" if is_change else "lower left")


def perplexity_plot(findings: Findings) -> Plot | None:
    """Plot the perplexity change by size."""
    caption = (
        "Both models read the same tokens, so bars are 95% intervals of the paired difference."
    )
    unit, lines = findings.plan.unit, [*search_lines(findings.plan), *text_lines(findings)]
    plot = Plot(
        f"Change in perplexity by {unit} removed", caption, 280, partial(_draw_lines, lines, unit)
    )
    return plot if lines else None


def _draw_lines(lines: list[Line], unit: str, figure: Figure) -> None:
    axis = figure.add_subplot()
    for number, (name, values) in enumerate(lines):
        draw_series(axis, number, [0, *values], [(0.0, None), *values.values()], 100, label=name)
    axis.set(xlabel=f"{unit} removed", ylabel="change in perplexity, %")
    set_whole_ticks(axis, range(max(at for _, values in lines for at in values) + 1))
    _spread_large_changes(axis, lines)
    axis.grid()
    axis.legend(loc="upper left")


def _spread_large_changes(axis: Axes, lines: list[Line]) -> None:
    if 100 * max(value for _, values in lines for value, _ in values.values()) >= _LARGE_CHANGE:
        axis.set_yscale("symlog", linthresh=100)
        axis.set_ylim(bottom=-20)
        axis.yaxis.set_major_formatter("{x:,.0f}")


def speed_plot(findings: Findings) -> Plot | None:
    """Plot the speedup of the main workloads by size."""
    results = [result for result in findings.workloads if findings.at_plan_size(result.pruned)]
    if not results:
        return None
    main = [result for result, _ in findings.main_workloads]
    shown = sorted(results, key=lambda result: result not in main)[:_MAX_WORKLOADS]
    unit, caption = findings.plan.unit, "Points are measured, with 95% intervals"
    if findings.plan.order.whole_blocks:
        caption += "; the dashed line is the ratio of the blocks"
    return Plot(
        f"Measured speedup by {unit} removed",
        f"{caption}.",
        300,
        partial(_draw_speedups, shown, findings.plan),
    )


def _draw_speedups(results: list[WorkloadResult], plan: Plan, figure: Figure) -> None:
    axis = figure.add_subplot()
    for number, result in enumerate(results):
        counts = [0, *(len(timing.removals) for timing in result.pruned)]
        measured = [(1.0, None), *((timing.speedup, timing.interval) for timing in result.pruned)]
        draw_series(axis, number, counts, measured, 1, label=workload_name(result))
    sizes = range(max(len(timing.removals) for result in results for timing in result.pruned) + 1)
    if plan.order.whole_blocks:
        ratios = [plan.model.blocks / (plan.model.blocks - size) for size in sizes]
        axis.plot(sizes, ratios, "--", color=MUTED, linewidth=1, label="ratio of the blocks")
    axis.set(xlabel=f"{plan.unit} removed", ylabel="times as fast")
    set_whole_ticks(axis, sizes)
    axis.grid()
    figure.legend(loc="outside upper left", ncols=3)


def search_plot(plan: Plan) -> Plot | None:
    """Plot the scores by step and block."""
    costs = candidate_costs(plan)
    if not any(costs):
        return None
    row = max(7.0, min(24.0, 420 / len(costs)))
    caption = (
        "Bright cells are cheap to remove, dark ones costly. A cross marks what a step removed, a "
        "dot what was removed "
        "before; hatched blocks are protected."
    )
    draw = partial(_draw_heat_map, plan, costs, row)
    return Plot("What each candidate would have cost", caption, 125 + row * len(costs), draw)


def candidate_costs(plan: Plan) -> list[dict[int, float]]:
    """Return, by step, how far each candidate was behind the best: infinitely if its score was not
    finite.
    """
    costs = []
    for step in plan.steps:
        scores = {
            block: math.inf if score is None else score for block, score in step.scores.items()
        }
        best = min(scores.values(), default=0.0)
        behind = {block: score - best for block, score in scores.items()}
        dropped = step.race.dropped if step.race else {}
        costs.append(behind | {block: max(0.0, drop.behind) for block, drop in dropped.items()})
    return costs


def _draw_heat_map(plan: Plan, costs: list[dict[int, float]], row: float, figure: Figure) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    axis, blocks = figure.add_subplot(), plan.model.blocks
    finite = sorted(cost for step in costs for cost in step.values() if 0 < cost < math.inf)
    highest = finite[int(_COLOUR_QUANTILE * (len(finite) - 1))] if finite else 1.0
    norm = PowerNorm(0.5, 0.0, highest, clip=True)
    cells = np.zeros((len(costs), blocks, 4))
    for number, step in enumerate(costs):
        for block, cost in step.items():
            cells[number, block] = colormaps[_COLOURS](norm(cost))
    _mark_non_candidates(axis, plan, costs)
    extent = (-0.5, blocks - 0.5, len(costs) + 0.5, 0.5)
    axis.imshow(cells, aspect="auto", interpolation="none", extent=extent, zorder=2)
    size = max(3.0, min(9.0, row * 0.45, 0.5 * WIDTH / blocks))
    removed, rows = [step.block for step in plan.steps], range(1, len(costs) + 1)
    axis.plot(
        removed, rows, "x", color="#000000", markersize=size, markeredgewidth=size / 4, zorder=3
    )
    axis.set(xlim=extent[:2], ylim=extent[2:], xlabel="block", ylabel="step")
    set_whole_ticks(axis, range(blocks))
    axis.set_yticks(rows[:: max(1, math.ceil(14 / row))])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    unit = "nats per token" if plan.search.metric == "nll" else plan.search.metric
    colours = ScalarMappable(
        norm, colormaps[_COLOURS].resampled(32)
    )  # few, as each is a path of its own
    scale = figure.colorbar(
        colours, ax=axis, location="top", shrink=0.5, aspect=40, anchor=(0.0, 0.0), extend="max"
    )
    ticks = [highest / 16, highest / 4, highest]
    scale.set_ticks([0, *ticks], labels=["0", *(f"{tick:.2g}" for tick in ticks)])
    scale.set_label(f"cost above the removed block's, {unit}", loc="left", fontsize=10)


def _mark_non_candidates(axis: Axes, plan: Plan, costs: list[dict[int, float]]) -> None:
    from matplotlib.patches import Rectangle

    for number, (step, removals) in enumerate(zip(costs, plan.size_keys, strict=True), start=1):
        # Not the earlier steps' blocks: a swap may have changed them.
        dots = [block for block in removals[:-1] if block not in step]
        axis.plot(dots, [number] * len(dots), ".", color=MUTED, markersize=2.5, zorder=1)
        for block in set(range(plan.model.blocks)) - set(step) - set(removals[:-1]):
            corner = (block - 0.5, number - 0.5)
            axis.add_patch(
                Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0)
            )
