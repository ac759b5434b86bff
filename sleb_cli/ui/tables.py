"""Tables and lines that several commands share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from sleb_cli.tables.table import Table
from sleb_cli.ui.console import print_prose, stdout

_MIN_COLUMN_WIDTH = 6
"""The frame takes three of these characters."""


def show_table(table: Table, *, title: bool = True) -> None:
    """Print a table with its title and notes, if it has rows."""
    console = stdout()
    if not table.rows:
        return
    if title:
        print_title(f"\n{table.title}")
    console.print(lay_out(table, console.width))
    for note in table.notes:
        print_prose(console, f"[dim]{escape(note)}[/]")


def lay_out(table: Table, width: int) -> RichTable | Text:
    """Lay out a table for a screen of this width, on a very narrow one as a line for each cell."""
    if width < _MIN_COLUMN_WIDTH * len(table.columns):
        rows = (zip(table.columns, row, strict=True) for row in table.rows)
        return Text(
            "\n\n".join("\n".join(f"{name}: {cell}" for name, cell in row if cell) for row in rows)
        )
    rich = RichTable(header_style="bold")
    for number, column in enumerate(table.columns):
        rich.add_column(
            Text(column), justify="left" if table.is_words(number) else "right", overflow="fold"
        )
    # Consecutive rows about one text or task form a section, which names it once.
    repeated = [False, *(row[0] == before[0] for before, row in pairwise(table.rows))]
    for row, again, goes_on in zip(table.rows, repeated, [*repeated[1:], True], strict=True):
        cells = [Text("" if again and number == 0 else cell) for number, cell in enumerate(row)]
        rich.add_row(*cells, end_section=any(repeated) and not goes_on)
    return rich


def print_title(title: str) -> None:
    """Print a title in bold."""
    # Rich would wrap a table's own title to the width of the table.
    print_prose(stdout(), f"[bold]{escape(title)}[/]")


def print_line(text: str) -> None:
    """Print sentences on stdout without markup, wrapped between words on a terminal only."""
    print_prose(stdout(), escape(text))


def print_to_copy(text: str) -> None:
    """Print a line on stdout unwrapped, so that its paths and commands can be copied."""
    stdout().print(text, soft_wrap=True, markup=False)


def print_written(output: Path | None) -> None:
    """Print the path of the result file, if any."""
    if output is not None:
        print_to_copy(f"wrote {output}")
