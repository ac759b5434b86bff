"""Draw values by step as lines of text, which look the same in a log and in a terminal without colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

ROWS = 7
# Wide enough for a few steps to look like a line, and no wider.
_MOST_COLUMNS_A_STEP = 10
_AXIS = " ┤"


@dataclass(frozen=True)
class Line:
    """A value for each of the steps 0, 1, 2, …; each is drawn as `mark`."""

    mark: str
    style: str
    values: Sequence[float]


def draw_lines(lines: Sequence[Line], labels: tuple[str, str, str], width: int) -> Text:
    """Draw lines over the numbers of the steps; where they meet, the first is on top.

    `labels` are those of the lowest value, the middle and the highest one.
    """
    margin = max(map(len, labels))
    steps = max(len(line.values) for line in lines)
    # The last number begins under the last step.
    columns = _columns(steps, width - margin - len(_AXIS) - len(str(steps - 1)) + 1)
    cells = _cells(lines, columns)
    at_rows = dict(zip((ROWS - 1, ROWS // 2, 0), labels, strict=True))
    rows = []
    for row in range(ROWS):
        text = Text(at_rows.get(row, "").rjust(margin) + (_AXIS if row in at_rows else " │"))
        for column in range(columns[-1] + 1):
            text.append(*cells.get((row, column), (" ", "")))
        text.rstrip()
        rows.append(text)
    return Text("\n").join([*rows, Text(" " * (margin + len(_AXIS)) + _numbers(columns))])


def _columns(steps: int, width: int) -> list[int]:
    """Return the column of each step."""
    last = min(width - 1, _MOST_COLUMNS_A_STEP * (steps - 1))
    return [round(step * last / max(1, steps - 1)) for step in range(steps)]


def _cells(lines: Sequence[Line], columns: Sequence[int]) -> dict[tuple[int, int], tuple[str, str]]:
    """Return what to draw where, and its style: a mark for each value, and dots from one to the next."""
    known = [value for line in lines for value in line.values]
    low, span = min(known), max(known) - min(known) or 1.0
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    marks: dict[tuple[int, int], tuple[str, str]] = {}
    for line in reversed(lines):
        rows = ((ROWS - 1) * (1 - (value - low) / span) for value in line.values)
        points = list(zip(columns, rows, strict=False))
        for (left, start), (right, end) in pairwise(points):
            for column in range(left + 1, right):
                row = round(start + (end - start) * (column - left) / (right - left))
                cells[row, column] = ("·", line.style)
        marks |= {(round(row), column): (line.mark, line.style) for column, row in points}
    return cells | marks


def _numbers(columns: Sequence[int]) -> str:
    """Return the numbers of the steps, every 1, 2, 5, 10, … of them, as there is room."""
    room = len(str(len(columns) - 1)) + 1
    strides = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    stride = next(stride for stride in strides if stride >= len(columns) or columns[stride] >= room)
    row = ""
    for step in range(0, len(columns), stride):
        row = row.ljust(columns[step]) + str(step)
    return row
