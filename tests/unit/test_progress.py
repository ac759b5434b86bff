"""The progress of a search, as the screen shows it."""

import io
import re

import pytest

from sleb_cli.events import (
    BlockRemoved,
    CandidateScored,
    LaterStepsForecast,
    Notice,
    RaceNarrowed,
    SearchAdvanced,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
)
from sleb_cli.ui import console, progress
from sleb_cli.ui.progress import _SearchProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def after(seconds, *events):
    """Let time pass before the first of these events."""
    return [(seconds, events[0]), *((0, event) for event in events[1:])]


REMOVED, FASTER = BlockRemoved(1, 7, 3.5, 30.0), LaterStepsForecast(0.5)
FIRST_STEP = [*after(10, SearchAdvanced(10), FASTER), *after(90, SearchAdvanced(90), REMOVED)]
# What a forecast says after the first step counts no more.
SECOND_STEP = [*FIRST_STEP, *after(5, SearchAdvanced(10), FASTER)]
RACED_STEP = after(10, SearchAdvanced(200), RaceNarrowed(1, 5, 300), RaceNarrowed(1, 2, 500), REMOVED)


@pytest.mark.parametrize(
    ("steps", "events", "remaining"),
    [
        ((280, 270), after(1, SearchAdvanced(10)) * 28, 27),
        ((100,) * 3, after(10, SearchAdvanced(10)), 290),
        ((100,) * 3, FIRST_STEP[:2], 90 + 100),
        ((100,) * 3, FIRST_STEP, None),
        ((100,) * 3, SECOND_STEP, 95),
        ((100,) * 3, [*SECOND_STEP, *after(45, SearchAdvanced(90), REMOVED)], 50),
        ((100,), [*after(0, SearchAdvanced(60, from_journal=True)), *after(10, SearchAdvanced(20))], 10),
        ((1000, 900), after(10, SearchAdvanced(100), RaceNarrowed(1, 5, 800)), 10 + 18),
        ((1000, 900), [*RACED_STEP, *after(10, SearchAdvanced(100), RaceNarrowed(2, 5, 700))], 8),
        ((1000, 900), [*RACED_STEP, *after(10, SearchAdvanced(100), RaceNarrowed(2, 5, 780))], 2),
        ((3,), after(1, *[SearchAdvanced(0.1)] * 30, REMOVED), None),
    ],
)
def test_the_remaining_time_is_at_the_pace_of_this_kind_of_step(clock, steps, events, remaining):
    search = _SearchProgress(SearchStarted(30, len(steps), 0, steps))
    for seconds, event in events:
        clock[0] += seconds
        search.update(event)
    assert search.remaining() == (remaining and pytest.approx(remaining))
    assert search.done <= search.expected
    assert search.steps_left == len(steps) - sum(event is REMOVED for _, event in events)


@pytest.mark.parametrize("width", [60, 120])
def test_names_stay_as_they_are_and_leave_room_for_numbers(clock, monkeypatch, width):
    monkeypatch.setattr(console.sys, "stderr", io.StringIO())
    shown = console.stderr()
    shown.width = width
    bars = progress._progress(shown)
    listen = progress._Listener(bars)
    name = "Loading /very/long/path/of/a-model-with-a-name-of-its-own-that-is-longer-than-any-screen-is-wide"
    listen(TaskStarted(name))
    listen(TaskFinished(name))
    listen(TaskStarted("Writing [b]", 98_362_432, "B"))
    listen(TaskAdvanced("Writing [b]", 40_000_000, "train:[c]"))
    listen(Notice("org/d:train:[e]"))
    listen(SearchStarted(32, 2, 0, (62_000, 60_000)))
    listen(SearchAdvanced(2500))
    listen(CandidateScored(1, 7, 3.123456))
    listen(RaceNarrowed(1, 5, 0))
    lines = shown.render_lines(bars.get_renderable(), pad=False)
    rows = ["".join(part.text for part in line).rstrip() for line in lines]
    assert max(map(len, rows)) <= width
    loading, writing, search, *notes = rows
    assert "/very" not in loading
    assert loading.endswith("0:00:00")
    assert "…" in loading
    assert re.search(r"Writing \[b\] +━.* 40.0/98.4 MB +0:00:00 --:--$", writing)
    assert re.search(r"Search .* 2500/122000 +0:00:00 00:00$", search)
    assert notes == ["  train:[c]", "  step 1 of 2, best so far: block 7 (3.1235), 5 still racing"]
    assert "org/d:train:[e]" in shown.file.getvalue()
