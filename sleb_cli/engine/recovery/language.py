"""What the healing of a language model trains on: text, and the divergence from the dense model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleb_cli.engine.forward.logits import float32_slices, position_slices
from sleb_cli.engine.recovery import variant
from sleb_cli.engine.recovery.stage import Job, whole_model
from sleb_cli.engine.recovery.training import TransferSet
from sleb_cli.engine.recovery.variant import Variant, summed_losses
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import (
    Calibration,
    Sequences,
    join_sequences,
    read_windows,
    take_sequences,
    write_sequences,
)
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.windows import whole_mask
from sleb_cli.events import Notify
from sleb_cli.texts.named import text_source
from sleb_plugins.metrics.kl import compare_logits

BATCH_TOKENS = 512
CHECKED_TOKENS = 2048
USES_OF_OWN_TEXT = 2
"""In how many portions a sequence that the model wrote is trained on, because writing takes longer
than training. Others come once, because repeated text teaches less.
"""


@torch.no_grad()
def divergence_and_gradient(
    student: Tensor, teacher: Tensor, scale: float, counted: Tensor
) -> tuple[float, Tensor]:
    """Return KL(teacher || student) in nats, summed over the `counted` positions, and `scale` times
    its gradient.

    The logits are [..., vocabulary]. The gradient with respect to the student's, softmax(student) -
    softmax(teacher), has their data type; only slices of it are ever float32.
    """
    ours = student.flatten(0, -2)
    theirs = teacher.flatten(0, -2)
    gradient = torch.empty_like(ours)
    total = torch.zeros((), device=ours.device)
    for rows in float32_slices(ours):
        comparison = compare_logits(theirs[rows].float(), ours[rows].float())
        chosen = counted.flatten()[rows]
        total += comparison.divergence.mul_(chosen).sum()
        difference = comparison.q.sub_(comparison.p)
        gradient[rows] = difference.mul_(scale).mul_(chosen[:, None])
    return float(total), gradient.view_as(student)


class Batch(NamedTuple):
    """Sequences to train on, and the teacher's states before the first trained block, and final.

    `ids` are [batch, positions]; `counted` marks those that count as next tokens, bool of the same
    shape.
    """

    ids: Tensor
    counted: Tensor
    entering: Tensor
    teacher_final: Tensor

    @property
    def targets(self) -> int:
        """How many next tokens count."""
        return int(self.counted[:, 1:].sum())

    @property
    def tokens(self) -> int:
        """How many tokens the sequences have."""
        return self.ids.numel()

    def split(self, size: int) -> list[Batch]:
        """Cut into batches of `size` sequences."""
        pieces = zip(*(torch.split(tensor, size) for tensor in self), strict=True)
        return [Batch(*tensors) for tensors in pieces]


@dataclass(frozen=True)
class Distillation:
    """A student that learns a teacher's predictions; both share the blocks before `first`."""

    teacher: Variant
    student: Variant
    first: int

    @torch.no_grad()
    def batch(self, ids: Tensor, counted: Tensor) -> Batch:
        """Run the teacher on sequences; both tensors may be on any device."""
        device = self.teacher.skippable.device
        ids = ids.to(device)
        entering, final = self.teacher.entering_and_final_states(ids, self.first)
        return Batch(ids, counted.to(device), entering, final)

    def divergence(self, batch: Batch) -> float:
        """Sum the student's divergence over the next tokens that count."""
        final = self.student.final_states(batch.ids, (self.first, batch.entering))
        models = (self.student, self.teacher)
        states = (final, batch.teacher_final)
        return summed_losses(models, states, batch.ids, batch.counted).divergence

    def add_gradient(self, batch: Batch, scale: float = 1.0) -> float:
        """Add `scale` times the gradient of the mean divergence, and return that divergence."""
        ids = batch.ids
        counted = batch.counted[:, 1:]
        states = self.student.final_states(ids, (self.first, batch.entering))
        leaf = states.detach().requires_grad_()
        total = 0.0
        # Logits are large, so the gradient of the final states is summed over slices of them. One
        # pass follows.
        for positions in position_slices(ids, variant.POSITIONS):
            with torch.no_grad():
                theirs = self.teacher.logits(batch.teacher_final[:, positions], ids[:, positions])
            ours = self.student.logits(leaf[:, positions], ids[:, positions])
            divergence, gradient = divergence_and_gradient(
                ours, theirs, scale / batch.targets, counted[:, positions]
            )
            torch.autograd.backward(ours, gradient)
            total += divergence
        assert leaf.grad is not None
        self.student.skippable.backward(states, leaf.grad, ids.shape)
        return total / batch.targets


