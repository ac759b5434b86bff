"""Turn the engine's events into Rich bars on a terminal, or into plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sleb_cli.events import (
    BlockRemoved,
    BlocksSwapped,
    CandidateScored,
    CheckPassed,
    Event,
    HealChecked,
    LaterStepsForecast,
    Notice,
    Notify,
    RaceNarrowed,
    SearchAdvanced,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
)
from sleb_cli.ui.console import stderr


@contextmanager
def show_progress(*, quiet: bool, first: str) -> Iterator[Notify]:
    """Give a listener for the engine's events: silent, bars, or log lines, as fits the stream.

    `first` is on screen at once, while the libraries are imported and before any event has come.
    """
    console = stderr()
    if quiet:
        yield lambda event: None
    elif console.is_terminal:
        with _progress(console) as progress:
            yield _Bars(progress, first)
    else:
        yield _Log(console)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Done(),
        TimeElapsedColumn(),
        _Remaining(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class _Done(ProgressColumn):
    """How much of the task is done, in its own unit."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.fields["unit"]:
            return Text("")
        if task.fields["unit"] == "B":
            return Text(f"{task.completed / 1e6:.0f}/{task.total / 1e6:.0f} MB")
        return Text(f"{task.completed:.0f}/{task.total:.0f}")


class _Remaining(TimeRemainingColumn):
    """The time to come, as a task forecasts it itself, or else from its last seconds."""

    def render(self, task: Task) -> Text:
        forecast: Callable[[], float | None] | None = task.fields["forecast"]
        seconds = forecast() if forecast is not None and not task.finished else None
        if seconds is None:
            return super().render(task)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours:d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}", "cyan")


class _Standing:
    """How a search stands: what is done and still expected, in evaluations of one candidate on one sequence."""

    def __init__(self, search: SearchStarted) -> None:
        self._search = search
        self._number = search.done + 1
        self._steps = [float(evaluations) for evaluations in search.evaluations]
        self._best: dict[int, float] = {}
        self._racing: int | None = None
        # Of the steps before, of the one that runs, and of the stretch from which the pace is taken.
        self._before = self._here = self._measured = 0.0
        self._since = time.monotonic()
        self._share = 1.0

    @property
    def steps_left(self) -> int:
        """How many steps are not decided."""
        return len(self._steps)

    @property
    def done(self) -> float:
        """Evaluations done."""
        return self._before + self._here

    @property
    def expected(self) -> float:
        """Evaluations done and to come."""
        return self._before + sum(self._steps)

    def advanced(self, evaluations: float, *, found: bool) -> None:
        """More is done; what a journal had says nothing about the pace."""
        self._here += evaluations
        self._measured += 0 if found else evaluations

    def removed(self) -> None:
        """A step is decided, and the next one begins; the first one's pace is not that of the others."""
        if self._number == self._search.done + 1:
            self._measured, self._since, self._share = 0.0, time.monotonic(), 1.0
        self._before += self._steps.pop(0)
        self._here = 0.0
        self._number += 1
        self._best.clear()
        self._racing = None

    def scored(self, block: int, score: float) -> None:
        """A candidate's score so far."""
        self._best[block] = score

    def forecast(self, share: float) -> None:
        """What an evaluation will take in the steps after the first."""
        if self._number == self._search.done + 1:
            self._share = share

    def narrowed(self, contenders: int, spared: int) -> None:
        """Expect of the steps to come what this one is expected to take."""
        self._racing = contenders
        scale = 1 - spared / self._steps[0]
        self._steps = [self._steps[0] - spared, *(step * scale for step in self._steps[1:])]

    def remaining(self) -> float | None:
        """Give the seconds that are still to come, at the pace so far."""
        if not self._measured or not self._steps:
            return None
        pace = (time.monotonic() - self._since) / self._measured
        here, *later = self._steps
        return pace * (max(0.0, here - self._here) + sum(later) * self._share)

    def note(self) -> str:
        """Say it in a few words."""
        best = min(self._best, key=lambda block: self._best[block])
        racing = f", {self._racing} still racing" if self._racing else ""
        return (
            f"step {self._number} of {self._search.remove}, best so far: block {best} ({self._best[best]:.4f}){racing}"
        )


