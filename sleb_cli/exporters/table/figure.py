"""A figure of several plans: a panel for each measurement, with a line for each method."""

from __future__ import annotations

import math
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING

from sleb_cli.exporters.lines import Line
from sleb_cli.exporters.report.drawing import WIDTH, Plot, draw_by_size, render, require_extra
from sleb_cli.exporters.table.rows import PlanTable
from sleb_cli.units import format_perplexity
from sleb_plugins.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 210
_LEGEND = 18
"""The heights of a row of panels and of one of the legend, in points."""
_LOG_SCALE_RATIO = 4
"""An axis of perplexities is logarithmic if the largest is more than this many times the smallest.
"""


def draw_figure(form: str, table: PlanTable) -> bytes:
    """Draw the figure as SVG or PDF.

    Raises:
        UsageError: nothing was measured of the plans, or they remove different parts.
        MachineError: matplotlib is not installed.
    """
    require_extra()
    if not table.measured:
        raise UsageError(
            "Nothing was measured of these plans.",
            hint="Run `sleb eval` or `sleb bench` on each first.",
        )
    parts = _removed_parts(table)
    methods = table.by_method()
    legend_columns = max(1, WIDTH // (6 * max(map(len, methods), default=0) + 60))
    panel_rows = math.ceil(len(table.measured) / 2)
    legend_rows = 1 + len(methods) // legend_columns
    height = _PANEL * panel_rows + _LEGEND * legend_rows
    caption = f"By {parts} removed."
    if any(table.has_intervals(name) for name in table.measured):
        caption += " Bars are 95% intervals of the difference from the dense model."
    plot = Plot("Plans", caption, height, partial(_draw, table, panel_rows, legend_columns))
    return render(plot, form=form)


def _removed_parts(table: PlanTable) -> str:
    """Name what the plans remove: "blocks", or "experts of each block"."""
    parts: set[str] = set()
    for row in table.rows:
        if "removed from" in row:
            parts.add(row["removed from"].partition(" ")[2])
    if len(parts) > 1:
        raise UsageError(
            f"A figure has one axis, but these plans remove {' and '.join(sorted(parts))}.",
            hint="Export a figure of each kind, or a table of all.",
        )
    return parts.pop()


def _draw(table: PlanTable, panel_rows: int, legend_columns: int, figure: Figure) -> None:
    count = len(table.measured)
    axes = list(figure.subplots(panel_rows, min(2, count), squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    for axis, name in zip(axes, table.measured, strict=False):
        lines = _lines(table, name)
        draw_by_size(axis, lines)
        axis.set_title(fill(name, 50), loc="left", fontsize=11)
        if table.measured[name] is format_perplexity:
            _spread_perplexities(axis, lines)
    whole = table.shared.get("removed from")
    for axis in axes[max(0, count - 2) : count]:
        axis.set_xlabel(f"removed, of {whole}" if whole else "removed")
    # Each panel has a line for each method, if only an empty one.
    drawn, names = axes[0].get_legend_handles_labels()
    figure.legend(drawn, names, loc="outside upper left", ncols=legend_columns)


def _lines(table: PlanTable, name: str) -> list[Line]:
    """Return a line for each method, which is empty if it was not measured."""
    lines = []
    for method, rows in table.by_method().items():
        values = {row["removed"]: row[name] for row in rows if name in row}
        dense = table.dense(rows[0])
        if values and name in dense:
            values = {0: dense[name], **values}
        lines.append(Line(method, values))
    return lines


def _spread_perplexities(axis: Axes, lines: list[Line]) -> None:
    drawn = [line for line in lines if line.values]
    if not drawn:
        return
    smallest = min(line.smallest for line in drawn)
    if max(line.largest for line in drawn) > _LOG_SCALE_RATIO * smallest:
        axis.set_yscale("log", subs=(2, 3, 5, 7))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("{x:,.0f}")
