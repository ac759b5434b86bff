"""The progress of a search, as the screen shows it."""

import io
import re

import pytest
from rich.console import Console

from sleb_cli.events import (
    CandidateScored,
    Notice,
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


def search_progress(*evaluations, done=0):
    return _SearchProgress(SearchStarted(30, done + len(evaluations), done, evaluations))


def advance(search, clock, seconds, evaluations):
    clock[0] += seconds
    search.advanced(evaluations, from_journal=False)


def test_at_an_even_pace_the_remaining_time_is_right_at_once(clock):
    search = search_progress(280, 270)
    for _ in range(28):
        advance(search, clock, 1, 10)
    assert search.remaining() == pytest.approx(27)
    assert (search.done, search.expected) == (280, 550)


def test_the_pace_is_that_of_the_kind_of_step(clock):
    search = search_progress(100, 100, 100)
    advance(search, clock, 10, 10)
    assert search.remaining() == pytest.approx(290)
    search.forecast(0.5)  # of later steps, which are known to be faster
    assert search.remaining() == pytest.approx(90 + 100)
    advance(search, clock, 90, 90)
    search.removed()
    assert search.remaining() is None
    advance(search, clock, 5, 10)
    search.forecast(0.5)  # says nothing after the first step
    assert search.remaining() == pytest.approx(95)
    advance(search, clock, 45, 90)
    search.removed()
    assert search.remaining() == pytest.approx(50)


def test_what_a_journal_had_says_nothing_about_the_pace(clock):
    search = search_progress(100)
    search.advanced(60, from_journal=True)
    assert search.remaining() is None
    advance(search, clock, 10, 20)
    assert search.remaining() == pytest.approx(10)


def test_a_race_that_narrows_makes_all_steps_shorter(clock):
    search = search_progress(1000, 900)
    advance(search, clock, 10, 100)
    search.scored(7, 3.5)
    search.narrowed(5, 800)
    assert search.expected == pytest.approx(200 + 180)
    assert search.remaining() == pytest.approx(28)
    assert search.note() == "step 1 of 2, best so far: block 7 (3.5000), 5 still racing"
    search.removed()
    assert search.done == 200


def test_at_the_end_nothing_is_left(clock):
    search = search_progress(3, done=2)
    for _ in range(30):  # whatever the parts add up to
        search.advanced(0.1, from_journal=False)
    search.removed()
    assert search.steps_left == 0
    assert search.done == search.expected == 3
    assert search.remaining() is None


def test_names_are_shown_as_they_are(monkeypatch):
    monkeypatch.setattr(console.sys, "stderr", io.StringIO())
    shown = console.stderr()
    bars = progress._progress(shown)
    listen = progress._Listener(bars)
    listen(TaskStarted("Reading org/a:train:[b]"))
    listen(TaskAdvanced("Reading org/a:train:[b]", note="x:train:[c]"))
    listen(Notice("org/d:train:[e]"))
    shown.print(bars.get_renderable(), width=200)
    for text in ("Reading org/a:train:[b]", "x:train:[c]", "org/d:train:[e]"):
        assert text in shown.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_long_paths_and_notes_leave_room_for_counts_and_times(clock, width):
    shown = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bars = progress._progress(shown)
    listen = progress._Listener(bars)
    name = "a-model-with-a-name-of-its-own-that-is-longer-than-any-screen-is-wide"
    listen(TaskStarted(f"Loading /very/long/path/of/{name}"))
    listen(TaskFinished(f"Loading /very/long/path/of/{name}"))
    listen(TaskStarted("Writing weights", 98_362_432, "B"))
    listen(TaskAdvanced("Writing weights", 40_000_000))
    listen(SearchStarted(32, 2, 0, (62_000, 60_000)))
    listen(SearchAdvanced(2500))
    listen(CandidateScored(1, 21, 3.123456))
    rows = _lines(shown, bars)
    assert max(map(len, rows)) <= width
    loading, writing, search, note = rows
    assert "/very" not in loading
    assert loading.endswith("0:00:00")
    assert "…" in loading
    assert re.search(r"Writing weights +━.* 40.0/98.4 MB +0:00:00 --:--$", writing)
    assert re.search(r"Search .* 2500/122000 +0:00:00 00:00$", search)
    assert note == "  step 1 of 2, best so far: block 21 (3.1235)"


def _lines(console, bars):
    return [
        "".join(part.text for part in row).rstrip() for row in console.render_lines(bars.get_renderable(), pad=False)
    ]
