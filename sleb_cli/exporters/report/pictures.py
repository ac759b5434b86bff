"""The pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.headline import uses
from sleb_cli.exporters.lines import (
    Line,
    changes,
    distance_lines,
    kept_line,
    search_lines,
    speed_line,
    text_line,
)
from sleb_cli.exporters.report.drawing import (
    MUTED,
    SERIES,
    WIDTH,
    Plot,
    draw_by_size,
    draw_dense,
    draw_series,
    error_bars,
    is_narrow,
    set_whole_ticks,
)
from sleb_cli.plan import Plan
from sleb_cli.results import CorpusResult, TaskResult
from sleb_cli.tables.quality import main_tasks
from sleb_cli.tables.search_results import DISTANCES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_CHANGE = "change in perplexity"
_KEPT = "accuracy kept"
_MAX_TEXTS = 3
_MAX_WORKLOADS = len(SERIES)
_MAX_LABELS = 8
_LARGE_CHANGE = 3.0
_COLOURS = "cividis_r"  # readable with any colour vision, and in greys
_SHADES = 32  # few, as each is a path of its own
# The first blocks cost 10 to 10,000 times more than others: a scale up to them would show all
# others in one colour.
_COLOUR_QUANTILE = 0.8


def text_changes(findings: Findings) -> list[Line]:
    """Return the perplexity change on each text of which a size was measured."""
    lines = []
    named = zip(findings.text_names, findings.texts, strict=True)
    for name, text in list(named)[:_MAX_TEXTS]:
        if text.pruned:
            lines.append(changes(text_line(fill(name, 32, max_lines=3), text)))
    return lines


def trade_plot(findings: Findings) -> Plot | None:
    """Plot quality against measured speed."""
    if not findings.main_workloads:
        return None
    speed = speed_line(findings.main_workloads[0][0])
    tasks = [task for task, _ in findings.accuracy_tasks]
    accuracy = kept_line(findings.plan, "accuracy", tasks)
    measured = {_CHANGE: text_changes(findings), _KEPT: [accuracy]}
    panels = {}
    for quality, lines in measured.items():
        timed = [line for line in lines if len(_timed_sizes(line, speed)) > 1]
        if timed:
            panels[quality] = timed
    if not panels:
        return None
    caption = (
        f"Each point is a size, named by the {findings.plan.unit} removed; bars are 95% intervals."
    )
    draw = partial(_draw_trade, panels, speed)
    return Plot("Quality against measured speed", caption, 290, draw, panels=len(panels))


def _timed_sizes(line: Line, speed: Line) -> list[int]:
    """Return the sizes of which both quality and speed were measured, the dense model first."""
    return sorted(line.values.keys() & speed.values.keys())


def _draw_trade(panels: Mapping[str, Sequence[Line]], speed: Line, figure: Figure) -> None:
    across = 1 if is_narrow(figure) else len(panels)
    axes = figure.subplots(len(panels) // across, across, squeeze=False).flat
    for axis, (quality, lines) in zip(axes, panels.items(), strict=True):
        for number, line in enumerate(lines):
            sizes = _timed_sizes(line, speed)
            xs = [speed.values[size] for size in sizes]
            ys = [line.values[size] for size in sizes]
            speeds = [value for value, _ in xs]
            bars = error_bars(xs)
            draw_series(axis, number, speeds, ys, xerr=bars, label=line.name, linewidth=1.2)
        draw_dense(axis, [1.0], [lines[0].values[0][0]])
        axis.set(xlabel=f"speedup, {speed.name}")
        axis.margins(0.1)
        axis.grid()
        # Labels stand on the outer side of the curve, where no line runs.
        if quality == _CHANGE:
            _name_sizes(axis, lines[0], speed, (7, -13))
            _label_changes(axis, lines)
        else:
            _name_sizes(axis, lines[0], speed, (7, 6))
            _label_shares(axis, quality)
            axis.legend(loc="lower left")


def _name_sizes(axis: Axes, line: Line, speed: Line, offset: tuple[int, int]) -> None:
    """Write the size at up to _MAX_LABELS points, evenly spread, with the last one."""
    sizes = _timed_sizes(line, speed)[1:]
    stride = math.ceil(len(sizes) / _MAX_LABELS)
    for size in sizes[::-1][::stride]:
        point = (speed.values[size][0], line.values[size][0])
        axis.annotate(f"without {size}", point, offset, textcoords="offset points", fontsize=10)


def tasks_plot(findings: Findings) -> Plot | None:
    """Plot the share of the dense model's score that is kept by size, of each task or use."""
    measured: dict[str, Sequence[TaskResult | CorpusResult]] = {}
    for task in main_tasks(findings.tasks):
        measured[task.task] = [task]
    if not 0 < len(measured) <= _MAX_WORKLOADS:
        measured = uses(findings)
    lines = []
    for name, results in measured.items():
        line = kept_line(findings.plan, name, results)
        if len(line.values) > 1:
            lines.append(line)
    if not lines:
        return None
    unit = findings.plan.unit
    caption = "A share of the dense model's score; bars are 95% intervals of the paired difference."
    return Plot(f"Scores kept by {unit} removed", caption, 280, partial(_draw_kept, lines, unit))


