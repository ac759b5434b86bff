"""Tables and lines that several commands share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sleb_cli.ui.console import stdout

if TYPE_CHECKING:
    from sleb_cli.results import ResultRecord


def new_table(*columns: str) -> Table:
    """Return a table whose first column is text and whose other columns are numbers."""
    table = Table(header_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def print_title(console: Console, title: str) -> None:
    """Print a title above a table, since Rich wraps table titles to the table's width."""
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)


def print_line(text: str) -> None:
    """Print a line on stdout, unwrapped and without markup."""
    stdout().print(text, soft_wrap=True, markup=False)


def print_written(output: Path | None) -> None:
    """Print the path of the result file, if any."""
    if output is not None:
        print_line(f"wrote {output}")


def spans(blocks: Collection[int]) -> str:
    """Return the blocks in order, with runs of three or more shortened: 3, 10-14."""
    parts: list[str] = []
    run: list[int] = []
    for block in [*sorted(blocks), None]:
        if run and block != run[-1] + 1:
            parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            run = []
        run += [] if block is None else [block]
    return ", ".join(parts)


def relative_change(before: float, after: float) -> str:
    """Return the relative change as a percentage, or an empty string if `before` is 0."""
    return f"{after / before - 1:+.1%}" if before else ""


def subject_title(result: ResultRecord) -> str:
    """Return the model's name and the removed blocks."""
    if not result.removals:
        return result.model.id
    return f"{result.model.id} without blocks {', '.join(map(str, result.removals))}"


def setting(result: ResultRecord) -> str:
    """Return the data type and the device."""
    return f"{result.dtype} on {result.device}"
