"""Make the sequences of tokens that candidates are scored on, and that recovery fits to."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sleb_cli.checks.mixture import interleave
from sleb_cli.checks.text_names import SELF, holds_conversations, is_written, writes_conversations
from sleb_cli.engine.text.chat import cut_conversations, render, require_template
from sleb_cli.engine.text.own_chat import write_conversations
from sleb_cli.engine.text.own_text import generate_own_text
from sleb_cli.engine.text.settings import CalibrationSettings, require_mixable
from sleb_cli.engine.text.sources import (
    WHOLE,
    calibration_conversations,
    calibration_text,
    reference_calibration_text,
)
from sleb_cli.engine.text.windows import (
    adds_bos,
    begin_with_bos,
    cut_running_text,
    cut_windows,
    require_windows,
    tokens_sha256,
    whole_mask,
)
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.names import ANSWERS
from sleb_cli.plan import CalibrationRecord


@dataclass(frozen=True)
class Calibration:
    """The calibration sequences, int64 [sequences, length], their record, and the source of each
    (`origins`).

    `loss_mask` marks the tokens whose prediction counts, bool of the same shape; None for all.
    """

    sequences: Tensor
    record: CalibrationRecord
    loss_mask: Tensor | None
    origins: tuple[str, ...]

    def select(self, rows: Sequence[int]) -> Calibration:
        """Return these sequences, in this order."""
        sequences, loss_mask = take_sequences((self.sequences, self.loss_mask), rows)
        return replace(
            self,
            sequences=sequences,
            loss_mask=loss_mask,
            origins=tuple(self.origins[row] for row in rows),
        )

    def sequences_of(self, source: str) -> Sequences:
        """Return the sequences of a source, and their loss mask."""
        rows = [row for row, origin in enumerate(self.origins) if origin == source]
        return take_sequences((self.sequences, self.loss_mask), rows)

    def shuffled(self) -> Calibration:
        """Return the sequences in the order that the seed draws for a race."""
        count = len(self.sequences)
        return self.select(random.Random(self.record.seed).sample(range(count), count))

    def to(self, device: torch.device) -> Calibration:
        """Move the tokens to a device."""
        loss_mask = None if self.loss_mask is None else self.loss_mask.to(device)
        return replace(self, sequences=self.sequences.to(device), loss_mask=loss_mask)


Sequences = tuple[Tensor, Tensor | None]
"""Sequences, and their loss mask (None: all tokens count)."""


def calibrate(
    splits: Sequence[CalibrationSettings],
    tokenizer: Any,
    load_model: Callable[[], Any],
    notify: Notify,
) -> list[Calibration]:
    """Return the sequences for each of several splits of the same text. Only the first must have
    some of every source.

    The sources of a mixture are interleaved evenly. If one has too little text, the mixture has
    fewer sequences, in the same shares. The model is loaded only if it writes some of them.

    Raises:
        DataError: the text is missing or too short.
        UsageError: no text is left for a part of the mixture.
    """
    first = splits[0]
    conversations = [source for source in first.shares if writes_conversations(source)]
    if first.chat is not None or conversations:
        require_template(tokenizer, conversations[0] if conversations else "--chat")
    drafts = [
        _read_texts(split, tokenizer, notify if split is first else ignore) for split in splits
    ]
    if first.samples_given and len(splits) > 1:
        _require_samples(splits, [rows for _, rows in drafts], tokenizer)
    for source in filter(is_written, first.shares):
        counts = [settings.counts[source] for settings, _ in drafts]
        if source.startswith(ANSWERS):  # prompts are divided like documents
            for (settings, rows), count in zip(drafts, counts, strict=True):
                if count:
                    rows[source] = write_sequences(
                        source, count, settings, load_model(), tokenizer, notify
                    )
        else:  # for all splits at once: each sequence is a document of its own
            written = write_sequences(source, sum(counts), first, load_model(), tokenizer, notify)
            for (_, rows), (begin, end) in zip(
                drafts, pairwise(accumulate(counts, initial=0)), strict=True
            ):
                rows[source] = take_sequences(written, range(begin, end))
    return [_interleave_sources(settings, rows, tokenizer) for settings, rows in drafts]


def _require_samples(
    splits: Sequence[CalibrationSettings],
    rows_of_splits: Sequence[Mapping[str, Sequences]],
    tokenizer: Any,
) -> None:
    whole = replace(splits[0], samples=sum(split.samples for split in splits), split=WHOLE)
    for source, count in whole.given_counts.items():
        read = [len(rows[source][0]) if source in rows else 0 for rows in rows_of_splits]
        # A split may have less than its share, but not all of them together.
        if any(have < split.counts[source] for split, have in zip(splits, read, strict=True)):
            read_windows(source, count, whole, tokenizer)


def write_sequences(
    source: str,
    samples: int,
    settings: CalibrationSettings,
    model: Any,
    tokenizer: Any,
    notify: Notify,
) -> Sequences:
    """Let the model write sequences of a source; raises what `calibrate` raises."""
    settings = replace(settings, samples=samples)
    if source == SELF:
        return generate_own_text(model, tokenizer, settings, notify), None
    answers = settings.chat == "answers" or (settings.chat is None and settings.own_answers)
    conversations = write_conversations(model, tokenizer, source, settings, notify)
    rows = cut_conversations(
        conversations, source, settings.sequence_length, answers=answers, required=samples
    )
    return take_sequences(rows, range(samples))


def take_sequences(rows: Sequences, chosen: Sequence[int]) -> Sequences:
    """Return these sequences, in this order."""
    sequences, loss_mask = rows
    return sequences[chosen], None if loss_mask is None else loss_mask[chosen]


def join_sequences(rows: Sequence[Sequences]) -> Sequences:
    """Join the sequences of several sources; where a source has no loss mask, all of its tokens
    count.
    """
    sequences = torch.cat([tokens for tokens, _ in rows])
    if all(mask is None for _, mask in rows):
        return sequences, None
    return sequences, torch.cat([whole_mask(tokens, mask) for tokens, mask in rows])


def _interleave_sources(
    settings: CalibrationSettings, rows: Mapping[str, Sequences], tokenizer: Any
) -> Calibration:
    sources = [source for source in settings.shares if source in rows]
    counts = [len(rows[source][0]) for source in sources]
    order = interleave(counts)
    sequences, loss_mask = take_sequences(
        join_sequences([rows[source] for source in sources]), order
    )
    record = CalibrationRecord(
        source=settings.source,
        seed=settings.seed,
        sequences=len(sequences),
        sequence_length=settings.sequence_length,
        bos=not settings.is_reference and begin_with_bos(tokenizer, sequences),
        chat=settings.chat,
        tokens_sha256=tokens_sha256(sequences),
    )
    origins = [source for source, count in zip(sources, counts, strict=True) for _ in range(count)]
    return Calibration(sequences, record, loss_mask, tuple(origins[row] for row in order))


def _read_texts(
    settings: CalibrationSettings, tokenizer: Any, notify: Notify
) -> tuple[CalibrationSettings, dict[str, Sequences]]:
    # Texts are read before the model writes any, since they may be missing or too short. The
    # settings that are returned have only as many samples as the texts provide.
    read, is_mixture = dict[str, Sequences](), len(settings.shares) > 1
    for source, count in settings.given_counts.items():
        with task(notify, f"Reading {source}"):
            windows, _ = rows = read_windows(source, count, settings, tokenizer)
            if len(windows) < count and not is_mixture and not settings.is_reference:
                notify(Notice(f"{_shortage(source, len(windows), settings)}; using all of them."))
        # A reference preset counts rows of text, and all of their windows are used.
        drawn = len(windows) if settings.is_reference else count
        read[source] = take_sequences(rows, draw(len(windows), drawn, settings.seed))
    if is_mixture:
        settings = limit_to_texts(
            settings, {source: len(rows) for source, (rows, _) in read.items()}, notify
        )
        read = {
            source: take_sequences(rows, draw(len(rows[0]), settings.counts[source], settings.seed))
            for source, rows in read.items()
        }
    return settings, read


def limit_to_texts(
    settings: CalibrationSettings, available: Mapping[str, int], notify: Notify
) -> CalibrationSettings:
    """Reduce the samples until the `available` sequences of each source suffice, in the given
    shares.

    Raises:
        UsageError: a source that had sequences would have none.
    """
    requested, had = (
        settings.samples,
        [source for source, count in settings.counts.items() if count],
    )
    while any(settings.counts[source] > count for source, count in available.items()):
        settings = replace(settings, samples=settings.samples - 1)
    if not settings.split.begin:  # the splits for validation and test may lack a source
        require_mixable(settings, had)
    if settings.samples < requested:
        scarce = min(available, key=lambda source: available[source] / settings.shares[source])
        mixed = f"the mixture has {settings.samples} sequences, not {requested}"
        notify(Notice(f"{_shortage(scarce, available[scarce], settings)}, so {mixed}."))
    return settings


def _shortage(source: str, count: int, settings: CalibrationSettings) -> str:
    return f"{source} has text for only {count} sequences of {settings.sequence_length} tokens"


def read_windows(
    source: str, samples: int, settings: CalibrationSettings, tokenizer: Any
) -> Sequences:
    """Cut enough of a text for `samples` windows, or all of a smaller one."""
    length, seed, split = settings.sequence_length, settings.seed, settings.split
    # The user's number is for the whole text, of which a split has only about its share.
    required = samples if settings.samples_given and split == WHOLE else None
    if settings.chat is not None and holds_conversations(source):
        conversations = calibration_conversations(
            source, samples=samples, length=length, seed=seed, split=split
        )
        answers = settings.chat == "answers"
        rendered = [
            render(tokenizer, conversation, source, answers=answers)
            for conversation in conversations
        ]
        return cut_conversations(rendered, source, length, answers=answers, required=required)
    if settings.is_reference:
        text = reference_calibration_text(source, rows=samples, seed=seed, split=split)
        return require_windows(
            cut_running_text(tokenizer, text.content, length), text, tokenizer, length
        ), None
    text = calibration_text(source, tokens=samples * length, seed=seed, split=split)
    windows = cut_windows(tokenizer, text.content, length, bos=adds_bos(tokenizer))
    return require_windows(windows, text, tokenizer, length, required), None


def draw(windows: int, count: int, seed: int) -> list[int]:
    """Draw `count` windows by the seed, in the order of the text; all if there are fewer."""
    return (
        list(range(windows))
        if count >= windows
        else sorted(random.Random(seed).sample(range(windows), count))
    )
