"""A text in portions, for a training that lasts until its time is up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sleb_cli.asked.text_names import is_written
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
from sleb_cli.engine.text.sources import is_read_whole
from sleb_cli.events import Notify

USES_OF_OWN_TEXT = 2
"""How often a sequence that the model wrote is trained on, because writing takes longer than training. Others are used
once, because repeated text teaches less."""


@dataclass(frozen=True)
class Portion:
    """Sequences, int64 [sequences, length], and the rows of them in the order in which they are trained on.

    `loss_mask` says which tokens count, bool of the same shape; None for all.
    """

    sequences: Tensor
    order: list[int]
    loss_mask: Tensor | None = None


class Portions:
    """Draws portions of a text, any of them by its number, in the shares of its sources.

    The sequences of a file or of WikiText-2 all come once before any comes again, in an order of the seed, and those
    that were fitted to before come last. Other data sets are shuffled by the number of the portion, and so is what the
    model writes.

    Args:
        fitted: the text that was drawn before.
        uses: returns how many sequences a process trains on in a portion of its own, from 0; one that is used twice
            counts twice. Later portions have no fewer.
        tokenizer: the model's tokenizer.
        load_model: returns the dense model, if it is to write.
        processes: how many take portions in turn.
        written: returns what the model wrote of a source for the fitted text, which the first portions take, as writing
            takes minutes.
    """

    def __init__(
        self,
        fitted: CalibrationSettings,
        uses: Callable[[int], int],
        tokenizer: Any,
        load_model: Callable[[], Any],
        processes: int = 1,
        written: Callable[[str], Sequences | None] = lambda source: None,
    ) -> None:
        self._fitted, self._uses, self._processes, self._written = fitted, uses, processes, written
        self._fewest = max(math.ceil(1 / share) for share in fitted.shares.values())  # with some of every source
        self._tokenizer, self._load_model = tokenizer, load_model
        self._whole: dict[str, Sequences] = {}

    def draw(self, number: int, notify: Notify, most: int = 0) -> Portion:
        """Return the portion of this number, from 0; if `most` is given, about so many sequences of it.

        Raises what `calibrate` raises.
        """
        seed = self._fitted.seed + 1 + number
        uses = self._uses_of(number)
        settings = replace(self._fitted, samples=uses, samples_given=False, seed=seed)
        found = {source: self._windows(source, settings) for source in settings.texts}
        if len(settings.shares) > 1:
            settings = limit_to_texts(settings, {source: len(rows) for source, (rows, _) in found.items()}, notify)
        taken = replace(settings, samples=min(settings.samples, max(self._fewest, most))) if most else settings
        counts = taken.counts
        rows = [self._taken(source, windows, number, settings, counts[source]) for source, windows in found.items()]
        given = sum(len(sequences) for sequences, _ in rows)
        for source in filter(is_written, settings.shares):
            samples = -(-counts[source] // USES_OF_OWN_TEXT)
            known = self._written(source) if number < self._processes else None
            own = range(number * samples, (number + 1) * samples)
            if known is not None and own.stop <= len(known[0]):
                rows.append(take_sequences(known, own))
            else:
                rows.append(write_sequences(source, samples, taken, self._load_model(), self._tokenizer, notify))
        sequences, loss_mask = join_sequences(rows)
        return Portion(sequences, _order(given, len(sequences), f"{self._fitted.seed}/{number}"), loss_mask)

    def _uses_of(self, number: int) -> int:
        return max(self._fewest, self._uses(number // self._processes))

    def _windows(self, source: str, settings: CalibrationSettings) -> Sequences:
        """Return the windows of a source, those of one that is read whole in their order; it is read only once."""
        if source in self._whole:
            return self._whole[source]
        windows, _ = found = read_windows(source, settings.counts[source], settings, self._tokenizer)
        if is_read_whole(source):
            last = draw(len(windows), self._fitted.counts[source], self._fitted.seed)
            first = sorted(set(range(len(windows))) - set(last))
            shuffle = random.Random(self._fitted.seed)
            order = [*shuffle.sample(first, len(first)), *shuffle.sample(last, len(last))]
            found = self._whole[source] = take_sequences(found, order)
        return found

    def _taken(self, source: str, found: Sequences, number: int, settings: CalibrationSettings, most: int) -> Sequences:
        """Return what this portion takes of a source: the next windows, or of what was shuffled any."""
        windows, _ = found
        wanted = min(most, len(windows))
        if source not in self._whole:
            return take_sequences(found, draw(len(windows), wanted, settings.seed))
        # A short text limits all portions alike.
        samples = (min(self._uses_of(before), settings.samples) for before in range(number))
        start = sum(min(replace(settings, samples=each).counts[source], len(windows)) for each in samples)
        return take_sequences(found, [(start + row) % len(windows) for row in range(wanted)])


def _order(given: int, count: int, seed: str) -> list[int]:
    """Return an order of `count` rows: the first `given` come once, the others several times, spread over it."""
    shuffle = random.Random(seed)
    once, own = shuffle.sample(range(given), given), list(range(given, count))
    uses = USES_OF_OWN_TEXT if own else 1
    order: list[int] = []
    for use in range(uses):
        rows = once[given * use // uses : given * (use + 1) // uses] + own
        order += shuffle.sample(rows, len(rows))
    return order
