"""The text of a training: an endless stream of sequences, in portions of one size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from sleb_cli.engine.recovery.distillation import Batch, Distillation
from sleb_cli.engine.recovery.stage import Job, whole_model
from sleb_cli.engine.recovery.training import TransferSet
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import (
    Calibration,
    Sequences,
    draw,
    join_sequences,
    read_windows,
    take_sequences,
    write_sequences,
)
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.windows import whole_mask
from sleb_cli.events import Notify
from sleb_cli.texts.named import text_source

BATCH_TOKENS = 512
CHECKED_TOKENS = 2048

USES_OF_OWN_TEXT = 2
"""How often a sequence that the model wrote is trained on, because writing takes longer than
training. Others are used once, because repeated text teaches less.
"""


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

    The sequences of a file or of WikiText-2 all come once before any comes again, in an order of
    the seed, and those that were `fitted` come last. Other data sets, and text that the model
    writes, are drawn by the number of the portion; the first portions take what the model wrote
    for the fitted text, as writing takes minutes.

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
        self._fitted_settings = settings
        self._size = max(step, len(fitted.sequences) // step * step)
        # Samples of a reference preset are rows of text.
        samples = settings.samples if settings.is_reference else self._size
        self._settings = replace(settings, samples=samples, samples_given=False)
        self._fitted = fitted
        self._tokenizer = tokenizer
        self._load_model = load_model
        self._shuffled: dict[str, Sequences] = {}

    def portion(self, number: int, notify: Notify) -> Sequences:
        """Return the sequences of this portion, from 0, in the order of training.

        Raises what `calibrate` raises.
        """
        shuffle = random.Random(f"{self._settings.seed}/{number}")
        first_half: list[Sequences] = []
        second_half: list[Sequences] = []
        for source, count in self._settings.counts.items():
            if not count:
                continue
            if text_source(source).is_written:
                rows = self._own(source, -(-count // USES_OF_OWN_TEXT), number, notify)
                first_half.append(rows)
                second_half.append(rows)  # again, long after the first time
            else:
                rows = self._given(source, count, number)
                available = len(rows[0])
                drawn = shuffle.sample(range(available), available)
                middle = available // 2
                first_half.append(take_sequences(rows, drawn[:middle]))
                second_half.append(take_sequences(rows, drawn[middle:]))
        halves = [_shuffle(first_half, shuffle), _shuffle(second_half, shuffle)]
        sequences = join_sequences(halves)
        return take_sequences(sequences, range(min(self._size, len(sequences[0]))))

    def _given(self, source: str, count: int, number: int) -> Sequences:
        if not text_source(source).is_endless:
            rows = self._read_shuffled(source)
            available = len(rows[0])
            start = number * count
            return take_sequences(rows, [at % available for at in range(start, start + count)])
        settings = replace(self._settings, seed=self._settings.seed + 1 + number)
        rows = read_windows(source, count, settings, self._tokenizer)
        return take_sequences(rows, draw(len(rows[0]), count, settings.seed))

    def _read_shuffled(self, source: str) -> Sequences:
        if source not in self._shuffled:
            settings = self._fitted_settings
            fitted_count = settings.counts[source]
            rows = read_windows(source, fitted_count, settings, self._tokenizer)
            available = len(rows[0])
            fitted = draw(available, fitted_count, settings.seed)
            unseen = sorted(set(range(available)).difference(fitted))
            shuffle = random.Random(settings.seed)
            order = shuffle.sample(unseen, len(unseen))
            order += shuffle.sample(fitted, len(fitted))
            self._shuffled[source] = take_sequences(rows, order)
        return self._shuffled[source]

    def _own(self, source: str, count: int, number: int, notify: Notify) -> Sequences:
        known = self._fitted.sequences_of(source)
        rows = range(number * count, (number + 1) * count)
        if rows.stop <= len(known[0]):
            return take_sequences(known, rows)
        settings = replace(self._settings, seed=self._settings.seed + 1 + number)
        model = self._load_model()
        return write_sequences(source, count, settings, model, self._tokenizer, notify)


def _shuffle(rows: list[Sequences], shuffle: random.Random) -> Sequences:
    joined = join_sequences(rows)
    count = len(joined[0])
    return take_sequences(joined, shuffle.sample(range(count), count))
