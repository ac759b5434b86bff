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
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        # The remaining time rests on the whole run, not on its last seconds: candidates are scored many at once.
        speed_estimate_period=24 * 3600,
    )


class _Done(ProgressColumn):
    """How much of the task is done, in its own unit."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.fields["unit"]:
            return Text("")
        if task.fields["unit"] == "B":
            return Text(f"{task.completed / 1e6:.0f}/{task.total / 1e6:.0f} MB")
        return Text(f"{task.completed:.0f}/{task.total:.0f}")


class _Standing:
    """How a search stands: what is done and still expected, in evaluations of one candidate on one sequence."""

    def __init__(self, search: SearchStarted) -> None:
        self._search = search
        self._before_this_step = 0.0
        self._best: dict[int, float] = {}
        self._racing: int | None = None
        self.done = 0.0
        self.expected = float(search.evaluations)

    def removed(self) -> None:
        """A step is decided, and the next one begins."""
        self._before_this_step = self.done
        self._best.clear()
        self._racing = None

    def scored(self, block: int, score: float) -> None:
        """A candidate's score so far."""
        self._best[block] = score

    def narrowed(self, step: int, contenders: int, evaluations: int) -> None:
        """Expect of the steps to come what this one is expected to take."""
        self._racing = contenders
        self.expected = self._before_this_step + evaluations * (self._search.remove - step + 1)

    def note(self, step: int) -> str:
        """Say it in a few words."""
        best = min(self._best, key=lambda block: self._best[block])
        racing = f", {self._racing} still racing" if self._racing else ""
        return f"step {step} of {self._search.remove}, best so far: block {best} ({self._best[best]:.4f}){racing}"


class _Bars:
    """One bar a task; one bar for the whole search."""

    def __init__(self, progress: Progress, first: str) -> None:
        self._progress = progress
        self._first: TaskID | None = progress.add_task(first, total=None, unit="", note="")
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int | None] = {}
        self._standing: _Standing | None = None
        self._last_step = 0

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
                self._standing, self._last_step = _Standing(event), event.remove
                self._add("Search", event.evaluations, "candidates x sequences")
            case _ if self._standing is not None:
                self._search(event, self._standing)

    def _search(self, event: Event, standing: _Standing) -> None:
        match event:
            case SearchAdvanced(evaluations):
                standing.done += evaluations
                self._progress.update(self._tasks["Search"], completed=standing.done)
            case CandidateScored(step, block, score):
                standing.scored(block, score)
                self._progress.update(self._tasks["Search"], note=standing.note(step))
            case RaceNarrowed(step, contenders, evaluations):
                standing.narrowed(step, contenders, evaluations)
                self._progress.update(self._tasks["Search"], total=standing.expected, note=standing.note(step))
            case BlockRemoved(step):
                standing.removed()
                if step == self._last_step:
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
            case SearchStarted(blocks, remove, done, evaluations):
                self._remove = remove
                after = f", {done} of them gone already" if done else ""
                self._line(
                    f"Search: {remove} of {blocks} blocks{after}, {evaluations} candidate x sequence evaluations …"
                )
            case BlockRemoved(step, block, score, perplexity):
                self._line(
                    f"step {step} of {self._remove}: block {block} removed, score {score:.4f}, "
                    f"perplexity {perplexity:.2f}"
                )

    def _line(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)
