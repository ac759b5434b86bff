"""Show the engine's events: as bars on a terminal, as plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from sleb_cli.events import (
    HEAL_TASK,
    SCORING_TASK,
    SEARCH_TASK,
    BlockRemoved,
    BlocksSwapped,
    Event,
    HealChecked,
    Notice,
    Notify,
    SearchStarted,
    TaskAdvanced,
    TaskFinished,
    TasksAhead,
    TaskStarted,
    Warned,
)
from sleb_cli.names import elide, short_name
from sleb_cli.ui.console import print_prose, print_warning, stderr
from sleb_cli.units import format_seconds

_STARTING = "Starting"
FIRST_ESTIMATE_SECONDS = 20.0
"""When a log first says how far a task is."""
FIRST_ESTIMATE_SHARE = 0.05
"""How much of a task is done before the time left is told: the first units take longer."""


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Notify]:
    """Yield a listener for the engine's events: silent, bars on a terminal, or log lines."""
    console = stderr()
    if quiet:
        yield _only_warnings
    elif console.is_terminal:
        with _progress(console) as progress:
            yield _BarListener(progress)
    else:
        yield _LogListener(console)


def _only_warnings(event: Event) -> None:
    if isinstance(event, Warned):
        print_warning(event.text)


def _progress(console: Console) -> _Bars:
    return _Bars(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(_bar_width(console.width), table_column=Column(no_wrap=True)),
        _Done(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        _Left(compact=True, table_column=Column(no_wrap=True)),
        console=console,
    )


def _bar_width(width: int) -> int:
    return max(4, min(24, (width - 40) // 5))


class _Bars(Progress):
    ahead: tuple[str, ...] = ()
    """The tasks that have not started yet."""

    def get_renderables(self) -> Iterator[RenderableType]:
        # In a column, a note would take the room of counts and times.
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")
        if self.ahead:
            yield Text(f"  then: {', '.join(self.ahead)}", style="dim", overflow="ellipsis")


class _Done(DownloadColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if task.total is None or not unit:
            return Text("")
        if unit == "B":
            return super().render(task)
        return MofNCompleteColumn().render(task)


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        if task.total and task.completed < FIRST_ESTIMATE_SHARE * task.total:
            return Text("--:--", style="progress.remaining")
        return super().render(task)


class _BarListener:
    def __init__(self, progress: _Bars) -> None:
        self._progress = progress
        # Shown while the libraries are imported, until the first real task starts.
        self._tasks = {_STARTING: progress.add_task(_STARTING, total=None, unit="", note="")}
        self._totals: dict[str, int | None] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case TasksAhead(tasks):
                self._progress.ahead = tasks
            case TaskStarted(task, total, unit):
                self._add(task, total, unit)
            case TaskAdvanced(task, done, note):
                self._progress.update(self._tasks[task], advance=done)
                if note:
                    self._progress.update(self._tasks[task], note=note)
            case TaskFinished(task) if task == SCORING_TASK:
                # It ends once a step; the bar of the search stays.
                self._progress.remove_task(self._tasks.pop(task))
            case TaskFinished(task):
                total = self._totals[task] or 1
                self._progress.update(self._tasks[task], total=total, completed=total, note="")
            case HealChecked(_, divergence, validation, measure):
                note = f"{measure} {divergence:.3f}, on validation text {validation:.3f}"
                self._progress.update(self._tasks[HEAL_TASK], note=note)
            case SearchStarted(_, _, done):
                self._progress.update(self._tasks[SEARCH_TASK], completed=done)
            case BlockRemoved(step):
                self._progress.update(self._tasks[SEARCH_TASK], completed=step)
            case _:
                _print_sentence(event, self._progress.console)

    def _add(self, task: str, total: int | None, unit: str) -> None:
        if _STARTING in self._tasks:
            self._progress.remove_task(self._tasks.pop(_STARTING))
        for number, ahead in enumerate(self._progress.ahead, start=1):
            if task.startswith(ahead):
                self._progress.ahead = self._progress.ahead[number:]
                break
        self._totals[task] = total
        width = self._progress.console.width
        # The spinner, "123456/1234567", two durations, and the space between six columns.
        others = 1 + 14 + 2 * 7 + 5
        description = elide(short_name(task), max(8, width - _bar_width(width) - others))
        self._tasks[task] = self._progress.add_task(description, total=total, unit=unit, note="")


def _removal(step: BlockRemoved) -> str:
    removed = f"block {step.block}"
    if step.removals is not None:
        removed = f"blocks {_list(step.removals)}"
    scores = f"score {step.score:.4f}"
    if step.perplexity is not None:
        scores += f", perplexity {step.perplexity:.2f}"
    return f"{removed} removed, {scores}"


def _print_sentence(event: Event, console: Console) -> None:
    match event:
        case Notice(text):
            print_prose(console, escape(text))
        case TasksAhead(tasks):
            print_prose(console, f"In turn: {', '.join(tasks)}.")
        case Warned(text):
            print_warning(text, console)
        case BlocksSwapped(restored, removed, before, after):
            blocks = f"{_list(restored)} restored, {_list(removed)} removed"
            print_prose(console, f"swapped: {blocks}; score {before:.4f} -> {after:.4f}")


def _list(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks))


@dataclass
class _Pace:
    """The progress of a task in a log; times are in seconds."""

    total: int
    started: float
    done: float = 0.0
    next_estimate: float = FIRST_ESTIMATE_SECONDS

    def advance(self, done: float) -> str | None:
        """Add finished units; if it is due, say how much is done and how long the rest takes."""
        self.done += done
        seconds = time.monotonic() - self.started
        if seconds < self.next_estimate or not 0 < self.done < self.total:
            return None
        # Ever farther apart, so that the log of a day's work stays short.
        self.next_estimate = 2 * seconds
        share = self.done / self.total
        if share < FIRST_ESTIMATE_SHARE:
            return f"{share:.1%}"
        left = format_seconds(seconds * (1 / share - 1))
        return f"{share:.0%}, about {left} left"


class _LogListener:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._remove = 0
        self._paces: dict[str, _Pace] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case TaskStarted(task, total):
                self._start(task, total)
                if task in (SEARCH_TASK, SCORING_TASK):  # which other lines tell of
                    return
                text = f"{task} …"
            case TaskAdvanced(task, done):
                if task not in self._paces:
                    return
                estimate = self._paces[task].advance(done)
                if estimate is None:
                    return
                text = f"{task}: {estimate}"
            case HealChecked(share, divergence, validation, measure):
                distance = f"{measure} {divergence:.4f}, on validation text {validation:.4f}"
                text = f"healing, {share:.0%}: {distance}"
            case SearchStarted(blocks, remove, done):
                self._remove = remove
                text = f"Search: {remove} of {blocks} blocks"
                if done:
                    text += f", {done} of them already removed"
                text += " …"
            case BlockRemoved(step):
                text = f"step {step} of {self._remove}: {_removal(event)}"
            case _:
                _print_sentence(event, self._console)
                return
        print_prose(self._console, escape(text))

    def _start(self, task: str, total: int | None) -> None:
        # Of a search, the first step is enough: it is the longest.
        is_later_step = task == SCORING_TASK and task in self._paces
        if total and task != HEAL_TASK and not is_later_step:
            self._paces[task] = _Pace(total, time.monotonic())