class _Bars:
    """One bar a task; one bar for the whole search."""

    def __init__(self, progress: Progress, first: str) -> None:
        self._progress = progress
        self._first: TaskID | None = progress.add_task(first, total=None, unit="", note="", forecast=None)
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int | None] = {}
        self._notes: dict[str, str] = {}
        self._standing: _Standing | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self._progress.console.print(escape(text), soft_wrap=True)
            case CheckPassed(text):
                self._progress.console.print(f"[green]✓[/] {escape(text)}", soft_wrap=True)
            case TaskStarted(task, total, unit):
                self._add(task, total, unit)
            case TaskAdvanced(task, done, note):
                self._progress.update(self._tasks[task], advance=done, note=escape(note) or self._notes.get(task, ""))
            case TaskFinished(task):
                self._finish(task)
            case HealChecked(_, divergence, held_out):
                note = f"KL {divergence:.3f}, held out {held_out:.3f}"
                self._notes["Healing"] = note
                self._progress.update(self._tasks["Healing"], note=note)
            case SearchStarted():
                self._standing = _Standing(event)
                self._add("Search", sum(event.evaluations), "evaluations", forecast=self._standing.remaining)
            case _ if self._standing is not None:
                self._search(event, self._standing)

    def _search(self, event: Event, standing: _Standing) -> None:
        match event:
            case SearchAdvanced(evaluations, found):
                standing.advanced(evaluations, found=found)
            case LaterStepsForecast(share):
                standing.forecast(share)
            case CandidateScored(_, block, score):
                standing.scored(block, score)
                self._progress.update(self._tasks["Search"], note=standing.note())
            case RaceNarrowed(_, contenders, spared):
                standing.narrowed(contenders, spared)
                self._progress.update(self._tasks["Search"], note=standing.note())
            case BlocksSwapped():
                self._progress.console.print(_swap_line(event), soft_wrap=True)
            case BlockRemoved():
                standing.removed()
        self._progress.update(self._tasks["Search"], completed=standing.done, total=standing.expected)
        if not standing.steps_left:
            self._finish("Search")

    def _add(self, task: str, total: int | None, unit: str, forecast: Callable[[], float | None] | None = None) -> None:
        if self._first is not None:  # the work itself is on screen from here on
            self._progress.remove_task(self._first)
            self._first = None
        self._totals[task] = total
        self._tasks[task] = self._progress.add_task(escape(task), total=total, unit=unit, note="", forecast=forecast)

    def _finish(self, task: str) -> None:
        total = self._totals[task] or 1
        self._progress.update(self._tasks[task], total=total, completed=total, note="")


def _swap_line(event: BlocksSwapped) -> str:
    back, gone = (", ".join(map(str, blocks)) for blocks in (event.restored, event.removed))
    return f"exchanged: {back} stays, {gone} goes; score {event.before:.4f} -> {event.after:.4f}"


class _Log:
    """A line where something began or was decided; nothing that overwrites itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._remove = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self._line(text)
            case CheckPassed(text):
                self._line(f"proven: {text}")
            case TaskStarted(task):
                self._line(f"{task} …")
            case HealChecked(share, divergence, held_out):
                self._line(f"healing, {share:.0%}: KL to the dense model {divergence:.4f}, held out {held_out:.4f}")
            case SearchStarted(blocks, remove, done, evaluations):
                self._remove, count = remove, sum(evaluations)
                after = f", {done} of them gone already" if done else ""
                self._line(f"Search: {remove} of {blocks} blocks{after}, {count} candidate x sequence evaluations …")
            case BlocksSwapped():
                self._line(_swap_line(event))
            case BlockRemoved(step, block, score, perplexity, removals):
                what = f"block {block}" if removals is None else f"blocks {', '.join(map(str, removals))}"
                self._line(
                    f"step {step} of {self._remove}: {what} removed, score {score:.4f}, perplexity {perplexity:.2f}"
                )

    def _line(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)
