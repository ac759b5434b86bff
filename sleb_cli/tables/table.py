"""A table of text cells, for the screen, Markdown and the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb_cli.results import Interval

Scored = tuple[str, str, Any]
"""The name of a text, task or workload, the name of a model, and the scores or times."""

Columns = Sequence[tuple[str, Callable[[Any], str]]]
"""The name of each column, and the function that formats its values."""

PERPLEXITY = (
    "perplexity: how surprised a model is by the text; lower is better. dense: the original model."
)
"""The note of a table that may be the first to use both words."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; besides the first column, `words` hold words, not numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: Collection[str] = ()

    def is_words(self, number: int) -> bool:
        """Whether a column holds words."""
        return number == 0 or self.columns[number] in self.words


def tabulate(
    title: str, columns: Columns, rows: Iterable[Sequence[Any]], notes: Sequence[str] = ()
) -> Table:
    """Format values by column, None as an empty cell, and drop empty columns; those formatted by
    `str` hold words.
    """
    rows = list(rows)
    used = [
        number
        for number in range(len(columns))
        if any(row[number] not in (None, "") for row in rows)
    ]
    cells = [
        ["" if row[number] is None else columns[number][1](row[number]) for number in used]
        for row in rows
    ]
    words = {name for name, form in columns if form is str}
    return Table(title, [columns[number][0] for number in used], cells, notes, words)


def model_name(removals: Sequence[int], *, alone: bool = False) -> str:
    """Name a model in a row: dense, or -6 without 6 blocks."""
    # A model that was measured alone may well be pruned already, so "dense" could be wrong.
    return "" if alone else f"-{len(removals)}" if removals else "dense"


def by_model(results: Iterable[Any], names: Iterable[str]) -> list[Scored]:
    """Pair the scores in each result, dense and pruned, with the names of the result and the model."""
    results = list(results)
    dense = model_name((), alone=not any(result.pruned for result in results))
    return [
        (name, model_name(scores.removals) if scores is not result.dense else dense, scores)
        for result, name in zip(results, names, strict=True)
        for scores in (result.dense, *result.pruned)
    ]


def between(interval: Interval | None, form: Callable[[float], str]) -> str:
    """Write an interval: 1.19 to 1.23."""
    return f"{form(interval.low)} to {form(interval.high)}" if interval else ""


def in_markdown(text: str) -> str:
    """Put a text on one line and escape it for Markdown, even in a table."""
    one_line = " ".join(text.split()).replace("`", "'")
    return re.sub(r"([\\*\[\]<>|])", r"\\\1", one_line)


def to_markdown(table: Table) -> list[str]:
    """Return the lines of a Markdown table."""
    rule = ["---" if table.is_words(number) else "---:" for number in range(len(table.columns))]
    rows = [[in_markdown(cell) for cell in row] for row in (table.columns, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
