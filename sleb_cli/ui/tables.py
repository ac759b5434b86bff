"""Tables and lines that several commands share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from sleb_cli.tables.table import Table
from sleb_cli.ui.console import print_prose, stdout

_NARROWEST_COLUMN = 6
"""Of which the frame takes three characters."""


def show_table(table: Table, *, title: bool = True) -> None:
    """Print a table with its title and notes, if it has rows."""
    console = stdout()
    if not table.rows:
        return
    if title:
        print_title(f"\n{table.title}")
    console.print(drawn(table, console.width))
    for note in table.notes:
        print_prose(console, f"[dim]{escape(note)}[/]")


def drawn(table: Table, width: int) -> RichTable | Text:
    """Return a table for a screen, on which Rich folds what is too wide; if hardly anything fits, lines instead."""
    if width < _NARROWEST_COLUMN * len(table.columns):
        rows = (zip(table.columns, row, strict=True) for row in table.rows)
        return Text("\n\n".join("\n".join(f"{name}: {cell}" for name, cell in row if cell) for row in rows))
    rich = RichTable(header_style="bold")
    for number, column in enumerate(table.columns):
        rich.add_column(Text(column), justify="left" if table.is_words(number) else "right", overflow="fold")
    # What several rows in a row are about stands in the first of them.
    repeated = [False, *(row[0] == before[0] for before, row in pairwise(table.rows))]
    for row, again, goes_on in zip(table.rows, repeated, [*repeated[1:], True], strict=True):
        cells = [Text("" if again and number == 0 else cell) for number, cell in enumerate(row)]
        rich.add_row(*cells, end_section=any(repeated) and not goes_on)
    return rich


def print_title(title: str) -> None:
    """Print a title above a table, since Rich wraps table titles to the table's width."""
    print_prose(stdout(), f"[bold]{escape(title)}[/]")


def print_line(text: str) -> None:
    """Print sentences on stdout without markup; a terminal, but no file, gets them wrapped between words."""
    print_prose(stdout(), escape(text))


def print_to_copy(text: str) -> None:
    """Print a line with paths or commands on stdout, unwrapped, so that they can be copied."""
    stdout().print(text, soft_wrap=True, markup=False)


def print_written(output: Path | None) -> None:
    """Print the path of the result file, if any."""
    if output is not None:
        print_to_copy(f"wrote {output}")
