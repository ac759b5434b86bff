"""What a screen of 80 or fewer columns shows: charts, block strips, tables, names."""

import io
import math
from itertools import pairwise

import pytest
from rich.console import Console

from sleb_cli.names import short_name
from sleb_cli.tables.search_results import block_strip
from sleb_cli.tables.table import Table, tabulate, to_markdown
from sleb_cli.ui.chart import ROWS, Curve, draw_lines
from sleb_cli.ui.tables import lay_out


def shown(renderable, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.file.getvalue().splitlines()


def chart(*lines, labels=("1", "2.5", "4"), width=80):
    return shown(
        draw_lines([Curve(mark, "", values) for mark, values in lines], labels, width), width + 40
    )


def test_a_chart_has_the_highest_value_on_top():
    rows = chart(("●", [1.0, 2.0, 4.0]))
    assert rows[0] == "  4 ┤                   ·●"
    assert rows[ROWS // 2].startswith("2.5 ┤")
    assert rows[4][15] == "●"  # the middle value stands a third of the way up
    assert rows[-1] == "     0         1         2"
    assert max(row.count("●") for row in chart(("●", [2.0] * 4))) == 4


@pytest.mark.parametrize("marks", ["●○", "○●"])
def test_where_lines_meet_the_first_is_on_top(marks):
    drawn = "".join(chart(*((mark, [1.0, 2.0, 3.0]) for mark in marks)))
    assert [drawn.count(mark) for mark in marks] == [3, 0]


@pytest.mark.parametrize("steps", [4, 30, 126])
@pytest.mark.parametrize("width", [40, 80])
def test_a_chart_is_as_wide_as_asked(steps, width):
    values = [math.log(step + 2) for step in range(steps)]
    rows = chart(("●", values), labels=("2.00", "60.00", "128.00"), width=width)
    assert max(map(len, rows)) <= width
    numbers = list(map(int, rows[-1].split()))
    assert numbers[0] == 0
    assert len({after - before for before, after in pairwise(numbers)}) == 1


def test_a_strip_of_many_blocks_takes_rows_and_kinds_have_marks():
    *rows, legend = block_strip(126, {3: "", 77: "", 125: ""}, 80)
    assert [row.strip() for row in rows[1::2]] == [
        "0         10        20        30        40        50        60",
        "70        80        90        100       110       120",
    ]
    marks = "".join(row.strip() for row in rows[::2])
    assert [block for block, mark in enumerate(marks) if mark == "·"] == [3, 77, 125]
    assert legend == "  █ kept   · removed"
    strip, _, legend = block_strip(
        6, {1: "full_attention", 2: "linear_attention", 5: "full_attention"}, 80
    )
    assert strip == "  █·○██·"
    assert legend == "  █ kept   · full_attention removed   ○ linear_attention removed"


WIDE = Table(
    "",
    ["block", "kind", "nll", "perplexity", "change", "held out", "change"],
    [["112", "linear_attention", "12.3456", "12345.67", "+1234.5%", "23456.78", "+2345.6%"]],
    words={"kind"},
)


@pytest.mark.parametrize("width", [100, 60])
def test_a_narrow_screen_folds_cells_and_loses_nothing(width):
    rows = shown(lay_out(WIDE, width), width)
    assert max(map(len, rows)) <= width
    cells = zip(*(line.split("│")[1:-1] for line in rows if line.startswith("│")), strict=True)
    assert ["".join(part.strip() for part in cell) for cell in cells] == WIDE.rows[0]


def test_a_screen_too_narrow_for_a_table_has_whole_numbers():
    rows = shown(lay_out(WIDE, 8), 8)
    assert [row for row in rows if row in WIDE.rows[0]] == [
        cell for cell in WIDE.rows[0] if len(cell) <= 8
    ]


def test_a_name_that_rows_share_stands_in_the_first():
    rows = [["a", 1, None], ["a", 2, None], ["b", 3, None]]
    table = tabulate("", [("x", str), ("y", "{}".format), ("empty", str)], rows)
    rows = [row for row in shown(lay_out(table, 80), 80) if row.startswith("│")]
    assert rows == ["│ a │ 1 │", "│   │ 2 │", "│ b │ 3 │"]


def test_markdown_shows_names_as_they_are():
    table = Table("", ["text", "perplexity"], [["a|b*[c]\n`d`", "1.5"]])
    assert to_markdown(table) == [
        "| text | perplexity |",
        "| --- | ---: |",
        r"| a\|b\*\[c\] 'd' | 1.5 |",
    ]


@pytest.mark.parametrize(
    ("sentence", "short"),
    [
        ("Loading /home/jane/My models/llama without 3 blocks", "Loading llama without 3 blocks"),
        ("Reading org/name:config:train:text", "Reading org/name:config:train:text"),
        ("From /a/b and ./c/d, not e/f", "From b and d, not e/f"),
    ],
)
def test_names_lose_their_folders(sentence, short):
    assert short_name(sentence) == short