def _draw_kept(lines: Sequence[Line], unit: str, figure: Figure) -> None:
    axis = figure.add_subplot()
    draw_by_size(axis, lines)
    axis.set_xlabel(f"{unit} removed")
    _label_shares(axis, "score kept")
    axis.legend(loc="lower left")


def perplexity_plot(findings: Findings) -> Plot | None:
    """Plot the perplexity change by size."""
    lines = [changes(line) for line in search_lines(findings.plan)]
    measured = text_changes(findings)
    lines += measured
    if not lines:
        return None
    unit = findings.plan.unit
    caption = "Both models read the same tokens."
    if measured:
        caption += " Bars are 95% intervals of the paired difference."
    draw = partial(_draw_changes, lines, unit)
    return Plot(f"Change in perplexity by {unit} removed", caption, 280, draw)


def _draw_changes(lines: Sequence[Line], unit: str, figure: Figure) -> None:
    axis = figure.add_subplot()
    draw_by_size(axis, lines)
    axis.set_xlabel(f"{unit} removed")
    _label_changes(axis, lines)


def distance_plot(plan: Plan) -> Plot | None:
    """Plot the distance from the dense model's output by size, of a model that only reads."""
    lines = distance_lines(plan)
    if plan.model.output is None or not lines:
        return None
    caption = f"Each point is a mean over texts of the {DISTANCES[plan.model.output]}"
    draw = partial(_draw_distances, lines, plan.unit)
    return Plot(f"Distance from the dense model by {plan.unit} removed", caption, 280, draw)


def _draw_distances(lines: Sequence[Line], unit: str, figure: Figure) -> None:
    axis = figure.add_subplot()
    draw_by_size(axis, lines)
    axis.set(xlabel=f"{unit} removed", ylabel="distance")
    axis.legend(loc="upper left")


def _label_changes(axis: Axes, lines: Sequence[Line]) -> None:
    _label_shares(axis, _CHANGE)
    if max(line.largest for line in lines) >= _LARGE_CHANGE:
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=-0.2)
        axis.yaxis.set_major_formatter("{x:,.0%}")
    axis.legend(loc="upper left")


def _label_shares(axis: Axes, label: str) -> None:
    axis.set_ylabel(label)
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")


def speed_plot(findings: Findings) -> Plot | None:
    """Plot the speedup of workloads by size, the main ones first."""
    shown = [result for result, _ in findings.main_workloads]
    for result in findings.workloads:
        if result not in shown and findings.at_plan_size(result.pruned):
            shown.append(result)
    if not shown:
        return None
    lines = [speed_line(result) for result in shown[:_MAX_WORKLOADS]]
    unit = findings.plan.unit
    caption = "Points are measured, with 95% intervals."
    if findings.plan.order.whole_blocks:
        caption = (
            "Points are measured, with 95% intervals; the dashed line is the ratio of the blocks."
        )
    draw = partial(_draw_speedups, lines, findings.plan)
    return Plot(f"Measured speedup by {unit} removed", caption, 300, draw)


