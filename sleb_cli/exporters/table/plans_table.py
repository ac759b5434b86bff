"""Export the measurements of several plans as one table or figure."""

import csv
import re
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from textwrap import wrap

from sleb_cli.exporters.findings import read_comparison, read_findings
from sleb_cli.exporters.table.figure import draw_figure
from sleb_cli.exporters.table.rows import METHOD, NOT_IN_METHOD, SETTINGS, PlanTable, plan_table
from sleb_cli.results import EvalResult
from sleb_cli.tables.comparison import comparison_tables, conclusions
from sleb_cli.tables.quality import Estimate
from sleb_cli.tables.table import (
    WORKLOADS,
    Column,
    Table,
    between,
    in_markdown,
    tabulate,
    to_markdown,
)
from sleb_plugins.errors import UsageError
from sleb_plugins.exporter import Exporter, Pruning

_INTERVALS = (
    "In brackets: 95% intervals of the difference from the dense model, added to the value, on the "
    "same tokens, items and runs."
)

_LATEX_USE = (
    r"% Needs booktabs. If it is too wide, with graphicx: \resizebox{\textwidth}{!}{\input{FILE}}, "
    r"in an article of two columns within table*."
)
_LATEX_WIDTH = 12
"""A name is broken into lines of this many characters for LaTeX."""


class PlansTable(Exporter):
    """A row for each plan and size: its method, what was measured, and the settings."""

    name = "table"
    description = (
        "what was measured of plans, by size: a .md, .csv or .tex table, an .svg or .pdf figure"
    )
    needs_model = False
    compares = True
    several = True

    def export(self, pruning: Pruning) -> str | bytes:
        """Return the table in the format of the output's suffix.

        Raises:
            UsageError: there is no such format, or nothing was measured that a figure could show.
            MachineError: the output is a figure, and matplotlib is not installed.
        """
        formats: dict[str, Callable[[PlanTable], str | bytes]] = {
            ".md": _to_markdown,
            ".csv": _to_csv,
            ".tex": _to_latex,
            ".svg": partial(draw_figure, "svg"),
            ".pdf": partial(draw_figure, "pdf"),
        }
        suffix = pruning.output.suffix if pruning.output else ".md"
        if suffix not in formats:
            raise UsageError(
                f"A table cannot be {pruning.output}.",
                hint="Use a name that ends in .md, .csv, .tex, .svg or .pdf.",
            )
        comparison = read_comparison(pruning)
        if comparison:
            if suffix != ".md":
                raise UsageError(
                    f"A comparison of two models cannot be {pruning.output}.",
                    hint="Use a name that ends in .md.",
                )
            return _comparison_to_markdown(comparison)
        plans = [read_findings(plan) for plan in (pruning, *pruning.others)]
        return formats[suffix](plan_table(plans))


def _comparison_to_markdown(result: EvalResult) -> str:
    """Write a comparison of two models for a model card, with the command that repeats it."""
    lines = [f"- {in_markdown(sentence)}" for sentence in conclusions(result)]
    for table in comparison_tables(result):
        if table.rows:
            lines += ["", f"**{table.title}**", "", *to_markdown(table)]
    lines.append("")
    for command in result.commands:
        lines.append(f"    {command}")
    return "\n".join(lines) + "\n"


def _tabulate(table: PlanTable, settings: Sequence[str] = SETTINGS) -> Table:
    shared = table.shared  # below the table, so that people see what differs
    columns: list[Column] = [(name, str) for name in METHOD]
    for name, form in table.measured.items():
        columns.append((name, partial(_format_estimate, form)))
    for name in settings:
        if name not in shared:
            columns.append((name, str))
    rows = []
    for row in table.rows:
        rows.append([row.get(name) for name, _ in columns])
    return tabulate("", columns, rows)


def _to_markdown(table: PlanTable) -> str:
    lines = [*to_markdown(_tabulate(table)), "", _INTERVALS, ""]
    if any("times as fast" in name for name in table.measured):
        lines += [WORKLOADS, ""]
    for name, value in table.shared.items():
        lines.append(f"- {name}: {in_markdown(value)}")
    return "\n".join(lines) + "\n"


def _to_latex(table: PlanTable) -> str:
    """Write the table for LaTeX with booktabs, and what makes no method different as comments."""
    shown = _tabulate(table, [name for name in SETTINGS if name not in NOT_IN_METHOD])
    numbers = range(len(shown.columns))
    kinds = "".join("l" if shown.is_words(number) else "r" for number in numbers)
    lines = [_LATEX_USE, f"% {_INTERVALS}"]
    for name, value in table.shared.items():
        lines.append(f"% {name}: {' '.join(value.split())}")
    header = _latex_row(shown.columns, kinds, "b")
    lines += [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", header, r"\midrule"]
    for cells, row in zip(shown.rows, table.rows, strict=True):
        plan = " ".join(row.get("plan", "").split())
        lines.append(f"{_latex_row(cells, kinds, 't')} % {plan}".removesuffix(" % "))
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str], kinds: str, place: str) -> str:
    """Write a row whose cells stand level at their top or bottom line: "t" or "b"."""
    written = [_latex_cell(cell, kind, place) for cell, kind in zip(cells, kinds, strict=True)]
    return " & ".join(written) + r" \\"


def _latex_cell(cell: str, kind: str, place: str) -> str:
    """Escape a cell, and stack a long name's words, or a value and its interval in small type."""
    escaped = re.sub(r"[\\~^]", r"\\char`\\\g<0> ", cell)
    escaped = re.sub(r"[&%$#_{}]", r"\\\g<0>", escaped)
    value, bracket, interval = escaped.partition(" (")
    lines = wrap(value, _LATEX_WIDTH, break_long_words=False, break_on_hyphens=False)
    if bracket:
        lines.append(rf"\scriptsize ({interval}")
    if len(lines) < 2:
        return escaped
    stacked = r" \\ ".join(lines)
    return rf"\begin{{tabular}}[{place}]{{@{{}}{kind}@{{}}}}{stacked}\end{{tabular}}"


def _format_estimate(form: Callable[[float], str], estimate: Estimate) -> str:
    value, interval = estimate
    if interval is None:
        return form(value)
    return f"{form(value)} ({between(interval, form)})"


def _to_csv(table: PlanTable) -> str:
    # As in RFC 4180, but with plain line ends. Each estimate takes three columns.
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = list(METHOD)
    for name in table.measured:
        header += [name, f"{name} low", f"{name} high"]
    writer.writerow([*header, *SETTINGS])
    for row in table.rows:
        cells = [row.get(name) for name in METHOD]
        for name in table.measured:
            value, interval = row.get(name, (None, None))
            cells += [value, interval and interval.low, interval and interval.high]
        cells += [_as_text(row.get(name)) for name in SETTINGS]
        writer.writerow(cells)
    return text.getvalue()


def _as_text(cell: str | None) -> str | None:
    """Put an apostrophe before what a spreadsheet would compute: `=1+1/plan.json`."""
    if cell and cell[0] in "=+-@":
        return f"'{cell}"
    return cell