class LanguageSet(TransferSet):
    """The text of a language model's healing, which the teacher reads batch by batch."""

    def __init__(self, job: Job, distillation: Distillation) -> None:
        validation = job.validation
        length = validation.sequences.shape[1]
        self.size = max(1, BATCH_TOKENS // length)
        self.distillation = distillation
        self._text = TrainingText(
            job.settings.splits[0],
            job.train,
            self.size,
            load_tokenizer(job.settings.surgery.architecture.source),
            partial(whole_model, job.dense),
        )
        checked = validation.first_of_each(max(1, CHECKED_TOKENS // length))
        self.checked = {source: list(self._read(text, 0)) for source, text in checked.items()}

    def batches(self, portion: int, begin: int, notify: Notify) -> Iterator[Batch]:
        """Return the batches of a portion of the text."""
        return self._read(self._text.portion(portion, notify), begin)

    def _read(self, text: Sequences, begin: int) -> Iterator[Batch]:
        sequences, loss_mask = text
        counted = whole_mask(sequences, loss_mask)
        starts = range(begin, len(sequences), self.size)
        return map(partial(self._batch, sequences, counted), starts)

    def _batch(self, sequences: Tensor, counted: Tensor, start: int) -> Batch:
        rows = slice(start, start + self.size)
        batch: Batch = self.distillation.batch(sequences[rows], counted[rows])
        return batch


class TrainingText:
    """The text to train on, in the shares of its sources.

    The sequences of a file or of WikiText-2 all come once before any comes again. Other data sets,
    and text that the model writes, are drawn anew for later portions; the first ones take what the
    model wrote for the fitted text, as writing takes minutes.

    Args:
        settings: of the fitted text.
        fitted: the text that values were fitted to; a portion has about as many sequences.
        step: how many sequences a step of the training takes.
        load_model: returns the model that writes.
    """

    def __init__(
        self,
        settings: CalibrationSettings,
        fitted: Calibration,
        step: int,
        tokenizer: Any,
        load_model: Callable[[], Any],
    ) -> None:
        self._size = max(step, len(fitted.sequences) // step * step)
        # Samples of a reference preset are rows of text.
        samples = settings.samples if settings.is_reference else self._size
        self._settings = replace(settings, samples=samples, samples_given=False)
        self._fitted = fitted
        self._tokenizer = tokenizer
        self._load_model = load_model
        self._read: dict[tuple[str, int], Sequences] = {}

    def portion(self, number: int, notify: Notify) -> Sequences:
        """Return the sequences of this portion, from 0, in the order of training.

        Raises what `calibrate` raises.
        """
        rows = []
        for source, count in self._settings.counts.items():
            if not count:
                continue
            if text_source(source).is_written:
                rows.append(self._own(source, count, number // USES_OF_OWN_TEXT, notify))
            else:
                rows.append(self._given(source, count, number))
        joined = join_sequences(rows)
        count = len(joined[0])
        shuffle = random.Random(f"{self._settings.seed}/{number}")
        return take_sequences(joined, shuffle.sample(range(count), min(count, self._size)))

    def _given(self, source: str, count: int, number: int) -> Sequences:
        """Return the next `count` sequences of a source."""
        is_endless = text_source(source).is_endless
        seed = self._settings.seed + 1
        if is_endless:
            seed += number
            number = 0
        key = (source, seed)
        if key not in self._read:
            settings = replace(self._settings, seed=seed)
            self._read = {key: read_windows(source, count, settings, self._tokenizer)}
        rows = self._read[key]
        available = len(rows[0])
        order = random.Random(seed).sample(range(available), available)
        start = number * count
        return take_sequences(rows, [order[at % available] for at in range(start, start + count)])

    def _own(self, source: str, count: int, turn: int, notify: Notify) -> Sequences:
        """Return text that the model wrote, or writes."""
        known = self._fitted.sequences_of(source)
        if turn == 0 and count <= len(known[0]):
            return take_sequences(known, range(count))
        settings = replace(self._settings, seed=self._settings.seed + turn)
        model = self._load_model()
        return write_sequences(source, count, settings, model, self._tokenizer, notify)
