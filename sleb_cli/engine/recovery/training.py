"""Train a pruned model until its budget is used, or until it stops improving on the validation
text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from sleb_cli.engine.forward.forecast import announce
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.recovery.distillation import Batch, Distillation, TeacherStates, learning_rate
from sleb_cli.engine.recovery.heal_budget import Clock, HealBudget
from sleb_cli.engine.recovery.loss_scale import BACKOFF, MIN_SCALE, starting_scale
from sleb_cli.engine.recovery.low_rank import LowRank
from sleb_cli.engine.recovery.stage import Job, whole_model
from sleb_cli.engine.recovery.unfinished import Saves
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.portions import Portion, Portions
from sleb_cli.events import Advance, HealChecked, Notice
from sleb_cli.texts.named import is_reference
from sleb_plugins import ModelError

LEARNING_RATE = 1.5e-3
"""The highest; steps are relative to the size of each weight (`low_rank.py`)."""

BATCH_TOKENS = 512

CHECKS = 10
"""How many times the validation text is measured over the whole budget."""
PATIENCE = 3
"""Training stops after this many checks without a lower divergence, in the second half of the
budget: in the first, the learning rate is too high to tell.
"""
CHECKED_TOKENS = 2048

SCALE_HEADROOM = 16
"""How many times the scale of a single token a float16 loss starts with; it is lowered where that
overflows.
"""

Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(ge=0, lt=2**62, allow_inf_nan=False)]


class Progress(BaseModel, strict=True, extra="forbid"):
    """The progress of a training, besides its tensors; `scale` is the loss scale.

    `portion` and `position` locate it in the text; `most` limits the portion's sequences, if not 0.
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


class Trainer:
    """Takes the steps of a training, in pieces that fit into memory."""

    def __init__(self, job: Job, distillation: Distillation, weights: LowRank, size: int) -> None:
        self.job, self.distillation, self.weights = job, distillation, weights
        self.micro_batch, self.has_skipped = size, False

    def step(self, batch: Batch, rate: float, scale: float) -> tuple[float, float]:
        """Take a step with the loss scaled; return the loss, and the scale for the next step."""
        loss, gradient, scale = self.gradient(batch, scale)
        if bool(gradient.isfinite().all()):
            self.weights.step(gradient, rate)
        elif not self.has_skipped:
            self.has_skipped = True
            self.job.notify(
                Notice(
                    "Skipping steps whose gradient is not finite: the model overflows on some text."
                )
            )
        return loss, scale

    def gradient(self, batch: Batch, scale: float) -> tuple[float, Tensor, float]:
        """Return the loss, the mean gradient of all processes, and the scale, lower after an
        overflow.
        """
        before, is_scaled = scale, self.weights.dtype is torch.float16
        while True:
            loss = self._add_gradients(batch, scale)
            gradient = self.job.group.mean(self.weights.take_gradient())
            is_finite = bool(gradient.isfinite().all())
            if is_finite or not is_scaled or scale <= MIN_SCALE:
                return (
                    loss,
                    gradient.div_(scale),
                    scale if is_finite else before,
                )  # no scale helps on this text
            scale *= BACKOFF

    def _add_gradients(self, batch: Batch, scale: float) -> float:
        def add(size: int) -> float:
            if size < self.micro_batch:
                self.micro_batch = size
                # drops gradients of pieces before the one that ran out of memory
                self.weights.take_gradient()
            total, count = 0.0, int(batch.counted[:, 1:].sum())
            for micro_batch in map(Batch, *(torch.split(tensor, size) for tensor in batch)):
                share = int(micro_batch.counted[:, 1:].sum()) / count
                total += share * self.distillation.add_gradient(micro_batch, share * scale)
            return total

        return in_smaller_pieces(
            add, self.micro_batch, batch.ids.device, self.job.notify, "healing {} sequences"
        )


