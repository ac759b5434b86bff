"""The sequences of tokens on which candidates are scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.text.chat import cut_conversations, require_template
from sleb_cli.engine.text.mixture import Part, divide, interleave, parse_mixture
from sleb_cli.engine.text.own_text import generate_own_text
from sleb_cli.engine.text.sources import (
    REFERENCE_ROWS,
    WHOLE,
    TextSplit,
    calibration_conversations,
    calibration_text,
    reference_calibration_text,
)
from sleb_cli.engine.text.windows import (
    adds_bos,
    choose_length,
    cut_running_text,
    cut_windows,
    require_windows,
    tokens_sha256,
)
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.plan import CalibrationRecord, SkippedRecord
from sleb_cli.requests import (
    DEFAULT_CALIBRATION,
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    DEMO_CALIBRATION,
    DEMO_LENGTH,
    DEMO_SAMPLES,
    CalibrationRequest,
    Chat,
)
from sleb_plugins import UsageError

SELF = "self"
REFERENCE_PRESETS = ("wikitext2-sleb", "c4-sleb")


@dataclass(frozen=True)
class CalibrationSettings:
    """A calibration request with every option set.

    `parts` are the sources in `source`, with their shares. `samples` counts the sequences of all parts together; for a
    reference preset, it counts rows of text. `split` is the part of each source that sequences are drawn from. `writer`
    identifies the model, under which the text that it writes is cached; None caches none.
    """

    source: str
    parts: tuple[Part, ...]
    samples: int
    sequence_length: int
    seed: int
    chat: Chat | None
    samples_given: bool
    split: TextSplit = WHOLE
    writer: str | None = None

    @property
    def counts(self) -> list[int]:
        """The number of samples of each part."""
        return divide(self.samples, [part.share for part in self.parts])


@dataclass(frozen=True)
class Calibration:
    """The calibration sequences, int64 [sequences, length], and their record.

    `loss_mask` marks the tokens whose prediction counts, bool of the same shape; None for all. `origins` names the
    source of each sequence.
    """

    sequences: Tensor
    record: CalibrationRecord
    loss_mask: Tensor | None = None
    origins: tuple[str, ...] = ()

    def part(self, rows: slice | list[int]) -> Calibration:
        """Return these sequences, in this order."""
        loss_mask = None if self.loss_mask is None else self.loss_mask[rows]
        return replace(self, sequences=self.sequences[rows], loss_mask=loss_mask)

    def without(self, skipped: Sequence[SkippedRecord]) -> Calibration:
        """Return the sequences but these, and the record of those that are left."""
        gone = {each.sequence - 1 for each in skipped}
        kept = self.part([row for row in range(len(self.sequences)) if row not in gone])
        left = {"sequences": len(kept.sequences), "tokens_sha256": tokens_sha256(kept.sequences)}
        return replace(kept, record=self.record.model_copy(update={**left, "skipped": tuple(skipped)}))

    def shuffled(self) -> Calibration:
        """Return the sequences in an order drawn by the seed, as candidates race over them in order."""
        count = len(self.sequences)
        return self.part(random.Random(self.record.seed).sample(range(count), count))

    def to(self, device: torch.device) -> Calibration:
        """Move the tokens to a device."""
        loss_mask = None if self.loss_mask is None else self.loss_mask.to(device)
        return replace(self, sequences=self.sequences.to(device), loss_mask=loss_mask)


_Rows = tuple[Tensor, Tensor | None]
"""Sequences of one source, and their loss mask (None: all tokens count)."""


def resolve_calibration(
    request: CalibrationRequest, architecture: Architecture, *, chat: Chat | None = None
) -> CalibrationSettings:
    """Fill unset options with the defaults.

    Raises:
        UsageError: the number of samples or their length is out of range, or the mixture is invalid.
    """
    is_demo = architecture.source.id == DEMO
    source = request.calibration or (DEMO_CALIBRATION if is_demo else DEFAULT_CALIBRATION)
    parts = parse_mixture(source)
    settings = CalibrationSettings(
        source=source,
        parts=parts,
        samples=request.samples or _default_samples(parts, is_demo=is_demo),
        sequence_length=choose_length(
            request.sequence_length, architecture, DEMO_LENGTH if is_demo else DEFAULT_LENGTH
        ),
        seed=request.seed or 0,
        chat=chat,
        samples_given=request.samples is not None,
        writer=architecture.source.behavior,
    )
    if len(parts) > 1:
        _require_mixable(settings)
    return settings


def _default_samples(parts: Sequence[Part], *, is_demo: bool) -> int:
    if parts[0].source in REFERENCE_PRESETS:
        return REFERENCE_ROWS
    return DEMO_SAMPLES if is_demo else DEFAULT_SAMPLES


def _require_mixable(settings: CalibrationSettings, needed: Sequence[bool] = ()) -> None:
    """Check that sources can be mixed, and that each that is `needed`, by default all, has a sequence."""
    presets = [part.source for part in settings.parts if part.source in REFERENCE_PRESETS]
    if presets:
        raise UsageError(
            f"{presets[0]} cannot be mixed: it is drawn as in the reference implementation.",
            hint=f"Mix {presets[0].removesuffix('-sleb')} instead, which is cut into windows.",
        )
    for part, count, must in zip(settings.parts, settings.counts, needed or [True] * len(settings.parts), strict=True):
        if count == 0 and must:
            raise UsageError(
                f"Too few sequences ({settings.samples}) for {settings.source!r}: none would be from {part.source}.",
                hint="Increase --samples or the share.",
            )


def calibrate(
    settings: CalibrationSettings, tokenizer: Any, load_model: Callable[[], Any], notify: Notify
) -> Calibration:
    """Return the sequences that the settings describe; load the model only if it generates some of them.

    The sources of a mixture are interleaved evenly. If a source has too little text, the mixture has fewer sequences,
    in the same shares.

    Raises:
        DataError: the text is missing or too short.
        UsageError: no text is left for a part of the mixture.
    """
    return calibrate_splits([settings], tokenizer, load_model, notify)[0]


def calibrate_splits(
    splits: Sequence[CalibrationSettings], tokenizer: Any, load_model: Callable[[], Any], notify: Notify
) -> list[Calibration]:
    """Return the sequences for each of several splits of the same text; only the first needs some of every source.

    The model generates its text for all splits at once; each sequence is a document of its own. Raises what `calibrate`
    raises.
    """
    first = splits[0]
    if first.chat is not None:
        require_template(tokenizer)
    bos = adds_bos(tokenizer) and first.parts[0].source not in REFERENCE_PRESETS
    drafts = [_read_parts(each, tokenizer, bos=bos, notify=notify if each is first else ignore) for each in splits]
    for number in generated_parts(first):
        counts = [settings.counts[number] for settings, _ in drafts]
        own = replace(first, samples=sum(counts))
        written = generate_own_text(load_model(), tokenizer, own, bos=bos, notify=notify)
        for (_, rows), sequences in zip(drafts, torch.split(written, counts), strict=True):
            rows[number] = (sequences, None)
    return [_assemble(settings, rows, tokenizer, bos=bos) for settings, rows in drafts]


def texts_sha256(splits: Sequence[CalibrationSettings], tokenizer: Any) -> str:
    """Return a hash of what `calibrate_splits` reads for these splits, apart from what the model generates."""
    bos = adds_bos(tokenizer) and splits[0].parts[0].source not in REFERENCE_PRESETS
    drafts = [_read_parts(settings, tokenizer, bos=bos, notify=ignore) for settings in splits]
    read = [sequences.flatten() for _, rows in drafts for _, (sequences, _) in sorted(rows.items())]
    return tokens_sha256(torch.cat([torch.zeros(0, dtype=torch.int64), *read]))


def generated_parts(settings: CalibrationSettings) -> list[int]:
    """Return the numbers of the parts that the model generates."""
    return [n for n, part in enumerate(settings.parts) if part.source == SELF and settings.chat is None]


def _assemble(settings: CalibrationSettings, rows: dict[int, _Rows], tokenizer: Any, *, bos: bool) -> Calibration:
    """Interleave the rows of each part, by its number in the mixture."""
    found = [rows[number] for number in sorted(rows)]
    sources = [settings.parts[number].source for number in sorted(rows) for _ in rows[number][0]]
    order = interleave([len(sequences) for sequences, _ in found])
    sequences = torch.cat([sequences for sequences, _ in found])[order]
    masks = [loss_mask for _, loss_mask in found if loss_mask is not None]
    record = CalibrationRecord(
        source=settings.source,
        seed=settings.seed,
        sequences=len(sequences),
        sequence_length=settings.sequence_length,
        bos=bos if settings.chat is None else bool((sequences[:, 0] == tokenizer.bos_token_id).all()),
        chat=settings.chat,
        tokens_sha256=tokens_sha256(sequences),
    )
    origins = tuple(sources[row] for row in order)
    return Calibration(sequences, record, torch.cat(masks)[order] if masks else None, origins)


def _read_parts(
    settings: CalibrationSettings, tokenizer: Any, *, bos: bool, notify: Notify
) -> tuple[CalibrationSettings, dict[int, _Rows]]:
    """Read the parts that are texts, before any text is generated, since they may be missing or too short.

    Return the settings with as many samples as the texts provide, and the rows of each part by its number.
    """
    generated, read, is_mixture = generated_parts(settings), dict[int, _Rows](), len(settings.parts) > 1
    for number, (part, count) in enumerate(zip(settings.parts, settings.counts, strict=True)):
        if number in generated or not count:
            continue
        with task(notify, f"Reading {part.source}"):
            windows, loss_mask = read_windows(part.source, count, settings, tokenizer, bos=bos)
            if len(windows) < count and not is_mixture and part.source not in REFERENCE_PRESETS:
                notify(
                    Notice(
                        f"{part.source} has text for only {len(windows)} sequences of {settings.sequence_length} "
                        "tokens; using all of them."
                    )
                )
        # A reference preset counts rows of text, and all of their windows are used.
        every = part.source in REFERENCE_PRESETS and settings.chat is None
        read[number] = _draw_rows(windows, loss_mask, len(windows) if every else count, settings.seed)
    if is_mixture:
        settings = limit_to_texts(settings, {number: len(rows) for number, (rows, _) in read.items()}, notify)
        read = {number: _draw_rows(*rows, settings.counts[number], settings.seed) for number, rows in read.items()}
    return settings, read


def limit_to_texts(settings: CalibrationSettings, found: Mapping[int, int], notify: Notify) -> CalibrationSettings:
    """Reduce the samples to what the texts provide in the given shares; `found` counts sequences by part.

    Raises:
        UsageError: a part that had sequences would have none.
    """
    wanted, had = settings.samples, [count > 0 for count in settings.counts]
    while any(settings.counts[number] > count for number, count in found.items()):
        settings = replace(settings, samples=settings.samples - 1)
    _require_mixable(settings, had)
    if settings.samples < wanted:
        scarce = min(found, key=lambda number: found[number] / settings.parts[number].share)
        notify(
            Notice(
                f"{settings.parts[scarce].source} has text for only {found[scarce]} sequences of "
                f"{settings.sequence_length} tokens, so the mixture has {settings.samples} sequences, not {wanted}."
            )
        )
    return settings


def _draw_rows(sequences: Tensor, loss_mask: Tensor | None, count: int, seed: int) -> _Rows:
    rows = draw(len(sequences), count, seed)
    return sequences[rows], loss_mask[rows] if loss_mask is not None else None


def read_windows(source: str, samples: int, settings: CalibrationSettings, tokenizer: Any, *, bos: bool) -> _Rows:
    """Cut a text that has `samples` sequences, or all of a smaller one, into windows."""
    length, seed = settings.sequence_length, settings.seed
    # What is asked for counts the whole text, of which a split has only about its share.
    asked = samples if settings.samples_given and settings.split == WHOLE else None
    if settings.chat is not None:
        conversations = calibration_conversations(source, tokens=samples * length, seed=seed)
        answers = settings.chat == "answers"
        windows, loss_mask = cut_conversations(tokenizer, conversations, length, answers=answers, asked=asked)
        return windows, loss_mask if answers else None
    if source in REFERENCE_PRESETS:
        text = reference_calibration_text(source, rows=samples, seed=seed, split=settings.split)
        return require_windows(cut_running_text(tokenizer, text.content, length), text, tokenizer, length), None
    text = calibration_text(source, tokens=samples * length, seed=seed, split=settings.split)
    windows = cut_windows(tokenizer, text.content, length, bos=bos)
    return require_windows(windows, text, tokenizer, length, asked), None


def draw(found: int, count: int, seed: int) -> list[int]:
    """Draw `count` of `found` windows by the seed, in the order of the text; all if there are fewer."""
    return list(range(found)) if count >= found else sorted(random.Random(seed).sample(range(found), count))


def require_given_text(settings: CalibrationSettings) -> None:
    """Check that a streamed model does not have to write its text.

    Raises:
        UsageError: it has to.
    """
    if SELF in (part.source for part in settings.parts):
        raise UsageError(
            "A streamed model cannot write its own text: each token would read all of its weights.",
            hint="Use --calibration wikitext2, or a file.",
        )
