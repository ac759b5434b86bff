"""The progress of a search, as the screen shows it."""

import io
import re

import pytest

from sleb_cli.events import (
    HEAL_TASK,
    SCORING_TASK,
    SEARCH_TASK,
    HealChecked,
    Notice,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TasksAhead,
    TaskStarted,
)
from sleb_cli.ui import console, progress


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", io.StringIO())
    return console.stderr()


@pytest.mark.parametrize("width", [60, 120])
def test_names_stay_as_they_are_and_leave_room_for_numbers(shown, width):
    shown.width = width
    bars = progress._progress(shown)
    listen = progress._BarListener(bars)
    long = f"Loading /very/long/path/of/{'a-name-' * 14}"
    for event in (
        TasksAhead(("Writing", "Healing", "Proving")),
        TaskStarted(long),
        TaskFinished(long),
        TaskStarted("Writing [b]", 98_362_432, "B"),
        TaskAdvanced("Writing [b]", 40_000_000, "train:[c]"),
        Notice("org/d:train:[e]"),
        TaskStarted(SEARCH_TASK, 7, "blocks"),
        SearchStarted(32, 7, 2),
        TaskStarted(SCORING_TASK, 62_000, "evaluations"),
        TaskAdvanced(SCORING_TASK, 2500, "best so far: block 7 (3.1235)"),
    ):
        listen(event)
    lines = shown.render_lines(bars.get_renderable(), pad=False)
    rows = ["".join(part.text for part in line).rstrip() for line in lines]
    assert max(map(len, rows)) <= width
    patterns = (
        r"✓ Loading a-n.*….* 0:00:00 00:00",
        r". Writing \[b\] +━.* 40.0/98.4 MB +0:00:00 --:--",
        r". Search .* 2/7 +0:00:00 --:--",
        r". Scoring .* 2500/62000 +0:00:00 --:--",
        r"  train:\[c\]",
        r"  best so far: block 7 \(3.1235\)",
        r"  then: Healing, Proving",
    )
    for pattern, row in zip(patterns, rows, strict=True):
        assert re.fullmatch(pattern, row)
    listen(TaskFinished(SCORING_TASK))
    assert len(shown.render_lines(bars.get_renderable(), pad=False)) == 5
    assert "org/d:train:[e]" in shown.file.getvalue()


def test_the_bar_of_a_healing_names_what_it_measures(shown):
    bars = progress._progress(shown)
    listen = progress._BarListener(bars)
    listen(TaskStarted(HEAL_TASK, 100, "%"))
    listen(HealChecked(0.5, 0.25, 0.125, "distance from the dense model"))
    (task,) = bars.tasks
    assert task.fields["note"] == "distance from the dense model 0.250, on validation text 0.125"


def test_a_log_reports_the_time_left_less_and_less_often(monkeypatch, shown):
    listen = progress._LogListener(shown)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    listen(TaskStarted("Timing", 100, "runs"))
    listen(TaskAdvanced("Loading"))
    for second in range(1, 101):
        monkeypatch.setattr(progress.time, "monotonic", lambda second=second: second)
        listen(TaskAdvanced("Timing"))
    assert shown.file.getvalue().splitlines() == [
        "Timing …",
        "Timing: 20%, about 80 s left",
        "Timing: 40%, about 60 s left",
        "Timing: 80%, about 20 s left",
    ]


def test_the_time_left_is_told_once_a_few_percent_are_done(monkeypatch, shown):
    listen = progress._LogListener(shown)
    bars = progress._progress(shown)
    left = bars.columns[-1]
    show = progress._BarListener(bars)
    for second, done in ((0, 0), (10, 1), (25, 1), (50, 3)):
        monkeypatch.setattr(progress.time, "monotonic", lambda second=second: second)
        monkeypatch.setattr(bars, "get_time", lambda second=second: second)
        for hear in (listen, show):
            if not second:
                hear(TaskStarted("Timing", 100, "runs"))
            hear(TaskAdvanced("Timing", done))
        (task,) = bars.tasks
        assert left.render(task).plain == ("--:--" if task.completed < 5 else "13:12")
    assert shown.file.getvalue().splitlines() == [
        "Timing …",
        "Timing: 2.0%",
        "Timing: 5%, about 16 min left",
    ]


def test_a_log_reports_the_time_left_in_the_first_step_of_a_search(monkeypatch, shown):
    listen = progress._LogListener(shown)
    for step in (0.0, 40.0):
        monkeypatch.setattr(progress.time, "monotonic", lambda step=step: step)
        listen(TaskStarted(SCORING_TASK, 30, "evaluations"))
        monkeypatch.setattr(progress.time, "monotonic", lambda step=step: step + 30)
        listen(TaskAdvanced(SCORING_TASK, 10))
        listen(TaskAdvanced(SCORING_TASK, 20))
        listen(TaskFinished(SCORING_TASK))
    assert shown.file.getvalue().splitlines() == ["Scoring candidates: 33%, about 60 s left"]
