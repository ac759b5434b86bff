"""Export what was measured of any number of plans, as one table or one figure."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from io import StringIO

from sleb_cli.exporters.findings import read_findings
from sleb_cli.exporters.table.figure import figure
from sleb_cli.exporters.table.rows import METHOD, SETTINGS, PlanTable, plan_table
from sleb_cli.tables.quality import Estimate
from sleb_cli.tables.table import Columns, between, in_markdown, tabulate, to_markdown
from sleb_plugins.errors import UsageError
from sleb_plugins.exporter import Exporter, Pruning


class PlansTable(Exporter):
    """A row for each plan and size: its method, what was measured, and the settings."""

    name = "table"
    description = "what was measured of plans, a row for each size: Markdown, or a .csv or .svg file"
    needs_model = False
    several = True

    def export(self, pruning: Pruning) -> str:
        """Return the table in the form that the ending of the output names.

        Raises:
            UsageError: it names none, or nothing was measured that a figure could show.
            MachineError: a figure is wanted, and matplotlib is not installed.
        """
        forms = {".md": _markdown, ".csv": _csv, ".svg": figure}
        form = forms.get(pruning.output.suffix if pruning.output else ".md")
        if form is None:
            raise UsageError(f"A table cannot be {pruning.output}.", hint="Use a name that ends in .md, .csv or .svg.")
        return form(plan_table([read_findings(each) for each in (pruning, *pruning.others)]))


def _markdown(table: PlanTable) -> str:
    """Return a table for people: settings that all rows share stand below it."""
    shared = table.shared
    columns: Columns = [
        *((name, str) for name in METHOD),
        *((name, partial(_estimate, form)) for name, form in table.measured.items()),
        *((name, str) for name in SETTINGS if name not in shared),
    ]
    rows = [[row.get(name) for name, _ in columns] for row in table.rows]
    note = "In brackets: 95% intervals of the difference from the dense model, on the same tokens, items and runs."
    lines = [*to_markdown(tabulate("", columns, rows)), "", note, ""]
    return "\n".join([*lines, *(f"- {name}: {in_markdown(value)}" for name, value in shared.items()), ""])


def _estimate(form: Callable[[float], str], estimate: Estimate) -> str:
    value, interval = estimate
    return form(value) + (f" ({between(interval, form)})" if interval else "")


def _csv(table: PlanTable) -> str:
    """Return a table for programs, as in RFC 4180 but with plain line ends; what was measured has three columns."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*METHOD, *(name + end for name in table.measured for end in ("", " low", " high")), *SETTINGS])
    for row in table.rows:
        numbers = []
        for name in table.measured:
            value, interval = row.get(name, (None, None))
            numbers += [value, interval and interval.low, interval and interval.high]
        writer.writerow([*map(row.get, METHOD), *numbers, *map(row.get, SETTINGS)])
    return text.getvalue()
