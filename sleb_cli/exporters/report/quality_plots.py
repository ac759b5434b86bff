"""Pictures of what a removal costs: on texts and on tasks, and beside what it gains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING

from sleb_cli.exporters.findings import Estimate, Findings
from sleb_cli.exporters.report.drawing import (
    DENSE,
    GREEN,
    INK,
    MUTED,
    PRUNED,
    PURPLE,
    SERIES,
    Plot,
    draw_series,
    plain_ticks,
    scaled,
    whole_ticks,
)
from sleb_cli.results import PrunedTaskScores, TaskResult
from sleb_cli.tables import quality
from sleb_cli.tables.speed import workload_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TASKS = 24
_MOST_TEXTS = 4
_MOST_LABELS = 8
_TITLE = 32
"""Characters of a panel's title in a line, where three stand side by side."""
_LARGE_CHANGE = 300

Line = tuple[str, dict[int, Estimate]]
"""A name, and a value for each number of removed blocks."""


def perplexity_lines(findings: Findings) -> list[Line]:
    """Return the change of perplexity of each text by the number of removed blocks."""
    return [
        (_short(name), {len(scores.removals): quality.perplexity_change(scores) for scores in text.pruned})
        for name, text in list(zip(findings.text_names, findings.texts, strict=True))[:_MOST_TEXTS]
        if text.pruned
    ]


def _short(name: str) -> str:
    return fill(name, _TITLE, max_lines=3)


def pareto_plots(findings: Findings) -> Iterator[Plot]:
    """Yield quality against measured speed, for each kind of workload."""
    kept = {len(size): value for size in findings.plan.by_size if (value := findings.retention(size))}
    kinds = {"perplexity": perplexity_lines(findings), "accuracy": [("accuracy", kept)]}
    for result, _ in findings.main_workloads:
        speeds = {len(timing.removals): (timing.speedup, timing.interval) for timing in result.pruned}
        shown = {kind: lines for kind, lines in kinds.items() if any(speeds.keys() & values for _, values in lines)}
        if shown:
            draw = partial(_draw_pareto, shown, speeds, f"speedup, {workload_name(result)}")
            yield Plot(f"quality-and-speed-{result.workload.name}", 290, draw)


