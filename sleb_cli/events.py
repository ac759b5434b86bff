"""What the engine tells whoever listens. The listener may be a screen, a log, or a list in a test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Notice:
    """A sentence the user should see once, though nothing is wrong."""

    text: str


@dataclass(frozen=True)
class CheckPassed:
    """Something that was in doubt holds; `text` says what, without a full stop."""

    text: str


@dataclass(frozen=True)
class TaskStarted:
    """A stretch of work begins; `total` is in `unit`, or None where nobody can tell."""

    task: str
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class TaskAdvanced:
    """`done` more units of the running task are finished; `note` says what was found, where something was."""

    task: str
    done: int = 1
    note: str = ""


@dataclass(frozen=True)
class TaskFinished:
    """The task came to its end."""

    task: str


@dataclass(frozen=True)
class HealChecked:
    """With this share of the budget used, the divergence from the dense model: in the last step, and held out."""

    share: float
    divergence: float
    held_out: float


@dataclass(frozen=True)
class SearchStarted:
    """The search begins, `done` steps behind it; `evaluations` counts candidate x sequence for each to come."""

    blocks: int
    remove: int
    done: int
    evaluations: tuple[int, ...]


@dataclass(frozen=True)
class SearchAdvanced:
    """So many more evaluations of one candidate on one sequence are done, in parts of one too; or were found done."""

    evaluations: float
    found: bool = False


@dataclass(frozen=True)
class LaterStepsForecast:
    """An evaluation in a later step will take about this share of the time of one in the first step."""

    share: float


@dataclass(frozen=True)
class CandidateScored:
    """`block` was scored on more sequences; `score` is its mean so far in this step."""

    step: int
    block: int
    score: float


@dataclass(frozen=True)
class RaceNarrowed:
    """So many candidates are still in the race; so many evaluations will not be made."""

    step: int
    contenders: int
    spared: int


@dataclass(frozen=True)
class BlocksSwapped:
    """Blocks came back into the model for others that went, and the score fell."""

    restored: tuple[int, ...]
    removed: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class BlockRemoved:
    """The step is decided; `removals` names all blocks where they are not those of the last step and `block`."""

    step: int
    block: int
    score: float
    perplexity: float
    removals: tuple[int, ...] | None = None


Event = (
    Notice
    | CheckPassed
    | TaskStarted
    | TaskAdvanced
    | TaskFinished
    | HealChecked
    | SearchStarted
    | SearchAdvanced
    | LaterStepsForecast
    | CandidateScored
    | RaceNarrowed
    | BlocksSwapped
    | BlockRemoved
)
Notify = Callable[[Event], None]


class Advance(Protocol):
    """What `task` yields."""

    def __call__(self, done: int = 1, note: str = "") -> None:
        """Report that `done` more units of the task are finished; `note` says what was found."""


@contextmanager
def task(notify: Notify, name: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
    """Report a stretch of work; the yielded function reports its progress.

    If the body raises, the task is never reported as finished.
    """
    notify(TaskStarted(name, total, unit))

    def advance(done: int = 1, note: str = "") -> None:
        notify(TaskAdvanced(name, done, note))

    yield advance
    notify(TaskFinished(name))


def ignore(event: Event) -> None:
    """Listen to nothing."""
