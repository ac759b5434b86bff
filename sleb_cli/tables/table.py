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

Column = tuple[str, Callable[[Any], str]]
"""The name of a column, and the function that formats its values; that of words is `str`."""

PERPLEXITY = "perplexity: how surprised a model is by the text; lower is better."
DENSE = "dense: the original model."
"""The notes of a table that may be the first to use these words."""

WORKLOADS = (
    "prompt 1x512: one prompt of 512 tokens; generation 4x64+32: four at once, 32 new tokens."
)
"""The note of a table that may be the first to name a workload."""


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
    title: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]], notes: Sequence[str] = ()
) -> Table:
    """Format values by column, None as an empty cell, and drop empty columns."""
    names = []
    filled = []
    rows = list(rows)
    for number, (name, form) in enumerate(columns):
        values = [row[number] for row in rows]
        if any(value not in (None, "") for value in values):
            names.append(name)
            filled.append(["" if value is None else form(value) for value in values])
    words = [name for name, form in columns if form is str]
    return Table(title, names, list(zip(*filled, strict=True)), notes, words)


def model_name(removals: Sequence[int], *, alone: bool = False) -> str:
    """Name a model in a row: dense, or without 6."""
    if alone:
        return ""  # it may well be pruned already, so "dense" could be wrong
    return f"without {len(removals)}" if removals else "dense"


def by_model(results: Iterable[Any], names: Iterable[str], other: str = "") -> list[Scored]:
    """Pair the scores in each result with the names of the result and of the model.

    `other` is the name of a model that is compared with the dense one.
    """
    results = list(results)
    dense = model_name((), alone=not any(result.pruned for result in results))
    scored = []
    for result, name in zip(results, names, strict=True):
        scored.append((name, dense, result.dense))
        for scores in result.pruned:
            scored.append((name, other or model_name(scores.removals), scores))
    return scored


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
    lines = [_markdown_row(table.columns), f"| {' | '.join(rule)} |"]
    for row in table.rows:
        lines.append(_markdown_row(row))
    return lines


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(in_markdown, cells))} |"
