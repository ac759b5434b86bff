"""Draw a text in portions, for a training that lasts until its time is up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sleb_cli.engine.text.calibration import (
    Sequences,
    draw,
    join_sequences,
    limit_to_texts,
    read_windows,
    take_sequences,
    write_sequences,
)
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.events import Notify
from sleb_cli.texts.named import is_written, text_source

USES_OF_OWN_TEXT = 2
"""How often a sequence that the model wrote is trained on, because writing takes longer than
training. Others are used once, because repeated text teaches less.
"""


@dataclass(frozen=True)
class Portion:
    """Sequences, int64 [sequences, length], their rows in the order of training, and their loss
    mask.
    """

    sequences: Tensor
    order: list[int]
    loss_mask: Tensor | None = None


class Portions:
    """Draws portions of a text, any of them by its number, in the shares of its sources.

    The sequences of a file or of WikiText-2 all come once before any comes again, in an order of
    the seed, and the ones that were `fitted` before come last. Other data sets, and text that the
    model writes, are drawn by the number of the portion.

    Args:
        sequences_per_portion: returns how many sequences a process trains on in its portion of this
            number, from 0; one that is used twice counts twice. Later portions have no fewer.
        processes: how many take portions in turn.
        written: returns the sequences of a source that the model wrote for the fitted text; the
            first portions take them, as writing takes minutes.
    """

    def __init__(
        self,
        fitted: CalibrationSettings,
        sequences_per_portion: Callable[[int], int],
        tokenizer: Any,
        load_model: Callable[[], Any],
        processes: int = 1,
        written: Callable[[str], Sequences | None] = lambda source: None,
    ) -> None:
        self._fitted, self._processes, self._written = fitted, processes, written
        self._sequences_per_portion = sequences_per_portion
        self._min_sequences = max(
            math.ceil(1 / share) for share in fitted.shares.values()
        )  # with some of every source
        self._tokenizer, self._load_model = tokenizer, load_model
        self._whole: dict[str, Sequences] = {}

    def draw(self, number: int, notify: Notify, most: int = 0) -> Portion:
        """Draw the portion of this number, from 0, or about `most` sequences of it; raises what
        `calibrate` raises.
        """
        seed = self._fitted.seed + 1 + number
        count = self._sequences_in(number)
        settings = replace(self._fitted, samples=count, samples_given=False, seed=seed)
        texts = {source: self._windows(source, settings) for source in settings.given_counts}
        if len(settings.shares) > 1:
            settings = limit_to_texts(
                settings, {source: len(rows) for source, (rows, _) in texts.items()}, notify
            )
        reduced = (
            replace(settings, samples=min(settings.samples, max(self._min_sequences, most)))
            if most
            else settings
        )
        counts = reduced.counts
        rows = [
            self._rows_for(source, text_rows, number, settings, counts[source])
            for source, text_rows in texts.items()
        ]
        given = sum(len(sequences) for sequences, _ in rows)
        for source in filter(is_written, settings.shares):
            samples = -(-counts[source] // USES_OF_OWN_TEXT)
            known = self._written(source) if number < self._processes else None
            own_rows = range(number * samples, (number + 1) * samples)
            if known is not None and own_rows.stop <= len(known[0]):
                rows.append(take_sequences(known, own_rows))
            else:
                rows.append(
                    write_sequences(
                        source, samples, reduced, self._load_model(), self._tokenizer, notify
                    )
                )
        sequences, loss_mask = join_sequences(rows)
        return Portion(
            sequences, _order(given, len(sequences), f"{self._fitted.seed}/{number}"), loss_mask
        )

    def _sequences_in(self, number: int) -> int:
        return max(self._min_sequences, self._sequences_per_portion(number // self._processes))

    def _windows(self, source: str, settings: CalibrationSettings) -> Sequences:
        if source in self._whole:
            return self._whole[source]
        windows, _ = all_rows = read_windows(
            source, settings.counts[source], settings, self._tokenizer
        )
        if not text_source(source).is_endless:
            # Windows that were fitted before come last.
            last = draw(len(windows), self._fitted.counts[source], self._fitted.seed)
            first = sorted(set(range(len(windows))) - set(last))
            shuffle = random.Random(self._fitted.seed)
            order = [*shuffle.sample(first, len(first)), *shuffle.sample(last, len(last))]
            all_rows = self._whole[source] = take_sequences(all_rows, order)
        return all_rows

    def _rows_for(
        self, source: str, rows: Sequences, number: int, settings: CalibrationSettings, most: int
    ) -> Sequences:
        windows, _ = rows
        count = min(most, len(windows))
        if source not in self._whole:
            return take_sequences(rows, draw(len(windows), count, settings.seed))
        # Earlier portions took the first windows of such a source. A short text limits all portions
        # alike.
        samples = (min(self._sequences_in(before), settings.samples) for before in range(number))
        start = sum(
            min(replace(settings, samples=size).counts[source], len(windows)) for size in samples
        )
        return take_sequences(rows, [(start + row) % len(windows) for row in range(count)])


def _order(given: int, count: int, seed: str) -> list[int]:
    # The first `given` rows come once; rows that the model wrote come several times, spread over
    # the order.
    shuffle = random.Random(seed)
    once, written = shuffle.sample(range(given), given), list(range(given, count))
    uses = USES_OF_OWN_TEXT if written else 1
    order: list[int] = []
    for use in range(uses):
        rows = once[given * use // uses : given * (use + 1) // uses] + written
        order += shuffle.sample(rows, len(rows))
    return order
