"""`sleb apply --heal`: train the kept blocks to predict as the dense model does, within a budget of time or tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sleb_cli.engine.recovery.distillation import distill, learning_rate
from sleb_cli.engine.recovery.heal_state import Saved
from sleb_cli.engine.recovery.low_rank import LowRank
from sleb_cli.engine.recovery.process_group import ProcessGroup
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.events import Event, HealChecked, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_plugins import DataError, UsageError

DEFAULT_MINUTES = 10.0

LEARNING_RATE = 1e-3
BASE_WIDTH = 576
"""The learning rate is for hidden states of this size; wider models take smaller steps."""

BATCH_TOKENS = 1024
PORTION_TOKENS = 16384
"""Text is drawn or written in portions of at most so many tokens, with a seed of its own each."""
PASSES = 2
"""How often a portion is gone through before the next one."""

CHECKS = 10
"""How often held-out text is looked at, over the whole budget."""
PATIENCE = 3
"""After so many looks without a lower divergence, it stops."""
WATCHED_TOKENS = 2048

SECONDS_BETWEEN_SAVES = 60.0
MOST_TIME_FOR_SAVES = 0.05
"""Where a save takes long, they are further apart, so that no larger share of the time goes to them."""


@dataclass(frozen=True)
class HealBudget:
    """When to stop: after minutes, or after tokens."""

    minutes: float | None
    tokens: int | None

    @property
    def total(self) -> int:
        """The budget in its own unit, seconds or tokens."""
        return self.tokens if self.tokens is not None else round(60 * (self.minutes or 0))

    @property
    def portion_tokens(self) -> int:
        """How much text to write at once: for short budgets less, so that most of their time is left for training."""
        if self.tokens is not None:
            return min(PORTION_TOKENS, -(-self.tokens // PASSES))
        return round(PORTION_TOKENS * min(1.0, (self.minutes or 0) / DEFAULT_MINUTES))

    def used(self, seconds: float, tokens: int) -> float:
        """Give what is used of it, in its own unit."""
        return float(tokens) if self.tokens is not None else seconds


def choose_budget(minutes: float | None, tokens: int | None) -> HealBudget:
    """Fill in the budget where nothing was said.

    Raises:
        UsageError: it is none, or both are given.
    """
    if minutes is not None and tokens is not None:
        raise UsageError("--heal-minutes and --heal-tokens are two budgets.", hint="Give one of the two.")
    if minutes is not None and minutes <= 0:
        raise UsageError(f"--heal-minutes {minutes:g} is no budget.", hint="Take more than 0.")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--heal-tokens {tokens} is no budget.", hint="Take 1 or more.")
    return HealBudget(DEFAULT_MINUTES if minutes is None and tokens is None else minutes, tokens)


@dataclass
class Progress:
    """How a healing stands. `portion` and `position` say where in the text; `best_*` which point is kept."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    portion: int = 0
    position: int = 0
    checks: int = 0
    stale: int = 0
    best_divergence: float | None = None
    best_tokens: int = 0


