"""What the engine reports to a listener: a screen, a log, or a list in a test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

# Screens show these tasks in their own way.
SEARCH_TASK = "Search"
SCORING_TASK = "Scoring candidates"
HEAL_TASK = "Healing"


class Event:
    """Any event."""


@dataclass(frozen=True)
class Notice(Event):
    """A sentence for the user; nothing is wrong."""

    text: str


@dataclass(frozen=True)
class Warned(Event):
    """A sentence that the user sees even if progress and notes are hidden."""

    text: str


@dataclass(frozen=True)
class TasksAhead(Event):
    """The main tasks of a command that has several, in order."""

    tasks: tuple[str, ...]


@dataclass(frozen=True)
class TaskStarted(Event):
    """A task starts; `total` is in `unit`."""

    task: str
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class TaskAdvanced(Event):
    """`done` more units are finished, maybe a fraction; `note` is an intermediate result."""

    task: str
    done: float = 1
    note: str = ""


@dataclass(frozen=True)
class TaskFinished(Event):
    """A task is finished."""

    task: str


@dataclass(frozen=True)
class HealChecked(Event):
    """The divergence in the last step and on validation text; `share` of the budget is used.

    `measure` is what it is called: "KL to the dense model".
    """

    share: float
    divergence: float
    validation: float
    measure: str


@dataclass(frozen=True)
class SearchStarted(Event):
    """A search of up to `remove` of the model's `blocks` starts, with `done` already removed."""

    blocks: int
    remove: int
    done: int


@dataclass(frozen=True)
class BlocksSwapped(Event):
    """`restored` blocks replaced `removed` ones, and the score fell."""

    restored: tuple[int, ...]
    removed: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class BlockRemoved(Event):
    """A step is decided; `removals` are all removed blocks, None if only `block` was added."""

    step: int
    block: int
    score: float
    perplexity: float | None
    removals: tuple[int, ...] | None = None


Notify = Callable[[Event], None]


class Advance(Protocol):
    """The function that `task` yields."""

    def __call__(self, done: float = 1, note: str = "") -> object:
        """Report that `done` more units are finished; `note` is an intermediate result."""


def no_progress(done: float = 1, note: str = "") -> None:
    """Report progress to nobody."""


@contextmanager
def task(notify: Notify, name: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
    """Report the start and end of a task; the yielded function reports its progress."""
    notify(TaskStarted(name, total, unit))

    def advance(done: float = 1, note: str = "") -> None:
        notify(TaskAdvanced(name, done, note))

    yield advance
    # Not in `finally`: a task that raised is not finished.
    notify(TaskFinished(name))


def ignore(event: Event) -> None:
    """Ignore an event."""
