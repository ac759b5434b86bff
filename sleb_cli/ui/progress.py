"""Turn the engine's events into Rich bars on a terminal, or into plain lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
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
    CandidateScored,
    Event,
    Notice,
    Notify,
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
        TimeRemainingColumn(compact=True),
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


class _Bars:
    """One bar a task; one bar for the whole search."""

    def __init__(self, progress: Progress, first: str) -> None:
        self._progress = progress
        self._first: TaskID | None = progress.add_task(first, total=None, unit="", note="")
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int | None] = {}
        self._search: SearchStarted | None = None
        self._best: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self._progress.console.print(escape(text), soft_wrap=True)
            case TaskStarted(task, total, unit):
                self._add(task, total, unit)
            case TaskAdvanced(task, done, note):
                self._progress.update(self._tasks[task], advance=done, note=escape(note))
            case TaskFinished(task):
                self._finish(task)
            case SearchStarted():
                self._search = event
                self._add("Search", event.evaluations, "sequences")
            case CandidateScored(step, block, score, sequences):
                self._best[block] = score
                self._progress.update(self._tasks["Search"], advance=sequences, note=self._standing(step))
            case BlockRemoved(step):
                self._best.clear()
                if self._search and step == self._search.remove:
                    self._finish("Search")

    def _add(self, task: str, total: int | None, unit: str) -> None:
        if self._first is not None:  # the work itself is on screen from here on
            self._progress.remove_task(self._first)
            self._first = None
        self._totals[task] = total
        self._tasks[task] = self._progress.add_task(escape(task), total=total, unit=unit, note="")

    def _finish(self, task: str) -> None:
        total = self._totals[task] or 1
        self._progress.update(self._tasks[task], total=total, completed=total, note="")

    def _standing(self, step: int) -> str:
        best = min(self._best, key=lambda block: self._best[block])
        of = self._search.remove if self._search else step
        return f"step {step} of {of}, best so far: block {best} ({self._best[best]:.4f})"


class _Log:
    """A line where something began or was decided; nothing that overwrites itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._remove = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self._line(text)
            case TaskStarted(task):
                self._line(f"{task} …")
            case SearchStarted(blocks, remove, evaluations):
                self._remove = remove
                self._line(f"Search: {remove} of {blocks} blocks, {evaluations} candidate x sequence evaluations …")
            case BlockRemoved(step, block, score, perplexity):
                self._line(
                    f"step {step} of {self._remove}: block {block} removed, score {score:.4f}, "
                    f"perplexity {perplexity:.2f}"
                )

    def _line(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)