@dataclass(frozen=True)
class Case:
    """What is healed.

    Attributes:
        teacher: the dense model.
        student: the pruned model, with what it was given back already.
        first: the first block that is trained; those before are the dense model's own in both.
        weights: the matrices of the student's blocks from there on, by the dense model's names.
        write: gives the portion of text of this number, [sequences, length].
        held_out: sequences that are never trained on, [sequences, length].
        seed: decides in which order sequences come.
        width: the size of hidden states.
    """

    teacher: Variant
    student: Variant
    first: int
    weights: Mapping[str, nn.Parameter]
    write: Callable[[int, Notify], Tensor]
    held_out: Tensor
    seed: int
    width: int

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return LEARNING_RATE * min(1.0, BASE_WIDTH / self.width)

    @property
    def batch(self) -> int:
        """Sequences in a step, of each process."""
        return max(1, BATCH_TOKENS // self.held_out.shape[1])


@dataclass(frozen=True)
class Healed:
    """New values by the dense model's parameter names, and how it went."""

    values: dict[str, Tensor]
    progress: Progress
    stopped: Literal["budget", "patience"]


def heal(
    case: Case,
    budget: HealBudget,
    group: ProcessGroup,
    saved: Saved | None,
    save: Callable[[Saved], None],
    notify: Notify,
) -> Healed:
    """Distill until the budget is used or held-out text gains no more, and give the point that was best on it.

    Args:
        case: what is healed.
        budget: for how long.
        group: the processes that do it together.
        saved: where an interrupted healing stood.
        save: keeps on disk where it stands; called about every minute by the main process.
        notify: is told of the progress.
    """
    return _Healing(case, budget, group, save, notify).run(saved)


class _Healing:
    def __init__(
        self, case: Case, budget: HealBudget, group: ProcessGroup, save: Callable[[Saved], None], notify: Notify
    ) -> None:
        self.case, self.budget, self.group, self.save, self.notify = case, budget, group, save, notify
        for weight in case.weights.values():
            # Each process fitted its own, and rounding may differ between them.
            weight.data.copy_(group.broadcast(weight.data))
        self.trained = LowRank(list(case.weights.values()))
        self.progress = Progress()
        self.best = self.trained.values.detach().clone()
        self.loss = 0.0
        self._told = self._save_took = 0.0

    def run(self, saved: Saved | None) -> Healed:
        unit = "tokens" if self.budget.tokens is not None else "s"
        self.notify(TaskStarted("Healing", self.budget.total, unit))
        if saved:
            self._restore(saved)
        self._began = self._saved_at = time.monotonic()
        self._began -= self.progress.seconds
        if not saved:
            self._check()
        batches, last = self._batches(), self._share()
        while last < 1 and self.progress.stale < PATIENCE:
            self._step(*next(batches), last)
            last = self._share()
            if int(last * CHECKS) > self.progress.checks or last >= 1:
                self.progress.checks = int(last * CHECKS)
                self._check()
            self._save_if_due()
        self.notify(TaskFinished("Healing"))
        self.trained.put(self.best)
        values = {name: weight.detach() for name, weight in self.case.weights.items()}
        return Healed(values, self.progress, "budget" if last >= 1 else "patience")

    def _share(self) -> float:
        """Say how much of the budget is used; all processes hear the same."""
        self.progress.seconds = self.group.broadcast_number(time.monotonic() - self._began)
        return self.budget.used(self.progress.seconds, self.progress.tokens) / self.budget.total

    def _step(self, ids: Tensor, entering: Tensor, wanted: Tensor, share: float) -> None:
        start = (self.case.first, entering) if self.case.first else None
        self.loss = distill(self.case.teacher, self.case.student, ids, wanted, start)
        gradient = self.group.mean(self.trained.take_gradient())
        # What counts is the middle of the step.
        tokens = ids.numel() * self.group.size
        ahead = tokens / self.budget.total / 2 if self.budget.tokens is not None else 0.0
        self.trained.step(gradient, learning_rate(self.case.rate, share + ahead, self.progress.steps))
        self.progress.steps += 1
        self.progress.tokens += tokens
        self._tell()

    def _check(self) -> None:
        """Look at held-out text, and keep the point if it is the best so far."""
        watched = self.case.held_out[: max(1, WATCHED_TOKENS // self.case.held_out.shape[1])]
        found = self.group.broadcast_number(losses(self.case.student, self.case.teacher, watched)[1])
        best = self.progress.best_divergence
        if best is None or found < best:
            self.best = self.trained.values.detach().clone()
            self.progress.best_divergence, self.progress.best_tokens, self.progress.stale = (
                found,
                self.progress.tokens,
                0,
            )
        else:
            self.progress.stale += 1
        if self.progress.steps:
            self.notify(HealChecked(self._share(), self.loss, found))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give sequences and the teacher's states on them, without end, from where the progress stands."""
        while True:
            number = self.progress.portion * self.group.size + self.group.rank
            rows = without(self.case.write(number, self._heartbeat), self.case.held_out).to(self.group.device)
            order: list[int] = []
            for turn in range(PASSES):
                shuffle = random.Random(f"{self.case.seed}/{number}/{turn}")
                order += shuffle.sample(range(len(rows)), len(rows))
            taught = _Taught(self.case, rows)
            while self.progress.position < len(order):
                start = self.progress.position
                self.progress.position += self.case.batch
                chosen = order[start : self.progress.position]
                yield rows[chosen], *taught.states(chosen)
            self.progress.portion += 1
            self.progress.position = 0

    def _heartbeat(self, event: Event) -> None:
        """Time goes on while text is written."""
        self._tell()

    def _tell(self) -> None:
        used = self.budget.used(time.monotonic() - self._began, self.progress.tokens)
        if used - self._told >= 1:
            self.notify(TaskAdvanced("Healing", int(used - self._told)))
            self._told += int(used - self._told)

    def _save_if_due(self) -> None:
        began = time.monotonic()
        if began - self._saved_at < max(SECONDS_BETWEEN_SAVES, self._save_took / MOST_TIME_FOR_SAVES):
            return
        if self.group.rank == 0:
            state = {f"trained.{name}": tensor for name, tensor in self.trained.state().items()}
            self.save(Saved({"progress": asdict(self.progress)}, state | {"best": self.best}))
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - began

    def _restore(self, saved: Saved) -> None:
        self.progress = Progress(**saved.data["progress"])
        marked = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("trained.")}
        self.trained.restore({name.removeprefix("trained."): tensor for name, tensor in marked.items()})
        self.best = saved.tensors["best"].to(self.group.device)


class _Taught:
    """What the teacher says of a portion: made once for all passes, row by row, so that no neighbour matters."""

    def __init__(self, case: Case, rows: Tensor) -> None:
        self._case, self._rows = case, rows
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def states(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Give the hidden states that enter the first trained block, and the final ones."""
        for row in chosen:
            if row not in self._known:
                self._known[row] = self._case.teacher.two_depths(self._rows[row : row + 1], self._case.first)
        entering, final = zip(*(self._known[row] for row in chosen), strict=True)
        return torch.cat(entering), torch.cat(final)


def without(rows: Tensor, held_out: Tensor) -> Tensor:
    """Leave out the rows that are held out.

    Raises:
        DataError: none is left.
    """
    left = rows[~(rows[:, None] == held_out[None].to(rows.device)).all(-1).any(1)]
    if not len(left):
        raise DataError("All the text is held out, so there is none to heal on.", hint="Take more text.")
    return left
