"""A figure of several plans: a panel for each measurement, with a line for each method."""

from __future__ import annotations

from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING

from sleb_cli.exporters.report.drawing import (
    INK,
    WIDTH,
    Plot,
    draw_series,
    render_svg,
    require_extra,
    set_whole_ticks,
)
from sleb_cli.exporters.table.rows import PlanTable, Row
from sleb_cli.units import format_perplexity
from sleb_plugins.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _LEGEND = 210, 18
"""The heights of a row of panels and of the legend, in points."""
_LOG_SCALE_RATIO = 4
"""An axis of perplexities is logarithmic if the largest is more than this many times the smallest.
"""
_OFFSET = 0.06
"""Between the methods at one size, in blocks, so that their intervals do not overlap."""


def draw_figure(table: PlanTable) -> str:
    """Draw the figure as SVG.

    Raises:
        UsageError: nothing was measured of the plans.
        MachineError: matplotlib is not installed.
    """
    require_extra()
    if not table.measured:
        raise UsageError(
            "Nothing was measured of these plans.",
            hint="Run `sleb eval` or `sleb bench` on each first.",
        )
    methods: dict[str, list[Row]] = {}
    for row in sorted(
        (row for row in table.rows if row["removed"]), key=lambda row: row["removed"]
    ):
        methods.setdefault(table.method(row), []).append(row)
    across = max(1, WIDTH // (6 * max(map(len, methods)) + 60))
    height = _PANEL * -(-len(table.measured) // 2) + _LEGEND * (1 + len(methods) // across)
    caption = "By blocks removed; bars are 95% intervals of the difference from the dense model."
    return render_svg(
        Plot("Plans", caption, height, partial(_draw, table, methods, across))
    ).decode()


def _draw(table: PlanTable, methods: dict[str, list[Row]], across: int, figure: Figure) -> None:
    count = len(table.measured)
    axes = list(figure.subplots(-(-count // 2), min(2, count), squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    for axis, name in zip(axes, table.measured, strict=False):
        for number, (method, rows) in enumerate(methods.items()):
            _draw_line(
                axis, table, name, rows, (number, method, _OFFSET * (number - len(methods) // 2))
            )
        values = [row[name][0] for row in table.rows if name in row]
        if table.measured[name] is format_perplexity and max(values) > _LOG_SCALE_RATIO * min(
            values
        ):
            axis.set_yscale("log", subs=(2, 3, 5, 7))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter("{x:,.0f}")
        axis.set_title(fill(name, 50), loc="left", fontsize=11)
        set_whole_ticks(axis, range(max(row["removed"] for row in table.rows) + 1))
        axis.grid()
    whole = table.shared.get("removed from")
    for axis in axes[max(0, count - 2) : count]:
        axis.set_xlabel(f"removed, of {whole}" if whole else "removed")
    drawn = [axis.get_legend_handles_labels() for axis in axes[:count]]
    named = {
        label: line for lines, labels in drawn for line, label in zip(lines, labels, strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=across)


def _draw_line(
    axis: Axes, table: PlanTable, name: str, rows: list[Row], line: tuple[int, str, float]
) -> None:
    number, method, offset = line
    xs, values = (
        [row["removed"] + offset for row in rows if name in row],
        [row[name] for row in rows if name in row],
    )
    if not values:
        return
    if dense := table.dense(rows[0]).get(name):
        xs, values = [0, *xs], [dense, *values]
    draw_series(axis, number, xs, values, 1, label=method)
    if dense:
        axis.plot([0], [dense[0]], "*", color=INK, markersize=11, label="dense", zorder=3)
