"""Turn the engine's events into Rich bars on a terminal, or into plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from sleb_cli.events import (
    HEAL_TASK,
    SEARCH_TASK,
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
    Warned,
)
from sleb_cli.ui.console import print_prose, print_warning, stderr
from sleb_cli.ui.names import elide, short_name


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Notify]:
    """Yield a listener for the engine's events: silent, bars on a terminal, or log lines elsewhere."""
    console = stderr()
    if quiet:
        yield _only_warnings
    elif console.is_terminal:
        with _progress(console) as progress:
            yield _Listener(progress)
    else:
        yield _Log(console)


def _only_warnings(event: Event) -> None:
    if isinstance(event, Warned):
        print_warning(event.text)


def _progress(console: Console) -> Progress:
    return _Bars(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(_bar_width(console), table_column=Column(no_wrap=True)),
        _Done(),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        _Remaining(compact=True, table_column=Column(no_wrap=True)),
        console=console,
    )


class _Bars(Progress):
    """A bar for each task, and below them the intermediate results, which would take the room of counts and times."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bars, and a line for each running task that has a note."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


def _bar_width(console: Console) -> int:
    return max(4, min(24, (console.width - 40) // 5))


def _description(task: str, console: Console) -> str:
    """Return what a task does, with the names of files alone, in the width that the other columns leave."""
    others = 1 + 14 + 2 * 7 + 5  # the spinner, "123456/1234567", two durations, and the space between six columns
    return elide(short_name(task), max(8, console.width - _bar_width(console) - others))


class _Done(ProgressColumn):
    """The progress of a task: bytes or a count."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))
        self._bytes, self._count = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        """Render the column that fits the task's unit."""
        if task.total is None or not task.fields["unit"]:
            return Text("")
        return (self._bytes if task.fields["unit"] == "B" else self._count).render(task)


