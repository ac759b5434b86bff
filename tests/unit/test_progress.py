"""The progress of a search, as the screen shows it."""

import io
import re

import pytest

from sleb_cli.events import (
    SCORING_TASK,
    Notice,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
)
from sleb_cli.ui import console, progress


@pytest.mark.parametrize("width", [60, 120])
def test_names_stay_as_they_are_and_leave_room_for_numbers(monkeypatch, width):
    monkeypatch.setattr(console.sys, "stderr", io.StringIO())
    shown = console.stderr()
    shown.width = width
    bars = progress._progress(shown)
    listen = progress._BarListener(bars)
    name = "Loading /very/long/path/of/a-model-with-a-name-of-its-own-that-is-longer-than-any-screen-is-wide"
    listen(TaskStarted(name))
    listen(TaskFinished(name))
    listen(TaskStarted("Writing [b]", 98_362_432, "B"))
    listen(TaskAdvanced("Writing [b]", 40_000_000, "train:[c]"))
    listen(Notice("org/d:train:[e]"))
    listen(SearchStarted(32, 7, 2))
    listen(TaskStarted(SCORING_TASK, 62_000, "evaluations"))
    listen(TaskAdvanced(SCORING_TASK, 2500, "best so far: block 7 (3.1235)"))
    lines = shown.render_lines(bars.get_renderable(), pad=False)
    rows = ["".join(part.text for part in line).rstrip() for line in lines]
    assert max(map(len, rows)) <= width
    loading, writing, search, scoring, *notes = rows
    assert "/very" not in loading
    assert loading.endswith("0:00:00 00:00")
    assert "…" in loading
    assert re.search(r"Writing \[b\] +━.* 40.0/98.4 MB +0:00:00 --:--$", writing)
    assert re.search(r"Search .* 2/7 +0:00:00 --:--$", search)
    assert re.search(r"Scoring .* 2500/62000 +0:00:00 --:--$", scoring)
    assert notes == ["  train:[c]", "  best so far: block 7 (3.1235)"]
    listen(TaskFinished(SCORING_TASK))
    assert len(shown.render_lines(bars.get_renderable(), pad=False)) == 4
    assert "org/d:train:[e]" in shown.file.getvalue()


def test_a_log_reports_the_time_left_less_and_less_often(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", io.StringIO())
    shown, now = console.stderr(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    listen = progress._LogListener(shown)
    listen(TaskStarted("Timing", 100, "runs"))
    listen(TaskAdvanced("Loading"))
    for now[0] in range(1, 101):
        listen(TaskAdvanced("Timing"))
    assert shown.file.getvalue().splitlines() == [
        "Timing …", "Timing: 20%, about 80 s left", "Timing: 40%, about 60 s left", "Timing: 80%, "
                                                                                    "about 20 s "
                                                                                    "left",
    ]  # fmt: skip
