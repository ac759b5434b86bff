"""What the engine tells whoever listens. The listener may be a screen, a log, or a list in a test."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """A sentence the user should see once, though nothing is wrong."""

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
class SearchStarted:
    """The greedy search begins: `evaluations` counts candidate x sequence over all steps."""

    blocks: int
    remove: int
    evaluations: int


@dataclass(frozen=True)
class CandidateScored:
    """`block` was scored on `sequences` more sequences; `score` is its mean so far in this step."""

    step: int
    block: int
    score: float
    sequences: int


@dataclass(frozen=True)
class BlockRemoved:
    """The step is decided."""

    step: int
    block: int
    score: float
    perplexity: float


Event = Notice | TaskStarted | TaskAdvanced | TaskFinished | SearchStarted | CandidateScored | BlockRemoved
Notify = Callable[[Event], None]
