"""`sleb apply --heal`: train the kept blocks to predict what the dense model predicts, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from sleb_cli.engine.device import in_smaller_pieces
from sleb_cli.engine.forward.loss_scale import BACKOFF, LOWEST, starting_scale
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.distillation import distill, learning_rate
from sleb_cli.engine.recovery.low_rank import LowRank
from sleb_cli.engine.recovery.unfinished import Saved, other_state
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.text.portions import Portion
from sleb_cli.events import HEAL_TASK, Advance, HealChecked, Notice, Notify, task
from sleb_cli.requests import DEFAULT_HEAL_MINUTES
from sleb_plugins import UsageError

LEARNING_RATE = 1.5e-3
"""The highest; steps are relative to the size of each weight (`low_rank.py`)."""

BATCH_TOKENS = 1024
PORTION_TOKENS = 65536
"""A portion trains on at most this many tokens: enough for the model to write many sequences at once."""

CHECKS = 10
"""How many times the deciding text is measured over the whole budget."""
PATIENCE = 3
"""Training stops after this many checks without a lower divergence."""
CHECKED_TOKENS = 2048

SCALE_HEADROOM = 16
"""How many times the scale of a single token a float16 loss starts with; it is lowered where that overflows."""

SECONDS_BETWEEN_SAVES = 60.0
MAX_SAVING_SHARE = 0.05
"""The largest share of the time that saves may take; slow ones are further apart."""


@dataclass(frozen=True)
class HealBudget:
    """When to stop: after minutes or after tokens."""

    minutes: float | None
    tokens: int | None

    @property
    def total(self) -> int:
        """The budget in its own unit, seconds or tokens."""
        return self.tokens if self.tokens is not None else max(1, round(60 * (self.minutes or 0)))

    @property
    def portion_tokens(self) -> int:
        """How many tokens a portion has: fewer for short budgets, so that most of their time is left for training."""
        if self.tokens is not None:
            return min(PORTION_TOKENS, self.tokens)
        return max(1, round(PORTION_TOKENS * min(1.0, (self.minutes or 0) / DEFAULT_HEAL_MINUTES)))

    def used(self, seconds: float, tokens: int) -> float:
        """Return how much of the budget is used, in its own unit."""
        return float(tokens) if self.tokens is not None else seconds


def choose_budget(minutes: float | None, tokens: int | None) -> HealBudget:
    """Return the budget, by default one of time.

    Raises:
        UsageError: both are given, or one is not above 0.
    """
    if minutes is not None and tokens is not None:
        raise UsageError("--heal-minutes and --heal-tokens cannot be combined.", hint="Use one of them.")
    if minutes is not None and minutes <= 0:
        raise UsageError(f"--heal-minutes must be above 0, not {minutes:g}.", hint="Use a larger number.")
    return HealBudget(DEFAULT_HEAL_MINUTES if minutes is None and tokens is None else minutes, tokens)


Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(ge=0, lt=2**62, allow_inf_nan=False)]


@pydantic_dataclass(config=ConfigDict(strict=True))
class Progress:
    """The progress of a healing.

    `portion` and `position` locate it in the text; `best_*` describe the kept point; `scale` is that of the loss.
    """

    scale: Annotated[Number, Field(gt=0)] = 1.0
    steps: Count = 0
    tokens: Count = 0
    seconds: Number = 0.0
    portion: Count = 0
    position: Count = 0
    checks: Count = 0
    stale: Count = 0
    best_divergence: Number | None = None
    best_tokens: Count = 0


@dataclass(frozen=True)
class Case:
    """What to heal, and on which text.

    Attributes:
        teacher: the dense model.
        student: the pruned model, recovered in closed form if that was asked for.
        first: the first block to train; the blocks before it are the dense model's own in both.
        weights: the matrices of the student's blocks from `first` on, by the dense model's names.
        stored: the data type of the checkpoint, to which weights are rounded.
        portion: returns the portion of text with this number.
        deciding: sequences that choose the point to keep, of text that is never trained on, [sequences, length].
    """

    teacher: Variant
    student: Variant
    first: int
    weights: Mapping[str, nn.Parameter]
    stored: torch.dtype
    portion: Callable[[int, Notify], Portion]
    deciding: Tensor

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(iter(self.weights.values())).device

    @property
    def batch(self) -> int:
        """Sequences in a step of each process."""
        return max(1, BATCH_TOKENS // self.length)

    def start(self, entering: Tensor) -> tuple[int, Tensor] | None:
        """Return where the student begins, given the states that enter the first trained block; None for its start."""
        return (self.first, entering) if self.first else None

    @property
    def length(self) -> int:
        """The length of a sequence."""
        return self.deciding.shape[1]


@dataclass(frozen=True)
class Healed:
    """New values by the dense model's parameter names, the final progress, and why training stopped."""

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
    """Distill until the budget is used or the deciding text stops improving, and return the point that was best on it.

    Args:
        case: what to heal.
        budget: when to stop.
        group: the processes that heal together.
        saved: the state of an interrupted healing.
        save: writes the state to disk; the main process calls it about every minute.
        notify: the listener for events.
    """
    return _Healing(case, budget, group, save, notify).run(saved)