class Training:
    """A training and its progress.

    Attributes:
        size: how many sequences a process trains on in a step.
        checked: the validation text, which chooses the best point, and is never trained on.
        best: the values at the best point.
    """

    def __init__(
        self,
        job: Job,
        budget: HealBudget,
        distillation: Distillation,
        weights: LowRank,
        file: Path,
        advance: Advance,
    ) -> None:
        self.job, self.budget, self.distillation = job, budget, distillation
        self.weights, self.portions = weights, _portions(job, budget)
        length = job.validation.sequences.shape[1]
        self.size = max(1, BATCH_TOKENS // length)
        order = [*range(len(job.validation.sequences))][: max(1, CHECKED_TOKENS // length)]
        text = job.validation.select(order)
        self.checked = TeacherStates(
            distillation, Portion(text.sequences, order, text.loss_mask), self.size
        )
        self.best = weights.values.detach().clone()
        state = {f"trained.{name}": tensor for name, tensor in weights.state.items()} | {
            "best": self.best
        }
        self.saves = Saves(file, state, job.settings.surgery.architecture.source.watch, job.group)
        scale = starting_scale(weights.dtype, self.size * length * SCALE_HEADROOM)
        restored = self.saves.restore(Progress)
        self.progress = restored or Progress(scale=scale)
        if restored:
            weights.write_weights()
            if job.group.is_main:
                job.notify(
                    Notice(f"Continuing an interrupted healing, after {restored.tokens:,} tokens.")
                )
        self.trainer = Trainer(job, distillation, weights, self.size)
        self._announce()
        self.clock = Clock(budget, advance, self.progress.seconds)

    def _announce(self) -> None:
        if self.budget.tokens is None:
            return  # the user named the minutes
        teacher, student = self.distillation.teacher.skippable, self.distillation.student.skippable
        left, first = self.budget.tokens - self.progress.tokens, self.distillation.first
        # Each product of the student's trained part has two more backwards, each of its head has
        # one. Writing text is not counted.
        through_blocks = (
            len(teacher.switches) + 3 * (len(student.switches) - first) + 3 * teacher.head_blocks
        )
        title, batch = f"Healing: {left:,} tokens", self.checked.rows[: self.size]
        announce(
            self.job.notify, title, through_blocks * left / self.job.group.size, teacher, batch
        )

    def run(self) -> Literal["budget", "patience"]:
        """Train, set the weights to the best values, and return why training stopped."""
        progress = self.progress
        if math.isinf(progress.best_divergence):
            self._check(0.0)
        batches, used = self._batches(), self._used()
        while used < 1 and progress.stale < PATIENCE:
            loss = self._step(next(batches), used)
            used = self._used()
            if int(used * CHECKS) > progress.checks or used >= 1:
                progress.checks = int(used * CHECKS)
                self._check(loss)
            self.saves.save_if_due(progress)
        self.saves.save(progress)  # what comes next may fail, too
        self.weights.values.data.copy_(self.best)
        self.weights.write_weights()
        return "budget" if used >= 1 else "patience"

    def _used(self) -> float:
        # The main process's clock counts, so that all stop at the same step.
        self.progress.seconds = self.job.group.from_main(self.clock.seconds)
        return self.budget.used(self.progress.seconds, self.progress.tokens) / self.budget.total

    def _step(self, batch: Batch, used: float) -> float:
        progress, tokens = self.progress, batch.ids.numel() * self.job.group.size
        # The learning rate is that of the middle of the step.
        ahead = tokens / self.budget.total / 2 if self.budget.tokens is not None else 0.0
        rate = learning_rate(LEARNING_RATE, used + ahead, progress.steps)
        loss, progress.scale = self.trainer.step(batch, rate, progress.scale)
        progress.steps += 1
        progress.tokens += tokens
        self.clock.tell(progress.tokens)
        return loss

    def _check(self, loss: float) -> None:
        progress, divergence = self.progress, self.job.group.from_main(self._divergence)
        if not (progress.steps or math.isfinite(divergence)):
            raise ModelError(
                f"On the validation text, the divergence from the dense model is {divergence}.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or "
                "float32.",
            )
        used = self._used()
        if divergence < progress.best_divergence:
            self.best.copy_(self.weights.values.data)
            progress.best_divergence, progress.best_tokens = divergence, progress.tokens
            progress.stale = 0
        else:
            progress.stale += used > 0.5
        if progress.steps:
            self.job.notify(HealChecked(min(1.0, used), loss, divergence))

    @torch.inference_mode()
    def _divergence(self) -> float:
        total = sum(
            self.distillation.divergence(self.checked.batch(rows)) for rows in self.checked.batches
        )
        return total / int(self.checked.counted[:, 1:].sum())

    def _batches(self) -> Iterator[Batch]:
        progress, group, length = (
            self.progress,
            self.job.group,
            self.job.validation.sequences.shape[1],
        )
        while True:
            number = progress.portion * group.size + group.rank
            # Time passes while text is written.
            portion = self.portions.draw(
                number, lambda event: self.clock.tell(progress.tokens), progress.most
            )
            order = portion.order
            states = TeacherStates(self.distillation, portion, self.size)
            while progress.position < len(order):
                start = progress.position
                progress.position += self.size
                yield states.batch(order[start : progress.position])
                states.keep(order[progress.position :])
            left = self.budget.tokens_left(progress.seconds, progress.tokens)
            progress.portion, progress.position = progress.portion + 1, 0
            progress.most = max(1, math.ceil(left / length / group.size))


def _portions(job: Job, budget: HealBudget) -> Portions:
    text = job.settings.splits[0]
    # Samples of a reference preset are rows of text: read no more than were fitted to.
    most = text.samples if is_reference(text.source) else math.inf

    def uses(portion: int) -> int:
        return int(min(most, -(-budget.portion_tokens(portion) // text.sequence_length)))

    tokenizer, load_model = (
        load_tokenizer(job.settings.surgery.architecture.source),
        partial(whole_model, job.dense),
    )
    return Portions(text, uses, tokenizer, load_model, job.group.size, job.train.sequences_of)