def _draw_pareto(kinds: dict[str, list[Line]], speeds: dict[int, Estimate], label: str, figure: Figure) -> None:
    (axes,) = figure.subplots(1, len(kinds), squeeze=False)
    for axis, (kind, lines) in zip(axes, kinds.items(), strict=True):
        is_change = kind == "perplexity"
        start = 0.0 if is_change else 100.0
        for number, (name, values) in enumerate(lines):
            counts = [count for count in values if count in speeds]
            across, reach = scaled([speeds[count] for count in counts], 1)
            changes = [values[count] for count in counts]
            up = [100 * change for change, _ in changes]
            axis.plot([1.0, *across], [start, *up], "-", color=SERIES[number], linewidth=1.2, alpha=0.6)
            draw_series(axis, number, name, across, changes, 100, xerr=reach, linestyle="")
            if number == 0:
                points = list(zip(counts, across, up, strict=True))
                for count, x, y in points[::-1][:: -(-len(points) // _MOST_LABELS) or 1]:
                    # On the outer side of the curve, where no line runs.
                    place = (7, -13) if is_change else (7, 6)
                    axis.annotate(f"−{count}", (x, y), place, textcoords="offset points", fontsize=10)
        axis.plot([1.0], [start], "*", color=INK, markersize=11, label="dense")
        axis.set(xlabel=label, ylabel="change in perplexity, %" if is_change else "accuracy kept, %")
        axis.margins(0.1)
        if is_change:
            _spread_large_changes(axis, lines)
        axis.grid()
        axis.legend(loc="upper left" if is_change else "lower left")


def text_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the change of perplexity and the divergence by size."""
    lines = perplexity_lines(findings)
    if not lines:
        return
    scored = findings.scored_texts
    independent = "" if any(map(findings.made_on, findings.texts)) else " that was not searched on"
    numbers = quality.perplexities(scored, f"Perplexity on text{independent}")
    yield Plot("perplexity", 260, partial(_draw_lines, lines), numbers)
    yield Plot("divergence", 260, partial(_draw_divergence, findings), quality.divergences(scored))


def _draw_lines(lines: list[Line], figure: Figure) -> None:
    axis = figure.add_subplot()
    for number, (name, values) in enumerate(lines):
        draw_series(axis, number, name, [0, *values], [(0.0, None), *values.values()], 100)
    axis.set(xlabel="blocks removed", ylabel="change in perplexity, %")
    whole_ticks(axis, range(max(at for _, values in lines for at in values) + 1))
    _spread_large_changes(axis, lines)
    axis.grid()
    axis.legend(loc="upper left")


def _spread_large_changes(axis: Axes, lines: list[Line]) -> None:
    """Use a logarithmic axis where some sizes are several times worse than others."""
    most = 100 * max(value for _, values in lines for value, _ in values.values())
    if most >= _LARGE_CHANGE:
        axis.set_yscale("symlog", linthresh=100)
        axis.set_ylim(bottom=-20)
        axis.yaxis.set_major_formatter("{x:,.0f}")


def _draw_divergence(findings: Findings, figure: Figure) -> None:
    shown = [found for found in zip(findings.text_names, findings.texts, strict=True) if found[1].pruned][:3]
    (axes,) = figure.subplots(1, len(shown), squeeze=False)
    for axis, (name, text) in zip(axes, shown, strict=True):
        counts = [len(entry.removals) for entry in text.pruned]
        for label, marker, colour, field in (
            ("median", "^", GREEN, "median"), ("mean", "o", PRUNED, "mean"), ("90%", "s", DENSE, "p90"),
            ("99%", "D", PURPLE, "p99"),
        ):  # fmt: skip
            values = [max(getattr(entry.divergence, field), 1e-6) for entry in text.pruned]
            axis.plot(counts, values, marker=marker, color=colour, label=label, linewidth=1.2)
        axis.set(xlabel="blocks removed", ylabel="KL divergence, nats", title=_short(name))
        axis.set_yscale("log")
        ticks = plain_ticks(*axis.get_ylim())
        axis.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        axis.yaxis.minorticks_off()
        axis.set_xticks(counts if len(counts) < 12 else counts[:: -(-len(counts) // 10)])
        axis.margins(x=0.15)
        axis.grid(axis="y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def task_plots(findings: Findings) -> Iterator[Plot]:
    """Yield the tasks as bars with intervals, and their paired differences."""
    tasks = [each for each in findings.main_tasks if all(0 <= scores.value <= 1 for scores in (each[0].dense, each[1]))]
    tasks = tasks[:_MOST_TASKS]
    if not tasks:
        return
    numbers = quality.tasks(findings.scored_tasks)
    yield Plot("tasks", 80 + 40 * len(tasks), partial(_draw_bars, tasks))
    yield Plot("differences", 60 + 36 * len(tasks), partial(_draw_differences, tasks), numbers)


def _name_rows(axis: Axes, tasks: list[tuple[TaskResult, PrunedTaskScores]]) -> None:
    labels = [fill(f"{task.task}\n{task.metric}", 24, max_lines=2, replace_whitespace=False) for task, _ in tasks]
    axis.set_yticks(range(len(tasks)), labels)
    axis.set_ylim(len(tasks) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def _draw_bars(tasks: list[tuple[TaskResult, PrunedTaskScores]], figure: Figure) -> None:
    axis = figure.add_subplot()
    for offset, label, colour, hatch, models in (
        (-0.19, "dense", DENSE, "", [task.dense for task, _ in tasks]),
        (0.19, "pruned", PRUNED, "////", [entry for _, entry in tasks]),
    ):
        values, reach = scaled([(model.value, model.interval) for model in models], 100)
        axis.barh(
            [row + offset for row in range(len(tasks))], values, 0.36, color=colour, label=label, hatch=hatch,
            edgecolor="white", linewidth=0, xerr=reach,
            error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 2.5},
        )  # fmt: skip
    axis.set(xlabel="%", xlim=(0, 100))
    _name_rows(axis, tasks)
    figure.legend(loc="outside upper left", ncols=2)


def _draw_differences(tasks: list[tuple[TaskResult, PrunedTaskScores]], figure: Figure) -> None:
    axis = figure.add_subplot()
    values, reach = scaled([(entry.difference, entry.difference_interval) for _, entry in tasks], 100)
    rows = range(len(tasks))
    axis.axvline(0, color=INK, linewidth=1)
    axis.errorbar(values, rows, xerr=reach, linestyle="", marker="o", capsize=3, color=PRUNED, elinewidth=1.6)
    axis.set_xlabel("pruned − dense, points")
    _name_rows(axis, tasks)
    right = axis.secondary_yaxis("right")
    flips = ["" if entry.lost is None else f"{entry.lost} lost, {entry.gained} gained" for _, entry in tasks]
    right.set_yticks(rows, flips, fontsize=9.5)
    right.tick_params(length=0, labelcolor=MUTED)
    right.spines["right"].set_visible(False)
