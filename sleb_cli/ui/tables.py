"""Tables and lines that several commands share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from sleb_cli.tables.table import Table
from sleb_cli.ui.console import print_prose, stdout


def show_table(table: Table, *, title: bool = True) -> None:
    """Print a table with its title and notes, if it has rows."""
    console = stdout()
    if not table.rows:
        return
    if title:
        print_title(f"\n{table.title}")
    console.print(fitting(table, console.width))
    for note in table.notes:
        print_prose(console, f"[dim]{escape(note)}[/]")


def fitting(table: Table, width: int) -> RichTable:
    """Return a table for a screen: without lines if they do not fit, and then with fewer columns.

    Numbers are broken only where nothing else is left to leave out.
    """
    if _width(table, lines=True) <= width:
        return _drawn(table, lines=True)
    variants = list(table.variants())
    fits = next((variant for variant in variants if _width(variant, lines=False) <= width), None)
    return _drawn(fits or variants[-1], lines=False, fold=fits is None)


def _width(table: Table, *, lines: bool) -> int:
    """Return the width below which numbers and words would break."""
    count = len(table.columns)
    return sum(_least_widths(table)) + (3 * count + 1 if lines else 2 * count - 2)


def _least_widths(table: Table) -> list[int]:
    columns = zip(table.columns, *table.rows, strict=True)
    pieces = ((" ".join(cells).split() if table.is_words(n) else cells) for n, cells in enumerate(columns))
    return [max(map(cell_len, found), default=0) for found in pieces]


def _drawn(table: Table, *, lines: bool, fold: bool = False) -> RichTable:
    drawn = RichTable(
        box=box.HEAVY_HEAD if lines else box.SIMPLE_HEAD,
        show_edge=lines,
        pad_edge=lines,
        padding=(0, 1) if lines else (0, 1, 0, 0),
        header_style="bold",
    )
    for number, (column, least) in enumerate(zip(table.columns, _least_widths(table), strict=True)):
        is_words = table.is_words(number)
        drawn.add_column(
            Text(column),
            justify="left" if is_words else "right",
            no_wrap=not (is_words or fold),
            overflow="fold",
            min_width=None if fold else least,
        )
    # What several rows in a row are about stands in the first of them.
    repeated = [False, *(row[0] == before[0] for before, row in pairwise(table.rows))]
    for row, again, goes_on in zip(table.rows, repeated, [*repeated[1:], True], strict=True):
        cells = [Text("" if again and number == 0 else cell) for number, cell in enumerate(row)]
        drawn.add_row(*cells, end_section=any(repeated) and not goes_on)
    return drawn


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
