"""`sleb apply --heal`: train the kept blocks to predict what the dense model predicts, within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.forward.forecast import announce, block_operations
from sleb_cli.engine.forward.loss_scale import BACKOFF, LOWEST, starting_scale
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.distillation import distill, learning_rate
from sleb_cli.engine.recovery.low_rank import LowRank
from sleb_cli.engine.recovery.unfinished import read_saved, require_tensor, write_saved
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.engine.text.portions import Portions
from sleb_cli.engine.text.windows import whole_mask
from sleb_cli.events import HEAL_TASK, Advance, HealChecked, Notice, Notify, task
from sleb_cli.requests import DEFAULT_HEAL_MINUTES
from sleb_plugins import ModelError

LEARNING_RATE = 1.5e-3
"""The highest; steps are relative to the size of each weight (`low_rank.py`)."""

BATCH_TOKENS = 512
FIRST_PORTION_TOKENS, PORTION_TOKENS = 16384, 65536
"""On how many tokens portions train, at first and at most.

A large portion has the model write many sequences at once, which is faster; but a large model takes minutes for it, so
portions begin small and double, and the last has as much as the rest of the budget can train on.
"""

CHECKS = 10
"""How many times the validation text is measured over the whole budget."""
PATIENCE = 3
"""Training stops after this many checks without a lower divergence, in the second half of the budget: in the first, the
learning rate is too high to tell."""
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

    def portion_tokens(self, portion: int) -> int:
        """Return on how many tokens a portion trains: fewer for short budgets, to leave time for training."""
        if self.tokens is not None:
            first = min(FIRST_PORTION_TOKENS, self.tokens)
        else:
            first = max(1, round(FIRST_PORTION_TOKENS * min(1.0, (self.minutes or 0) / DEFAULT_HEAL_MINUTES)))
        return min(first << portion, PORTION_TOKENS)

    def used(self, seconds: float, tokens: int) -> float:
        """Return how much of the budget is used, in its own unit."""
        return float(tokens) if self.tokens is not None else seconds


Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(ge=0, lt=2**62, allow_inf_nan=False)]


class Progress(BaseModel, strict=True, extra="forbid"):
    """The progress of a healing.

    `portion` and `position` locate it in the text, and `most` is how many sequences the portion has at most, if not 0;
    `best_*` describe the kept point; `scale` is that of the loss.
    """

    scale: Annotated[Number, Field(gt=0)]
    steps: Count = 0
    tokens: Count = 0
    seconds: Number = 0.0
    portion: Count = 0
    position: Count = 0
    most: Count = 0
    checks: Count = 0
    stale: Count = 0
    best_divergence: Number = math.inf
    best_tokens: Count = 0


@dataclass
class Healing:
    """The training of a pruned model until a budget is used or it stops improving on text that decides.

    Attributes:
        teacher: the dense model.
        student: the pruned model, recovered in closed form if that was asked for.
        first: the first block to train; the blocks before it are the dense model's own in both.
        weights: the matrices of the student's blocks from `first` on.
        originals: what they were before, in the same order; where nothing was fitted, the dense model's own.
        stored: the data type of the checkpoint, to which weights are rounded.
        portions: the text to train on.
        validation: the text that chooses the point to keep, and is never trained on.
        budget: when to stop.
        file: where the main process saves the training about every minute, and from where it continues.
        watch: the dense model's files, which must be the same at each save.
        group: the processes that heal together.
        notify: the listener for events.
    """

    teacher: Variant
    student: Variant
    first: int
    weights: Sequence[nn.Parameter]
    originals: Sequence[Tensor]
    stored: torch.dtype
    portions: Portions
    validation: Calibration
    budget: HealBudget
    file: Path
    watch: Watch
    group: ProcessGroup
    notify: Notify

    def __post_init__(self) -> None:
        for weight, original in zip(self.weights, self.originals, strict=True):
            # Each process fitted its own weights, and rounding may differ between them.
            weight.data.copy_(self.group.broadcast(weight.data))
            if not torch.equal(original, weight.data):
                original.copy_(weight.data)
        self.device, dtype = self.weights[0].device, self.weights[0].dtype
        sequences = self.validation.sequences
        self.length = sequences.shape[1]
        self.batch = self.micro_batch = max(1, BATCH_TOKENS // self.length)
        self.trained = LowRank(self.weights, self.originals, self.stored)
        self.best = self.trained.values.detach().clone()
        self.is_scaled = dtype is torch.float16
        self.progress = Progress(scale=starting_scale(dtype, self.batch * self.length * SCALE_HEADROOM))
        checked = sequences[: max(1, CHECKED_TOKENS // self.length)].to(self.device)
        self.checked = _TeacherStates(self, checked, range(len(checked)))
        self.checked_mask = whole_mask(sequences, self.validation.loss_mask)[: len(checked)].to(self.device)
        self.loss, self._left_out = 0.0, False
        self._advance: Advance
        self._reported = self._save_seconds = 0.0

    def run(self) -> Literal["budget", "patience"]:
        """Train, give the weights the values that were best, and return why training stopped."""
        unit = "tokens" if self.budget.tokens is not None else "s"
        with task(self.notify, HEAL_TASK, self.budget.total, unit) as self._advance:
            continues = self._continue()
            self._announce()
            self._saved_at = time.monotonic()
            self._began = self._saved_at - self.progress.seconds
            if not continues:
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
        self.trained.values.data.copy_(self.best)
        self.trained.write_weights()
        return "budget" if used >= 1 else "patience"

    def _announce(self) -> None:
        """Tell how long a number of tokens takes, besides the writing of text; minutes are known."""
        if self.budget.tokens is None:
            return
        teacher, student = self.teacher.skippable, self.student.skippable
        left = self.budget.tokens - self.progress.tokens
        # Each product of the student's trained part has two more backwards, each of its head has one.
        through_blocks = len(teacher.switches) + 3 * (len(student.switches) - self.first) + 3 * teacher.head_blocks
        announce(
            self.notify,
            f"Healing: {left:,} tokens in {dtype_name(self.weights[0].dtype)}",
            through_blocks * left * block_operations(teacher),
            teacher,
            self.checked.rows[: self.batch],
            processes=self.group.size,
        )

    def _continue(self) -> bool:
        """Take over what an interrupted run saved; return whether there is anything."""
        if not self.group.from_main(self.file.exists):
            return False
        self.progress, tensors = read_saved(self.file, Progress)
        for name, tensor in self._state.items():
            tensor.copy_(require_tensor(self.file, tensors.get(name), tensor.shape))
        self.trained.write_weights()
        if self.group.is_main:
            self.notify(Notice(f"Continuing an interrupted healing, after {self.progress.tokens:,} tokens."))
        return True

    def _share(self) -> float:
        """Return the share of the budget that is used, the same in all processes."""
        self.progress.seconds = self.group.from_main(lambda: time.monotonic() - self._began)
        return self.budget.used(self.progress.seconds, self.progress.tokens) / self.budget.total

    def _step(self, ids: Tensor, mask: Tensor, entering: Tensor, wanted: Tensor, share: float) -> None:
        gradient = self._gradient(ids, mask, entering, wanted)
        # The learning rate is that of the middle of the step.
        tokens = ids.numel() * self.group.size
        ahead = tokens / self.budget.total / 2 if self.budget.tokens is not None else 0.0
        if bool(gradient.isfinite().all()):
            self.trained.step(gradient, learning_rate(LEARNING_RATE, share + ahead, self.progress.steps))
        elif not self._left_out:
            self._left_out = True
            self.notify(Notice("Skipping steps whose gradient is not finite: the model overflows on some text."))
        self.progress.steps += 1
        self.progress.tokens += tokens
        self._report()

    def _gradient(self, ids: Tensor, mask: Tensor, entering: Tensor, wanted: Tensor) -> Tensor:
        """Return the gradient of a step, the mean over all processes; an overflow lowers the scale of the loss."""
        before = self.progress.scale
        while True:
            self.loss = self._distill(ids, mask, entering, wanted)
            gradient = self.group.mean(self.trained.take_gradient())
            is_finite = bool(gradient.isfinite().all())
            if is_finite or not self.is_scaled or self.progress.scale <= LOWEST:
                gradient.div_(self.progress.scale)
                self.progress.scale = self.progress.scale if is_finite else before  # no scale helps on this text
                return gradient
            self.progress.scale *= BACKOFF

    def _distill(self, ids: Tensor, mask: Tensor, entering: Tensor, wanted: Tensor) -> float:
        """Backpropagate the divergence, in parts if the device has no memory for all sequences at once."""

        def run(size: int) -> float:
            total, count = 0.0, int(mask[:, 1:].sum())
            parts = (torch.split(tensor, size) for tensor in (ids, mask, entering, wanted))
            for ids_, mask_, entering_, wanted_ in zip(*parts, strict=True):
                share = int(mask_[:, 1:].sum()) / count
                scale, start = share * self.progress.scale, (self.first, entering_)
                total += share * distill(self.teacher, self.student, ids_, wanted_, start, scale, mask_)
            return total

        def fewer(micro_batch: int) -> None:
            self.trained.take_gradient()  # of those that ran out of memory
            self.micro_batch = micro_batch
            self.notify(Notice(f"Out of memory on {self.device}; healing {micro_batch} sequences at a time."))

        return in_smaller_pieces(run, self.micro_batch, fewer)

    def _check(self) -> None:
        """Measure the validation text, and keep the point if it is the best so far."""
        found = self.group.from_main(self._divergence)
        if not (self.progress.steps or math.isfinite(found)):
            raise ModelError(
                f"On the validation text, the divergence from the dense model is {found}.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or float32.",
            )
        used = self._share()
        if found < self.progress.best_divergence:
            self.best.copy_(self.trained.values.data)
            self.progress.best_divergence, self.progress.best_tokens = found, self.progress.tokens
            self.progress.stale = 0
        else:
            self.progress.stale += used > 0.5
        if self.progress.steps:
            self.notify(HealChecked(min(1.0, used), self.loss, found))

    @torch.inference_mode()
    def _divergence(self) -> float:
        """Return the divergence on the validation text. The teacher reads that once."""
        rows, total = self.checked.rows, 0.0
        everywhere = torch.arange(self.length - 1, device=self.device)
        for chosen in self.checked.batches:
            entering, wanted = self.checked.of(chosen)
            states = self.student.final_states(rows[chosen], (self.first, entering))
            here = rows[chosen], everywhere, self.checked_mask[chosen]
            total += summed_losses(self.student, self.teacher, states, wanted, *here).divergence
        return total / int(self.checked_mask[:, 1:].sum())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield sequences, which of their tokens count, and the teacher's states, from the current progress on."""
        while True:
            number = self.progress.portion * self.group.size + self.group.rank
            # Time passes while text is written.
            portion = self.portions.draw(number, lambda event: self._report(), self.progress.most)
            targets = _TeacherStates(self, portion.sequences.to(self.device), portion.order)
            mask = whole_mask(portion.sequences, portion.loss_mask).to(self.device)
            while self.progress.position < len(portion.order):
                start = self.progress.position
                self.progress.position += self.batch
                chosen, later = portion.order[start : self.progress.position], portion.order[self.progress.position :]
                yield targets.rows[chosen], mask[chosen], *targets.of(chosen)
                targets.keep(later)
            self.progress.portion += 1
            self.progress.position = 0
            self.progress.most = self._left()

    def _left(self) -> int:
        """Return how many sequences of its own a process can train on in the rest of the budget, at the pace so far."""
        seconds, tokens = self.progress.seconds, self.progress.tokens
        left = self.budget.total - self.budget.used(seconds, tokens)
        left *= 1 if self.budget.tokens is not None else tokens / max(seconds, 1e-3)
        return max(1, math.ceil(left / self.length / self.group.size))

    def _report(self) -> None:
        used = self.budget.used(time.monotonic() - self._began, self.progress.tokens)
        if used - self._reported >= 1:
            self._advance(int(used - self._reported))
            self._reported += int(used - self._reported)

    def _save_if_due(self) -> None:
        began = time.monotonic()
        if began - self._saved_at >= max(SECONDS_BETWEEN_SAVES, self._save_seconds / MAX_SAVING_SHARE):
            self._save()
            self._saved_at = time.monotonic()
            self._save_seconds = self._saved_at - began

    def _save(self) -> None:
        if self.group.is_main:
            self.watch.require_unchanged()
            write_saved(self.file, self.progress, self._state)

    @property
    def _state(self) -> dict[str, Tensor]:
        """The tensors of a saved state, which are the training's own."""
        return {f"trained.{name}": tensor for name, tensor in self.trained.state.items()} | {"best": self.best}


class _TeacherStates:
    """The teacher's hidden states on sequences, computed once for all uses.

    A row is read in the batch of its first use, whenever that is, so a healing that was resumed finds the same bits.
    """

    def __init__(self, healing: Healing, rows: Tensor, order: Iterable[int]) -> None:
        self.rows, self._teacher, self._first = rows, healing.teacher, healing.first
        first_uses = list(dict.fromkeys(order))
        self.batches = [first_uses[at : at + healing.batch] for at in range(0, len(first_uses), healing.batch)]
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
        entering, final = self._teacher.entering_and_final_states(self.rows[batch], self._first)
        # Copies, so that a row that is still needed does not hold the others of its batch.
        self._known |= {row: (entering[at].clone(), final[at].clone()) for at, row in enumerate(batch)}

    def keep(self, rows: Collection[int]) -> None:
        """Forget the states of all other rows."""
        self._known = {row: self._known[row] for row in set(rows) & self._known.keys()}
