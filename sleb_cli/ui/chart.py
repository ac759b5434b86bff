"""Charts of values by step, drawn in text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

ROWS = 7
# More would pull a few steps so far apart that they no longer look like a line.
_MAX_COLUMNS_PER_STEP = 10
_AXIS = " ┤"


@dataclass(frozen=True)
class Curve:
    """A value for each of the steps 0, 1, 2, …; each is drawn as `mark`."""

    mark: str
    style: str
    values: Sequence[float]


def draw_lines(lines: Sequence[Curve], labels: tuple[str, str, str], width: int) -> Text:
    """Draw lines above the step numbers, with `labels` for the lowest, middle and highest value.

    Where lines meet, the first is on top.
    """
    margin = max(map(len, labels))
    steps = max(len(line.values) for line in lines)
    # The last number begins under the last step.
    columns = _columns(steps, width - margin - len(_AXIS) - len(str(steps - 1)) + 1)
    cells = _cells(lines, columns)
    lowest, middle, highest = labels
    at_rows = {0: highest, ROWS // 2: middle, ROWS - 1: lowest}
    chart = Text()
    for row in range(ROWS):
        text = Text(at_rows.get(row, "").rjust(margin))
        text.append(_AXIS if row in at_rows else " │")
        for column in range(columns[-1] + 1):
            character, style = cells.get((row, column), (" ", ""))
            text.append(character, style)
        text.rstrip()
        chart.append_text(text)
        chart.append("\n")
    chart.append(" " * (margin + len(_AXIS)) + _step_numbers(columns))
    return chart


def _columns(steps: int, width: int) -> list[int]:
    last = min(width - 1, _MAX_COLUMNS_PER_STEP * (steps - 1))
    return [round(step * last / max(1, steps - 1)) for step in range(steps)]


def _cells(
    lines: Sequence[Curve], columns: Sequence[int]
) -> dict[tuple[int, int], tuple[str, str]]:
    """Return the character and style by row and column."""
    values = [value for line in lines for value in line.values]
    low = min(values)
    span = max(values) - low or 1.0
    dots: dict[tuple[int, int], tuple[str, str]] = {}
    marks: dict[tuple[int, int], tuple[str, str]] = {}
    for line in reversed(lines):
        rows = [(ROWS - 1) * (1 - (value - low) / span) for value in line.values]
        points = list(zip(columns, rows, strict=False))
        for (left, start), (right, end) in pairwise(points):
            for column in range(left + 1, right):
                row = round(start + (end - start) * (column - left) / (right - left))
                dots[row, column] = ("·", line.style)
        for column, exact_row in points:
            marks[round(exact_row), column] = (line.mark, line.style)
    return {**dots, **marks}  # no dot of one line hides a mark of another


def _step_numbers(columns: Sequence[int]) -> str:
    """Number every 1st, 2nd, 5th, 10th, … step, as there is room."""
    room = len(str(len(columns) - 1)) + 1
    stride = 1
    while stride < len(columns) and columns[stride] < room:
        is_two = str(stride).startswith("2")
        stride = stride * 5 // 2 if is_two else stride * 2
    row = ""
    for step in range(0, len(columns), stride):
        row = row.ljust(columns[step]) + str(step)
    return row
