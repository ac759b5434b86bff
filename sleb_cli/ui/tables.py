"""Tables and lines that several commands share."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

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
        return Text("\n\n".join(_list_cells(table, row) for row in table.rows))
    rich = RichTable(header_style="bold")
    for number, column in enumerate(table.columns):
        justify: Literal["left", "right"] = "left" if table.is_words(number) else "right"
        rich.add_column(Text(column), justify=justify, overflow="fold")
    # Consecutive rows about one text or task form a section, which names it once.
    sections = [list(rows) for _, rows in groupby(table.rows, lambda row: row[0])]
    has_sections = len(sections) < len(table.rows)
    for rows in sections:
        for number, (name, *cells) in enumerate(rows):
            rich.add_row(Text(name if number == 0 else ""), *map(Text, cells))
        if has_sections:
            rich.add_section()
    return rich


def _list_cells(table: Table, row: Sequence[str]) -> str:
    named = zip(table.columns, row, strict=True)
    return "\n".join(f"{name}: {cell}" for name, cell in named if cell)


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
