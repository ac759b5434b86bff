"""One table, and how Markdown and plain text draw it; `ui/tables.py` and the report's page draw it, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb_cli.results import Interval

_LEAST_NAME = 20
"""Characters of the first column, below which optional columns are left out instead."""


Scored = tuple[Any, str, str, Any]
"""A result, what was measured and on which model, by their names, and the model's scores or times in the result."""

Columns = Sequence[tuple[str, Callable[[Any], str]]]
"""The name of each column, and how its values are written."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Attributes:
        words: the columns, besides the first, that hold words. All others hold numbers.
        optional: the columns to leave out where space is short, from the first to the last.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: Collection[str] = ()
    optional: Sequence[str] = ()

    def variants(self) -> Iterator[Table]:
        """Yield the table, and then the same without more and more of its optional columns."""
        for count in range(len(self.optional) + 1):
            left_out = self.optional[:count]
            yield self.only([number for number, column in enumerate(self.columns) if column not in left_out])

    def only(self, numbers: Sequence[int]) -> Table:
        """Return the table with these columns."""
        rows = [[row[number] for number in numbers] for row in self.rows]
        return replace(self, columns=[self.columns[number] for number in numbers], rows=rows)

    def is_words(self, number: int) -> bool:
        """Whether a column holds words."""
        return number == 0 or self.columns[number] in self.words


def tabulate(
    title: str, columns: Columns, rows: Iterable[Sequence[Any]], notes: Sequence[str] = (), optional: Sequence[str] = ()
) -> Table:
    """Return a table of values, each in the form of its column and None as nothing, without empty columns.

    Columns whose form is `str` hold words.
    """
    cells = [
        ["" if value is None else form(value) for (_, form), value in zip(columns, row, strict=True)] for row in rows
    ]
    words = {name for name, form in columns if form is str}
    table = Table(title, [name for name, _ in columns], cells, notes, words, optional)
    return table.only([number for number in range(len(columns)) if any(row[number] for row in cells)])


def model_name(removals: Sequence[int]) -> str:
    """Return what a row calls a model: dense, or -6 without 6 blocks."""
    return f"-{len(removals)}" if removals else "dense"


def by_model(results: Iterable[Any], names: Iterable[str]) -> list[Scored]:
    """Return what was measured of the dense and each pruned model, result by result, with the names of both."""
    return [
        (result, name, model_name(removals), scores)
        for result, name in zip(results, names, strict=True)
        for removals, scores in [((), result.dense), *((scores.removals, scores) for scores in result.pruned)]
    ]


def between(interval: Interval | None, form: Callable[[float], str]) -> str:
    """Return the ends of an interval in some format: 1.19 to 1.23."""
    return f"{form(interval.low)} to {form(interval.high)}" if interval else ""


def in_markdown(text: str) -> str:
    """Return a text on one line, so that Markdown shows it as it is, even in a table."""
    one_line = " ".join(text.split()).replace("`", "'")
    return re.sub(r"([\\*\[\]<>|])", r"\\\1", one_line)


def to_markdown(table: Table) -> list[str]:
    """Return the lines of a table in Markdown."""
    rule = ["---" if table.is_words(number) else "---:" for number in range(len(table.columns))]
    rows = [[in_markdown(cell) for cell in row] for row in (table.columns, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def to_text(table: Table, width: int) -> list[str]:
    """Return the lines of a table in plain text; where they are too long, names in the first column are wrapped."""
    for variant in table.variants():
        rows = [variant.columns, *variant.rows]
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        room = width - sum(others) - 2 * len(others)
        if room >= min(first, _LEAST_NAME):
            break
    first = min(first, max(8, room))
    lines, rest = list[str](), list[str]()
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or row[0] != before[0]:
            lines += rest
            rest = wrap(row[0], max(1, first))
        name = rest.pop(0) if rest else ""
        cells = [
            cell.ljust(size) if variant.is_words(number) else cell.rjust(size)
            for number, (cell, size) in enumerate(zip(row[1:], others, strict=True), start=1)
        ]
        lines.append("  ".join([name.ljust(first), *cells]).rstrip())
    return lines + rest
