"""Make the sequences of tokens that candidates are scored on, and that recovery fits to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb_cli.checks.mixture import interleave
from sleb_cli.engine.model.padded import ids_of, join
from sleb_cli.engine.text.chat import cut_conversations, render, require_template
from sleb_cli.engine.text.own_chat import write_conversations
from sleb_cli.engine.text.own_text import generate_own_text
from sleb_cli.engine.text.passages import items_of, pad_texts, sort_in_runs
from sleb_cli.engine.text.settings import CalibrationSettings, require_mixable
from sleb_cli.engine.text.windows import (
    TooShort,
    adds_bos,
    begin_with_bos,
    cut_running_text,
    cut_windows,
    follow_text,
    require_windows,
    tokens_sha256,
    whole_mask,
)
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.plan import CalibrationRecord
from sleb_cli.texts.named import text_source, writes_conversations
from sleb_cli.texts.source import WHOLE, Draw
from sleb_cli.units import plural
from sleb_plugins import DataError


@dataclass(frozen=True)
class Calibration:
    """The calibration sequences, int64 [sequences, length] or `PaddedTexts`, and their record.

    `loss_mask` marks the tokens whose prediction counts, bool of the same shape; None for all.
    `origins` names the source of each sequence.
    """

    sequences: Any
    record: CalibrationRecord
    loss_mask: Tensor | None
    origins: tuple[str, ...]

    def select(self, rows: Sequence[int]) -> Calibration:
        """Return these sequences, in this order."""
        sequences, loss_mask = take_sequences((self.sequences, self.loss_mask), rows)
        origins = tuple(self.origins[row] for row in rows)
        return Calibration(sequences, self.record, loss_mask, origins)

    def sequences_of(self, source: str) -> Sequences:
        """Return the sequences of a source, and their loss mask."""
        rows = [row for row, origin in enumerate(self.origins) if origin == source]
        return take_sequences((self.sequences, self.loss_mask), rows)

    def first_of_each(self, count: int) -> dict[str, Sequences]:
        """Return about the first `count` sequences by source, at least one of each."""
        share = count / len(self.sequences)
        firsts = {}
        for source, number in Counter(self.origins).items():
            rows = range(min(number, max(1, round(share * number))))
            firsts[source] = take_sequences(self.sequences_of(source), rows)
        return firsts

    def shuffled(self) -> Calibration:
        """Return the sequences in the order that the seed draws for a race."""
        count = len(self.sequences)
        return self.select(random.Random(self.record.seed).sample(range(count), count))

    def to(self, device: torch.device) -> Calibration:
        """Move the tokens to a device."""
        loss_mask = self.loss_mask
        if loss_mask is not None:
            loss_mask = loss_mask.to(device)
        return replace(self, sequences=self.sequences.to(device), loss_mask=loss_mask)


Sequences = tuple[Any, Tensor | None]
"""Sequences, and their loss mask (None: all tokens count)."""


def calibrate(
    splits: Sequence[CalibrationSettings],
    tokenizer: Any,
    load_model: Callable[[], Any],
    notify: Notify,
) -> list[Calibration]:
    """Return the sequences for each of several splits of the same text.

    Only the first split must have some of every source. The sources of a mixture are interleaved
    evenly. If one has too little text, the mixture has fewer sequences, in the same shares. The
    model is loaded only if it writes some of them.

    Raises:
        DataError: the text is missing or too short.
        UsageError: no text is left for a part of the mixture.
    """
    first = splits[0]
    _require_template_where_needed(first, tokenizer)
    # Texts are read before the model writes any, since they may be missing or too short.
    if first.length_given:
        drafts = _read_splits(first.sequence_length, notify, splits, tokenizer)
    else:
        read = partial(_read_splits, splits=splits, tokenizer=tokenizer)
        drafts = follow_text(read, first.sequence_length, _count_sequences, notify)
    splits = [
        replace(split, sequence_length=drafts[0].settings.sequence_length) for split in splits
    ]
    first = splits[0]
    if first.samples_given and len(splits) > 1:
        _require_samples(splits, drafts, tokenizer)
    for name in first.shares:
        source = text_source(name)
        counts = [draft.settings.counts[name] for draft in drafts]
        if source.has_prompts:  # which are divided like documents
            for draft, count in zip(drafts, counts, strict=True):
                if count:
                    draft.rows[name] = write_sequences(
                        name, count, draft.settings, load_model(), tokenizer, notify
                    )
        elif source.is_written:  # for all splits at once: each sequence is a document of its own
            written = write_sequences(name, sum(counts), first, load_model(), tokenizer, notify)
            begin = 0
            for draft, count in zip(drafts, counts, strict=True):
                draft.rows[name] = take_sequences(written, range(begin, begin + count))
                begin += count
    return [_interleave_sources(draft, tokenizer) for draft in drafts]


@dataclass(frozen=True)
class _Draft:
    """The sequences of a split so far, by source; the settings count no more than there are."""

    settings: CalibrationSettings
    rows: dict[str, Sequences]


def _read_splits(
    length: int, notify: Notify, splits: Sequence[CalibrationSettings], tokenizer: Any
) -> list[_Draft]:
    drafts = list[_Draft]()
    for split in splits:
        settings = replace(split, sequence_length=length)
        drafts.append(_read_texts(settings, tokenizer, ignore if drafts else notify))
    return drafts


def _count_sequences(drafts: Sequence[_Draft]) -> int:
    return sum(len(rows) for draft in drafts for rows, _ in draft.rows.values())


def _require_template_where_needed(settings: CalibrationSettings, tokenizer: Any) -> None:
    for name in settings.shares:
        if writes_conversations(name):
            require_template(tokenizer, name)
    if settings.chat is not None:
        require_template(tokenizer, settings.source)


def _require_samples(
    splits: Sequence[CalibrationSettings], drafts: Sequence[_Draft], tokenizer: Any
) -> None:
    whole = replace(splits[0], samples=sum(split.samples for split in splits), split=WHOLE)
    for source, count in whole.given_counts.items():
        for split, draft in zip(splits, drafts, strict=True):
            # A split may have less than its share, but not all of them together.
            needed = split.counts[source]
            if needed and len(draft.rows[source][0]) < needed:
                read_windows(source, count, whole, tokenizer)
                break


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
    if not writes_conversations(source):
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
    if loss_mask is not None:
        loss_mask = loss_mask[chosen]
    return sequences[chosen], loss_mask


def join_sequences(rows: Sequence[Sequences]) -> Sequences:
    """Join the sequences of several sources.

    All tokens of a source without a loss mask count.
    """
    sequences = join([tokens for tokens, _ in rows])
    if all(mask is None for _, mask in rows):
        return sequences, None
    return sequences, torch.cat([whole_mask(tokens, mask) for tokens, mask in rows])


def _interleave_sources(draft: _Draft, tokenizer: Any) -> Calibration:
    settings = draft.settings
    rows = list[Sequences]()
    counts = list[int]()
    origins = list[str]()
    for source in settings.shares:
        if source in draft.rows:
            rows.append(draft.rows[source])
            counts.append(len(rows[-1][0]))
            origins += [source] * counts[-1]
    joined = join_sequences(rows)
    order = interleave(counts)
    if settings.shape:
        order = sort_in_runs(joined[0], settings.seed)
    sequences, loss_mask = take_sequences(joined, order)
    record = CalibrationRecord(
        source=settings.source,
        seed=settings.seed,
        sequences=len(sequences),
        sequence_length=settings.sequence_length,
        bos=not settings.is_reference and begin_with_bos(tokenizer, ids_of(sequences)),
        chat=settings.chat,
        tokens_sha256=tokens_sha256(ids_of(sequences)),
    )
    return Calibration(sequences, record, loss_mask, tuple(origins[row] for row in order))


def _read_texts(settings: CalibrationSettings, tokenizer: Any, notify: Notify) -> _Draft:
    read = dict[str, Sequences]()
    is_mixture = len(settings.shares) > 1
    for source, count in settings.given_counts.items():
        what = source
        if settings.chat is not None and text_source(source).holds_conversations:
            what = f"the {'answers' if settings.chat == 'answers' else 'conversations'} in {source}"
        with task(notify, f"Reading {what}"):
            try:
                rows = read_windows(source, count, settings, tokenizer)
            except TooShort as error:
                raise _while_divided(error, source, settings) from error
            available = len(rows[0])
            if available < count and not is_mixture and not settings.is_reference:
                notify(Notice(f"{_shortage(source, available, settings)}; using all of them."))
        # A reference preset counts rows of text, and all of their windows are used.
        drawn = available if settings.is_reference else count
        read[source] = _draw_rows(rows, drawn, settings.seed)
    if is_mixture:
        available_counts = {source: len(rows[0]) for source, rows in read.items()}
        settings = limit_to_texts(settings, available_counts, notify)
        for source, rows in read.items():
            read[source] = _draw_rows(rows, settings.counts[source], settings.seed)
    return _Draft(settings, read)


def _draw_rows(rows: Sequences, count: int, seed: int) -> Sequences:
    return take_sequences(rows, draw(len(rows[0]), count, seed))


def limit_to_texts(
    settings: CalibrationSettings, available: Mapping[str, int], notify: Notify
) -> CalibrationSettings:
    """Reduce the samples, in the given shares, until the `available` sequences suffice.

    Raises:
        UsageError: a source that had sequences would have none.
    """
    requested = settings.samples
    needed = [source for source, count in settings.counts.items() if count]
    while any(settings.counts[source] > count for source, count in available.items()):
        settings = replace(settings, samples=settings.samples - 1)
    if not settings.split.begin:  # the splits for validation and test may lack a source
        require_mixable(settings, needed)
    if settings.samples < requested:
        scarce = min(available, key=lambda source: available[source] / settings.shares[source])
        mixed = f"the mixture has {settings.samples} sequences, not {requested}"
        notify(Notice(f"{_shortage(scarce, available[scarce], settings)}, so {mixed}."))
    return settings


def _shortage(source: str, count: int, settings: CalibrationSettings) -> str:
    sequences = plural(count, "sequence")
    return f"{source} has text for only {sequences} of {settings.sequence_length} tokens"


def _while_divided(error: TooShort, source: str, settings: CalibrationSettings) -> TooShort:
    if settings.split == WHOLE:
        return error
    # The tokens of one part tell nobody how many are needed.
    divided = TooShort(
        f"{source} is too short to be divided into training, validation and test sequences of "
        f"{settings.sequence_length} tokens.",
        hint="Use more text, or leave out --calibration, so that the model writes its own.",
    )
    divided.has = f"A part of {source} is short"
    return divided


def read_windows(
    name: str, samples: int, settings: CalibrationSettings, tokenizer: Any
) -> Sequences:
    """Cut enough of a text for `samples` windows, or all of a smaller one."""
    source = text_source(name)
    length = settings.sequence_length
    split = settings.split
    # The user's number is for the whole text, of which a split has only about its share.
    required = samples if settings.samples_given and split == WHOLE else None
    chat = settings.chat is not None and source.holds_conversations
    text = source.read(Draw(samples, length, settings.seed, split, chat))
    if settings.shape:
        items = items_of(text)
        if required is not None and len(items) < required:
            raise DataError(
                f"{name} has {len(items)} texts, not {required}.",
                hint=f"Take {len(items)} or fewer from it.",
            )
        drawn = [items[row] for row in draw(len(items), samples, settings.seed)]
        return pad_texts(tokenizer, drawn, settings.shape), None
    if chat:
        answers = settings.chat == "answers"
        rendered = [
            render(tokenizer, conversation, name, answers=answers)
            for conversation in text.conversations
        ]
        return cut_conversations(rendered, name, length, answers=answers, required=required)
    if source.is_reference:
        windows = cut_running_text(tokenizer, text.content, length)
        required = None  # samples count rows of text
    else:
        windows = cut_windows(tokenizer, text.content, length, bos=adds_bos(tokenizer))
    return require_windows(windows, text, tokenizer, length, required), None


def draw(windows: int, count: int, seed: int) -> list[int]:
    """Draw `count` windows by the seed, in the order of the text; all if there are fewer."""
    if count >= windows:
        return list(range(windows))
    return sorted(random.Random(seed).sample(range(windows), count))
