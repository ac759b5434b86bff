"""Train a pruned model until its budget is used, or the validation text improves no more.

The best point is the one with the least divergence among those where no text is worse than it was.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.recovery.stage import Job
from sleb_cli.engine.recovery.weights import FlatWeights
from sleb_cli.events import Advance, HealChecked, Notice, Notify
from sleb_plugins import ModelError

WARMUP_STEPS = 6
CHECKS = 10
"""How many times at most the validation text is measured over the whole budget."""
TRAINED_PER_CHECKED = 4
"""How many tokens are trained on at least between two checks for each token that is checked."""
PATIENCE = 3
"""Training stops after this many checks without a lower divergence, in the second half of the
budget: in the first, the learning rate is too high to tell.
"""


@dataclass(frozen=True)
class HealBudget:
    """When to stop: after minutes or after tokens."""

    minutes: float | None
    tokens: int | None

    @property
    def total(self) -> int:
        """The budget in its own unit, seconds or tokens."""
        if self.tokens is not None:
            return self.tokens
        return max(1, round(60 * (self.minutes or 0)))

    def used(self, seconds: float, tokens: int) -> float:
        """Return the seconds used, or the tokens where the budget is tokens."""
        if self.tokens is not None:
            return float(tokens)
        return seconds


class Clock:
    """Times a healing without its interruptions, and moves its progress bar."""

    def __init__(self, budget: HealBudget, advance: Advance, seconds: float) -> None:
        self._budget = budget
        self._advance = advance
        self._began = time.monotonic() - seconds
        self._told = 0

    def seconds(self) -> float:
        """Return the seconds since the healing began."""
        return time.monotonic() - self._began

    def tell(self, tokens: int) -> None:
        """Move the progress bar to the share of the budget used after `tokens`."""
        new = int(self._budget.used(self.seconds(), tokens) - self._told)
        if new:
            self._advance(new)
            self._told += new


class Progress(BaseModel, strict=True, extra="forbid"):
    """The progress of a training, besides its tensors.

    `position` is in a portion of the text; `checked_at` is the tokens at the last check, and
    `untrained` has each text's divergence at the start.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    portion: int = 0
    position: int = 0
    checks: int = 0
    checked_at: int = 0
    stale: int = 0
    best_divergence: float = math.inf
    best_tokens: int = 0
    untrained: dict[str, float] = Field(default_factory=dict)


class TransferSet(ABC):
    """The text of a training in batches, with what the dense model makes of it.

    A batch says how many `targets` it has and how many `tokens`, and can be `split`.

    Attributes:
        size: how many sequences a batch has.
        checked: the validation text by source, which chooses the best point, and is never
            trained on.
        distillation: the gradient and the divergence of a batch.
        measure: what the divergence is called in messages.
    """

    size: int
    checked: Mapping[str, Sequence[Any]]
    distillation: Any
    measure = "KL to the dense model"

    @abstractmethod
    def batches(self, portion: int, begin: int, notify: Notify) -> Iterator[Any]:
        """Return the batches of a portion of the text, from 0, from this sequence of it on."""


class Training:
    """A training and its progress.

    Attributes:
        rate: the highest learning rate.
        micro_batch: how many sequences are trained on at once; fewer once memory has run out.
        best: the values at the best point.
    """

    def __init__(
        self,
        job: Job,
        budget: HealBudget,
        texts: TransferSet,
        weights: FlatWeights,
        rate: float,
        name: str,
        advance: Advance,
    ) -> None:
        self.job = job
        self.budget = budget
        self.texts = texts
        self.weights = weights
        self.rate = rate
        self.micro_batch = texts.size
        self.has_skipped = False
        checked = (batch for batches in texts.checked.values() for batch in batches)
        self.min_pause = TRAINED_PER_CHECKED * sum(batch.tokens for batch in checked)
        self.best = weights.values.detach().clone()
        self.name = name
        self.state = {f"trained.{key}": tensor for key, tensor in weights.state.items()}
        self.state["best"] = self.best
        restored = job.state.restore(name, Progress, self.state)
        self.progress = restored or Progress()
        self.clock = Clock(budget, advance, self.progress.seconds)
        if restored:
            weights.write_weights()
            done = f"{restored.tokens:,} tokens ({self._used():.0%})"
            job.notify(Notice(f"Continuing an interrupted healing, after {done}."))

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
            is_due = int(used * CHECKS) > progress.checks
            if used >= 1 or (is_due and progress.tokens - progress.checked_at >= self.min_pause):
                progress.checks = int(used * CHECKS)
                progress.checked_at = progress.tokens
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

    def _batches(self) -> Iterator[Any]:
        progress = self.progress

        def show_time(event: object) -> None:
            self.clock.tell(progress.tokens)  # time passes while text is written

        while True:
            for batch in self.texts.batches(progress.portion, progress.position, show_time):
                progress.position += self.texts.size
                yield batch
            progress.portion += 1
            progress.position = 0

    def _step(self, batch: Any, used: float) -> float:
        """Take a step, and return the loss."""
        progress = self.progress
        tokens = batch.tokens
        ahead = 0.0
        if self.budget.tokens is not None:
            ahead = tokens / self.budget.tokens / 2  # to the middle of the step
        rate = learning_rate(self.rate, used + ahead, progress.steps)
        add = partial(self._add_gradient, batch)
        loss = in_smaller_pieces(
            add, self.micro_batch, self.job.dense.device, self.job.notify, "healing {} sequences"
        )
        if not self.weights.step(rate) and not self.has_skipped:
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

    def _add_gradient(self, batch: Any, size: int) -> float:
        """Add the gradient of the mean divergence, `size` sequences at once; return the mean."""
        if size < self.micro_batch:
            self.micro_batch = size
            self.weights.gradient.zero_()  # of pieces before memory ran out
        total = 0.0
        for piece in batch.split(size):
            share = piece.targets / batch.targets
            total += share * self.texts.distillation.add_gradient(piece, share)
        return total

    def _check(self, loss: float) -> None:
        progress = self.progress
        means = {}
        total = 0.0
        targets = 0
        for source, batches in self.texts.checked.items():
            of_source, count = self._sum(batches)
            means[source] = of_source / count
            total += of_source
            targets += count
        divergence = total / targets
        if progress.steps == 0 and not math.isfinite(divergence):
            raise ModelError(
                f"On the validation text, the divergence from the dense model is {divergence}.",
                hint="Use other text, or a data type with a wider range: --dtype bfloat16 or "
                "float32.",
            )
        if progress.steps == 0:
            progress.untrained = means
        used = self._used()
        is_no_worse = all(means[source] <= before for source, before in progress.untrained.items())
        if is_no_worse and divergence < progress.best_divergence:
            self.best.copy_(self.weights.values.data)
            progress.best_divergence = divergence
            progress.best_tokens = progress.tokens
            progress.stale = 0
        elif used > 0.5:
            progress.stale += 1
        if progress.steps:
            self.job.notify(HealChecked(min(1.0, used), loss, divergence, self.texts.measure))

    @torch.inference_mode()
    def _sum(self, batches: Sequence[Any]) -> tuple[float, int]:
        """Return the divergence, summed over its targets, and their number."""
        total = 0.0
        targets = 0
        for batch in batches:
            total += self.texts.distillation.divergence(batch)
            targets += batch.targets
        return total, targets


def learning_rate(peak: float, share: float, steps: int) -> float:
    """Return the learning rate after `steps`: a linear warmup, then a cosine to 0.

    `share` of the budget is used.
    """
    # Adam's moments are unreliable in the first steps.
    warmup = (steps + 1) / WARMUP_STEPS
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return peak * min(warmup, cosine)