class _Healing:
    def __init__(
        self, case: Case, budget: HealBudget, group: ProcessGroup, save: Callable[[Saved], None], notify: Notify
    ) -> None:
        self.case, self.budget, self.group, self.save, self.notify = case, budget, group, save, notify
        for weight in case.weights.values():
            # Each process fitted its own weights, and rounding may differ between them.
            weight.data.copy_(group.broadcast(weight.data))
        self.trained = LowRank(list(case.weights.values()), case.stored)
        dtype = next(iter(case.weights.values())).dtype
        self.is_scaled = dtype is torch.float16
        self.progress = Progress(scale=starting_scale(dtype, case.batch * case.length * SCALE_HEADROOM))
        self.micro_batch = case.batch
        self.best = self.trained.values.detach().clone()
        checked = case.deciding[: max(1, CHECKED_TOKENS // case.length)]
        self.deciding = _TeacherStates(case, checked.to(case.device), range(len(checked)))
        self.loss = 0.0
        self._advance: Advance
        self._reported = self._save_seconds = 0.0

    def run(self, saved: Saved | None) -> Healed:
        unit = "tokens" if self.budget.tokens is not None else "s"
        with task(self.notify, HEAL_TASK, self.budget.total, unit) as self._advance:
            used = self._train(saved)
        self.trained.set_values(self.best)
        values = {name: weight.detach() for name, weight in self.case.weights.items()}
        return Healed(values, self.progress, "budget" if used >= 1 else "patience")

    def _train(self, saved: Saved | None) -> float:
        """Train until the end, and return the share of the budget that was used."""
        if saved:
            self._restore(saved)
        self._began = self._saved_at = time.monotonic()
        self._began -= self.progress.seconds
        if not saved:
            self._check()
        batches, used = self._batches(), self._share()
        while used < 1 and self.progress.stale < PATIENCE:
            self._step(*next(batches), used)
            used = self._share()
            if int(used * CHECKS) > self.progress.checks or used >= 1:
                self.progress.checks = int(used * CHECKS)
                self._check()
            self._save_if_due()
        self._save()  # what comes after may fail, too
        return used

    def _share(self) -> float:
        """Return the share of the budget that is used, the same in all processes."""
        self.progress.seconds = self.group.from_main(lambda: time.monotonic() - self._began)
        return self.budget.used(self.progress.seconds, self.progress.tokens) / self.budget.total

    def _step(self, ids: Tensor, entering: Tensor, wanted: Tensor, share: float) -> None:
        gradient = self._gradient(ids, entering, wanted)
        # The learning rate is that of the middle of the step.
        tokens = ids.numel() * self.group.size
        ahead = tokens / self.budget.total / 2 if self.budget.tokens is not None else 0.0
        self.trained.step(gradient, learning_rate(LEARNING_RATE, share + ahead, self.progress.steps))
        self.progress.steps += 1
        self.progress.tokens += tokens
        self._report()

    def _gradient(self, ids: Tensor, entering: Tensor, wanted: Tensor) -> Tensor:
        """Return the gradient of a step, the mean over all processes; an overflow lowers the scale of the loss."""
        while True:
            self.loss = self._distill(ids, entering, wanted)
            gradient = self.group.mean(self.trained.take_gradient())
            if not self.is_scaled or self.progress.scale <= LOWEST or bool(gradient.isfinite().all()):
                return gradient / self.progress.scale
            self.progress.scale *= BACKOFF

    def _distill(self, ids: Tensor, entering: Tensor, wanted: Tensor) -> float:
        """Backpropagate the divergence, in parts if the device has no memory for all sequences at once."""
        case = self.case

        def run(size: int) -> float:
            total = 0.0
            for part in zip(*(torch.split(tensor, size) for tensor in (ids, entering, wanted)), strict=True):
                share = len(part[0]) / len(ids)
                scale = share * self.progress.scale
                total += share * distill(case.teacher, case.student, part[0], part[2], case.start(part[1]), scale)
            return total

        def fewer(micro_batch: int) -> None:
            self.trained.take_gradient()  # of those that ran out of memory
            self.micro_batch = micro_batch
            self.notify(Notice(f"Out of memory on {case.device}; healing {micro_batch} sequences at a time."))

        return in_smaller_pieces(run, self.micro_batch, fewer)

    def _check(self) -> None:
        """Measure the deciding text, and keep the point if it is the best so far."""
        found = self.group.from_main(self._divergence)
        best = self.progress.best_divergence
        if best is None or found < best:
            self.best = self.trained.values.detach().clone()
            self.progress.best_divergence, self.progress.best_tokens = found, self.progress.tokens
            self.progress.stale = 0
        else:
            self.progress.stale += 1
        if self.progress.steps:
            self.notify(HealChecked(self._share(), self.loss, found))

    def _divergence(self) -> float:
        """Return the divergence on the deciding text. The teacher reads that once."""
        case, rows = self.case, self.deciding.rows
        everywhere = torch.arange(case.length - 1, device=case.device)
        total = 0.0
        for chosen in self.deciding.batches:
            entering, wanted = self.deciding.of(chosen)
            with torch.inference_mode():
                states = case.student.final_states(rows[chosen], case.start(entering))
                total += summed_losses(case.student, case.teacher, states, wanted, rows[chosen], everywhere)[1]
        return total / (len(rows) * len(everywhere))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield sequences and the teacher's states on them, without end, from the current progress on."""
        while True:
            number = self.progress.portion * self.group.size + self.group.rank
            portion = self.case.portion(number, lambda event: self._report())  # time passes while text is written
            targets = _TeacherStates(self.case, portion.sequences.to(self.case.device), portion.order)
            while self.progress.position < len(portion.order):
                start = self.progress.position
                self.progress.position += self.case.batch
                chosen, later = portion.order[start : self.progress.position], portion.order[self.progress.position :]
                yield targets.rows[chosen], *targets.of(chosen)
                targets.keep(later)
            self.progress.portion += 1
            self.progress.position = 0

    def _report(self) -> None:
        used = self.budget.used(time.monotonic() - self._began, self.progress.tokens)
        if used - self._reported >= 1:
            self._advance(int(used - self._reported))
            self._reported += int(used - self._reported)

    def _save_if_due(self) -> None:
        began = time.monotonic()
        if began - self._saved_at < max(SECONDS_BETWEEN_SAVES, self._save_seconds / MAX_SAVING_SHARE):
            return
        self._save()
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def _save(self) -> None:
        if self.group.is_main:
            state = {f"trained.{name}": tensor for name, tensor in self.trained.state().items()}
            self.save(Saved({"progress": asdict(self.progress)}, state | {"best": self.best}))

    def _restore(self, saved: Saved) -> None:
        self.progress = _progress_of(saved)
        shapes = self.trained.state_shapes(begun=self.progress.steps > 0)
        self.trained.restore(
            {name: saved.tensor(f"trained.{name}", shape, torch.float32) for name, shape in shapes.items()}
        )
        self.best = saved.tensor("best", self.best.shape, torch.float32).to(self.case.device)


def _progress_of(saved: Saved) -> Progress:
    """Return the saved progress.

    Raises:
        PlanError: it is none.
    """
    said = saved.data.get("progress")
    if not isinstance(said, dict) or said.keys() != asdict(Progress()).keys() or said["best_divergence"] is None:
        raise other_state("its progress is missing, or is not what a healing saves")
    try:
        return Progress(**said)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise other_state(f"its progress says {wrong['loc'][0]} = {str(wrong['input'])[:40]}") from error


class _TeacherStates:
    """The teacher's hidden states on sequences, computed once for all uses.

    A row is read in the batch of its first use, whenever that is, so a healing that was resumed finds the same bits.
    """

    def __init__(self, case: Case, rows: Tensor, order: Iterable[int]) -> None:
        self.rows, self._case = rows, case
        first_uses = list(dict.fromkeys(order))
        self.batches = [first_uses[at : at + case.batch] for at in range(0, len(first_uses), case.batch)]
        self._batch_of = {row: batch for batch in self.batches for row in batch}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Return the hidden states that enter the first trained block, and the final ones."""
        for row in chosen:
            if row not in self._known:
                self._read(self._batch_of[row])
        entering, final = zip(*(self._known[row] for row in chosen), strict=True)
        return torch.stack(entering), torch.stack(final)

    @torch.no_grad()
    def _read(self, batch: list[int]) -> None:
        entering, final = self._case.teacher.entering_and_final_states(self.rows[batch], self._case.first)
        # Copies, so that a row that is still needed does not hold the others of its batch.
        self._known |= {row: (entering[at].clone(), final[at].clone()) for at, row in enumerate(batch)}

    def keep(self, rows: Collection[int]) -> None:
        """Forget the states of all other rows."""
        self._known = {row: self._known[row] for row in set(rows) & self._known.keys()}
