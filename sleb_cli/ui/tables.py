"""Tables and lines that several commands share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

from sleb_cli.ui.console import print_prose, stdout
from sleb_cli.ui.names import short_name
from sleb_cli.units import spans as spans

if TYPE_CHECKING:
    from sleb_cli.results import ResultRecord


class FittingTable(Table):
    """A table whose cells are never broken: on a narrow screen it has no lines, and then fewer columns.

    `optional` columns are left out from the first to the last, until the rest fits.
    """

    optional: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the first variant that fits, or the narrowest with cells broken after all, so that nothing is lost."""
        variants = list(self._ever_narrower())
        fitting = next((table for table in variants if _least_width(console, table) <= options.max_width), None)
        if fitting is None:
            fitting = variants[-1]
            for column in fitting.columns:
                column.min_width, column.no_wrap, column.overflow = None, False, "fold"
        yield from Table.__rich_console__(fitting, console, options)

    def _ever_narrower(self) -> Iterator[Table]:
        yield self
        for count in range(len(self.optional) + 1):
            yield self._without(self.optional[:count])

    def _without(self, names: Collection[str]) -> Table:
        """Return a copy without these columns, and without lines between the others."""
        kept = [column for column in self.columns if column.header not in names]
        copy = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style=self.header_style
        )
        for column in kept:
            copy.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
        for row, cells in zip(self.rows, zip(*(column.cells for column in kept), strict=True), strict=True):
            copy.add_row(*cells, style=row.style, end_section=row.end_section)
        return copy


def _least_width(console: Console, table: Table) -> int:
    """Return the width below which cells would break, and keep Rich from making columns narrower than that."""
    for column in table.columns:
        column.min_width = _least_column_width(console, column)
    return Measurement.get(console, console.options.update(width=10_000), table).minimum


def _least_column_width(console: Console, column: Column) -> int:
    texts = [console.render_str(str(cell)).plain for cell in (column.header, *column.cells)]
    pieces = (text.splitlines() if column.no_wrap else text.split() for text in texts)
    return max((cell_len(piece) for found in pieces for piece in found), default=0)


def new_table(*columns: str, optional: tuple[str, ...] = ()) -> FittingTable:
    """Return a table whose first column is text, which may wrap, and whose other columns are numbers, which never do.

    On a narrow screen, `optional` columns are left out, from the first to the last.
    """
    table = FittingTable(header_style="bold")
    table.optional = optional
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_title(console: Console, title: str) -> None:
    """Print a title above a table, since Rich wraps table titles to the table's width."""
    print_prose(console, f"[bold]{escape(title)}[/]")


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


def relative_change(before: float, after: float) -> str:
    """Return the relative change as a percentage, or an empty string if `before` is 0."""
    return f"{after / before - 1:+.1%}" if before else ""


def subject_title(result: ResultRecord, removals: Collection[int]) -> str:
    """Return the model's name and the removed blocks."""
    name = short_name(result.model.id)
    return f"{name} without blocks {spans(removals)}" if removals else name


def setting(result: ResultRecord) -> str:
    """Return the data type and the device."""
    return f"{result.dtype} on {result.device}"