def _draw_speedups(lines: Sequence[Line], plan: Plan, figure: Figure) -> None:
    axis = figure.add_subplot()
    draw_by_size(axis, lines)
    if plan.order.whole_blocks:
        blocks = plan.model.blocks
        sizes = range(max(max(line.values) for line in lines) + 1)
        ratios = [blocks / (blocks - size) for size in sizes]
        axis.plot(sizes, ratios, "--", color=MUTED, linewidth=1, label="ratio of the blocks")
    axis.set(xlabel=f"{plan.unit} removed", ylabel="times as fast")
    figure.legend(loc="outside upper left", ncols=1 if is_narrow(figure) else 3)


def search_plot(plan: Plan) -> Plot | None:
    """Plot the scores by step and block."""
    costs = candidate_costs(plan)
    if not any(costs):
        return None
    row = max(7.0, min(24.0, 420 / len(costs)))
    caption = (
        "Bright cells are cheap to remove, dark ones costly. A cross marks what a step removed, a "
        "dot what was removed before; hatched blocks are protected."
    )
    draw = partial(_draw_heat_map, plan, costs, row)
    return Plot("What each candidate would have cost", caption, 125 + row * len(costs), draw)


def candidate_costs(plan: Plan) -> list[dict[int, float]]:
    """Return, by step, how far each candidate was behind the best; infinity if not finite."""
    costs = []
    for step in plan.steps:
        scores = {}
        for block, score in step.scores.items():
            scores[block] = math.inf if score is None else score
        best = min(scores.values(), default=0.0)
        behind = {block: score - best for block, score in scores.items()}
        if step.race:
            for block, drop in step.race.dropped.items():
                behind[block] = max(0.0, drop.behind)
        costs.append(behind)
    return costs


def _draw_heat_map(plan: Plan, costs: list[dict[int, float]], row: float, figure: Figure) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    axis = figure.add_subplot()
    blocks = plan.model.blocks
    highest = _highest_shown(costs)
    norm = PowerNorm(0.5, 0.0, highest, clip=True)
    cells = np.zeros((len(costs), blocks, 4))  # transparent where nothing was scored
    for number, step in enumerate(costs):
        for block, cost in step.items():
            cells[number, block] = colormaps[_COLOURS](norm(cost))
    _mark_non_candidates(axis, plan, costs)
    extent = (-0.5, blocks - 0.5, len(costs) + 0.5, 0.5)
    axis.imshow(cells, aspect="auto", interpolation="none", extent=extent, zorder=2)
    rows = range(1, len(costs) + 1)
    removed = [step.block for step in plan.steps]
    size = max(3.0, min(9.0, row * 0.45, 0.5 * WIDTH / blocks))
    axis.plot(
        removed, rows, "x", color="#000000", markersize=size, markeredgewidth=size / 4, zorder=3
    )
    axis.set(xlim=extent[:2], ylim=extent[2:], xlabel="block", ylabel="step")
    set_whole_ticks(axis, blocks)
    axis.set_yticks(rows[:: max(1, math.ceil(14 / row))])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    unit = plan.score_unit or plan.search.metric
    _add_scale(figure, axis, norm, highest, f"cost above the removed block's, {unit}")


def _highest_shown(costs: list[dict[int, float]]) -> float:
    """Return the cost that has the darkest colour."""
    finite: list[float] = []
    for step in costs:
        finite += [cost for cost in step.values() if 0 < cost < math.inf]
    if not finite:
        return 1.0
    return sorted(finite)[int(_COLOUR_QUANTILE * (len(finite) - 1))]


def _add_scale(figure: Figure, axis: Axes, norm: Normalize, highest: float, label: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    colours = ScalarMappable(norm, colormaps[_COLOURS].resampled(_SHADES))
    scale = figure.colorbar(
        colours, ax=axis, location="top", shrink=0.5, aspect=40, anchor=(0.0, 0.0), extend="max"
    )
    ticks = [0.0, highest / 16, highest / 4, highest]
    scale.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    scale.set_label(label, loc="left", fontsize=10)


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
