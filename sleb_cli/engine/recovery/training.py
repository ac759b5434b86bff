"""Train a pruned model until its budget is used, or the validation text improves no more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from pydantic import BaseModel

from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.recovery.distillation import Batch, Distillation, learning_rate
from sleb_cli.engine.recovery.heal_budget import Clock, HealBudget
from sleb_cli.engine.recovery.low_rank import LowRank
from sleb_cli.engine.recovery.stage import Job, whole_model
from sleb_cli.engine.recovery.training_text import TrainingText
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.windows import whole_mask
from sleb_cli.events import Advance, HealChecked, Notice
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


class Progress(BaseModel, strict=True, extra="forbid"):
    """The progress of a training, besides its tensors; `position` is in a portion of the text."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    portion: int = 0
    position: int = 0
    checks: int = 0
    stale: int = 0
    best_divergence: float = math.inf
    best_tokens: int = 0


class Training:
    """A training and its progress.

    Attributes:
        size: how many sequences a step trains on.
        micro_batch: how many of them at once; fewer once memory has run out.
        checked: the validation text, which chooses the best point, and is never trained on.
        best: the values at the best point.
    """

    def __init__(
        self,
        job: Job,
        budget: HealBudget,
        distillation: Distillation,
        weights: LowRank,
        name: str,
        advance: Advance,
    ) -> None:
        self.job = job
        self.budget = budget
        self.distillation = distillation
        self.weights = weights
        length = job.validation.sequences.shape[1]
        self.size = max(1, BATCH_TOKENS // length)
        self.text = TrainingText(
            job.settings.splits[0],
            job.train,
            self.size,
            load_tokenizer(job.settings.surgery.architecture.source),
            partial(whole_model, job.dense),
        )
        self.micro_batch = self.size
        self.has_skipped = False
        self.checked = self._checked_batches(max(1, CHECKED_TOKENS // length))
        self.best = weights.values.detach().clone()
        self.name = name
        self.state = {f"trained.{key}": tensor for key, tensor in weights.state.items()}
        self.state["best"] = self.best
        restored = job.state.restore(name, Progress, self.state)
        if restored:
            weights.write_weights()
            tokens = f"{restored.tokens:,} tokens"
            job.notify(Notice(f"Continuing an interrupted healing, after {tokens}."))
        self.progress = restored or Progress()
        self.clock = Clock(budget, advance, self.progress.seconds)

    def _checked_batches(self, count: int) -> list[Batch]:
        text = self.job.validation
        ids = torch.split(text.sequences[:count], self.size)
        counted = torch.split(whole_mask(text.sequences, text.loss_mask)[:count], self.size)
        return [self.distillation.batch(*pair) for pair in zip(ids, counted, strict=True)]

    def run(self) -> Literal["budget", "patience"]:
        """Train, set the weights to the best values, and return why training stopped."""
        progress = self.progress
        if math.isinf(progress.best_divergence):
            self._check(0.0)
        batches = self._batches()
        used = self._used()
        while used < 1 and progress.stale < PATIENCE:
            loss = self._step(next(batches), used)
            used = self._used()
            if int(used * CHECKS) > progress.checks or used >= 1:
                progress.checks = int(used * CHECKS)
                self._check(loss)
            self.job.state.save_if_due(self.name, progress, self.state)
        self.job.state.save(self.name, progress, self.state)  # what comes next may fail, too
        self.weights.values.data.copy_(self.best)
        self.weights.write_weights()
        return "budget" if used >= 1 else "patience"

    def _used(self) -> float:
        """Return the share of the budget that is used."""
        self.progress.seconds = self.clock.seconds()
        return self.budget.used(self.progress.seconds, self.progress.tokens) / self.budget.total

    def _batches(self) -> Iterator[Batch]:
        progress = self.progress

        def show_time(event: object) -> None:
            self.clock.tell(progress.tokens)  # time passes while text is written

        while True:
            sequences, loss_mask = self.text.portion(progress.portion, show_time)
            counted = whole_mask(sequences, loss_mask)
            while progress.position < len(sequences):
                rows = slice(progress.position, progress.position + self.size)
                progress.position += self.size
                yield self.distillation.batch(sequences[rows], counted[rows])
            progress.portion += 1
            progress.position = 0

    def _step(self, batch: Batch, used: float) -> float:
        """Take a step, and return the loss."""
        progress = self.progress
        tokens = batch.ids.numel()
        ahead = 0.0
        if self.budget.tokens is not None:
            ahead = tokens / self.budget.tokens / 2  # to the middle of the step
        rate = learning_rate(LEARNING_RATE, used + ahead, progress.steps)
        add = partial(self._add_gradient, batch)
        device = batch.ids.device
        loss = in_smaller_pieces(
            add, self.micro_batch, device, self.job.notify, "healing {} sequences"
        )
        gradient = self.weights.take_gradient()
        if gradient.isfinite().all():
            self.weights.step(gradient, rate)
        elif not self.has_skipped:
            self.has_skipped = True
            self.job.notify(
                Notice(
                    "Skipping steps whose gradient is not finite: the model overflows on some text."
                )
            )
        progress.steps += 1
        progress.tokens += tokens
        self.clock.tell(progress.tokens)
        return loss

    def _add_gradient(self, batch: Batch, size: int) -> float:
        """Add the gradient of the mean divergence, `size` sequences at once; return the mean."""
        if size < self.micro_batch:
            self.micro_batch = size
            self.weights.take_gradient()  # drops gradients of pieces before memory ran out
        total = 0.0
        for tensors in zip(*(torch.split(tensor, size) for tensor in batch), strict=True):
            piece = Batch(*tensors)
            share = piece.targets / batch.targets
            total += share * self.distillation.add_gradient(piece, share)
        return total

    def _check(self, loss: float) -> None:
        progress = self.progress
        divergence = self._divergence()
        if progress.steps == 0 and not math.isfinite(divergence):
            raise ModelError(
                f"On the validation text, the divergence from the dense model is {divergence}.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or "
                "float32.",
            )
        used = self._used()
        if divergence < progress.best_divergence:
            self.best.copy_(self.weights.values.data)
            progress.best_divergence = divergence
            progress.best_tokens = progress.tokens
            progress.stale = 0
        elif used > 0.5:
            progress.stale += 1
        if progress.steps:
            self.job.notify(HealChecked(min(1.0, used), loss, divergence))

    @torch.inference_mode()
    def _divergence(self) -> float:
        total = 0.0
        for batch in self.checked:
            total += self.distillation.divergence(batch)
        return total / sum(batch.targets for batch in self.checked)
