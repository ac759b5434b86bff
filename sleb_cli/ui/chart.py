"""Charts of values by step, drawn in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

ROWS = 7
# More would pull a few steps so far apart that they no longer look like a line.
_MAX_COLUMNS_PER_STEP = 10
_AXIS = " ┤"


@dataclass(frozen=True)
class Line:
    """A value for each of the steps 0, 1, 2, …; each is drawn as `mark`."""

    mark: str
    style: str
    values: Sequence[float]


def draw_lines(lines: Sequence[Line], labels: tuple[str, str, str], width: int) -> Text:
    """Draw lines above the step numbers, with `labels` for the lowest, middle and highest value.

    Where lines meet, the first is on top.
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
    return Text("\n").join([*rows, Text(" " * (margin + len(_AXIS)) + _step_numbers(columns))])


def _columns(steps: int, width: int) -> list[int]:
    last = min(width - 1, _MAX_COLUMNS_PER_STEP * (steps - 1))
    return [round(step * last / max(1, steps - 1)) for step in range(steps)]


def _cells(lines: Sequence[Line], columns: Sequence[int]) -> dict[tuple[int, int], tuple[str, str]]:
    """Return the character and style by row and column."""
    values = [value for line in lines for value in line.values]
    low, span = min(values), max(values) - min(values) or 1.0
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
    return cells | marks  # no dot of one line hides a mark of another


def _step_numbers(columns: Sequence[int]) -> str:
    """Number every 1st, 2nd, 5th, 10th, … step, as there is room."""
    room = len(str(len(columns) - 1)) + 1
    strides = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    stride = next(stride for stride in strides if stride >= len(columns) or columns[stride] >= room)
    row = ""
    for step in range(0, len(columns), stride):
        row = row.ljust(columns[step]) + str(step)
    return row