class _Remaining(TimeRemainingColumn):
    """The remaining time: the task's own forecast, or an estimate from its recent speed."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text("")
        forecast: Callable[[], float | None] | None = task.fields["forecast"]
        seconds = forecast() if forecast is not None else None
        if seconds is None:
            return super().render(task)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours:d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}", "cyan")


class _SearchProgress:
    """The progress of a search, in evaluations of one candidate on one sequence."""

    def __init__(self, search: SearchStarted) -> None:
        self._search = search
        self._number = search.done + 1
        self._steps = [*search.evaluations]
        self._leader: tuple[int, float] | None = None
        self._racing: int | None = None
        # The part of a step that candidates which dropped out leave, and what they spared the current one.
        self._share, self._skipped = 1.0, 0
        # Evaluations in earlier steps, in the current step, and in the interval that determines the pace.
        self._done_before = self._done_in_step = self._timed = 0.0
        self._timed_since = time.monotonic()
        self._later_share = 1.0

    def update(self, event: Event) -> None:
        """Take in what happened."""
        is_first = self._number == self._search.done + 1
        match event:
            case SearchAdvanced(evaluations, from_journal):
                self._done_in_step += evaluations
                self._timed += 0 if from_journal else evaluations
            case LaterStepsForecast(share) if is_first:
                self._later_share = share
            case CandidateScored(_, block, score):
                if self._leader is None or block == self._leader[0] or score < self._leader[1]:
                    self._leader = block, score
            case RaceNarrowed(_, contenders, skipped):
                # This step is shorter, and later ones in proportion.
                self._racing = contenders
                self._skipped += skipped
                self._share = min(self._share, 1 - self._skipped / self._steps[0])
            case BlockRemoved():
                if is_first:  # its pace does not apply to later steps
                    self._timed, self._timed_since, self._later_share = 0.0, time.monotonic(), 1.0
                if self._racing is not None:
                    self._share = 1 - self._skipped / self._steps[0]
                self._done_before += self._steps.pop(0) * self._share
                self._done_in_step = self._skipped = 0
                self._number += 1
                self._leader = self._racing = None

    @property
    def steps_left(self) -> int:
        """The number of undecided steps."""
        return len(self._steps)

    @property
    def done(self) -> float:
        """The number of evaluations done."""
        return self._done_before + self._done_in_step

    @property
    def expected(self) -> float:
        """The expected total number of evaluations."""
        here, *later = self._steps or [0]
        return self._done_before + max(here * self._share, self._done_in_step) + sum(later) * self._share

    def remaining(self) -> float | None:
        """Return the remaining seconds at the pace so far; None if there is none yet."""
        if not self._timed or not self._steps:
            return None
        pace = (time.monotonic() - self._timed_since) / self._timed
        here, *later = self._steps
        left = max(0.0, here * self._share - self._done_in_step)
        return pace * (left + sum(later) * self._share * self._later_share)

    def note(self) -> str:
        """Return a short status line."""
        best = f", best so far: block {self._leader[0]} ({self._leader[1]:.4f})" if self._leader else ""
        racing = f", {self._racing} still racing" if self._racing else ""
        return f"step {self._number} of {self._search.remove}{best}{racing}"


class _Listener:
    """One bar per task, and one for the whole search."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        # Shown while the libraries are imported, until the first real task starts.
        self._first: TaskID | None = progress.add_task("Starting", total=None, unit="", note="", forecast=None)
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int | None] = {}
        self._search: _SearchProgress | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case TaskStarted(task, total, unit):
                self._add(task, total, unit)
            case TaskAdvanced(task, done, note):
                self._progress.update(self._tasks[task], advance=done)
                if note:
                    self._progress.update(self._tasks[task], note=note)
            case TaskFinished(task):
                self._finish(task)
            case HealChecked(_, divergence, deciding):
                note = f"KL {divergence:.3f}, on deciding text {deciding:.3f}"
                self._progress.update(self._tasks[HEAL_TASK], note=note)
            case SearchStarted():
                self._search = _SearchProgress(event)
                self._add(SEARCH_TASK, sum(event.evaluations), "evaluations", self._search.remaining)
            case _:
                _say(event, self._progress.console)
                if self._search is not None:
                    self._update_search(event, self._search)

    def _update_search(self, event: Event, search: _SearchProgress) -> None:
        search.update(event)
        self._progress.update(
            self._tasks[SEARCH_TASK], completed=search.done, total=search.expected, note=search.note()
        )
        if not search.steps_left:
            self._finish(SEARCH_TASK)

    def _add(self, task: str, total: int | None, unit: str, forecast: Callable[[], float | None] | None = None) -> None:
        if self._first is not None:
            self._progress.remove_task(self._first)
            self._first = None
        self._totals[task] = total
        description = _description(task, self._progress.console)
        self._tasks[task] = self._progress.add_task(description, total=total, unit=unit, note="", forecast=forecast)

    def _finish(self, task: str) -> None:
        total = self._totals[task] or 1
        self._progress.update(self._tasks[task], total=total, completed=total, note="")


def _say(event: Event, console: Console) -> None:
    """Print the events that are sentences, the same on a terminal and in a log."""
    match event:
        case Notice(text):
            print_prose(console, escape(text))
        case Warned(text):
            print_warning(text, console)
        case CheckPassed(text):
            print_prose(console, f"{'[green]✓[/]' if console.is_terminal else 'proven:'} {escape(text)}")
        case BlocksSwapped(restored, removed, before, after):
            blocks = f"{', '.join(map(str, restored))} restored, {', '.join(map(str, removed))} removed"
            print_prose(console, f"swapped: {blocks}; score {before:.4f} -> {after:.4f}")


class _Log:
    """A plain line for each start and decision, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._remove = 0

    def __call__(self, event: Event) -> None:
        match event:
            case TaskStarted(task):
                self._line(f"{task} …")
            case HealChecked(share, divergence, deciding):
                self._line(
                    f"healing, {share:.0%}: KL to the dense model {divergence:.4f}, on deciding text {deciding:.4f}"
                )
            case SearchStarted(blocks, remove, done, evaluations):
                self._remove, count = remove, sum(evaluations)
                after = f", {done} of them already removed" if done else ""
                self._line(f"Search: {remove} of {blocks} blocks{after}, {count} candidate x sequence evaluations …")
            case BlockRemoved(step, block, score, perplexity, removals):
                what = f"block {block}" if removals is None else f"blocks {', '.join(map(str, removals))}"
                self._line(
                    f"step {step} of {self._remove}: {what} removed, score {score:.4f}, perplexity {perplexity:.2f}"
                )
            case _:
                _say(event, self._console)

    def _line(self, text: str) -> None:
        print_prose(self._console, escape(text))
