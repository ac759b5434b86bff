"""The sequences of tokens on which candidates are scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.text.chat import cut_conversations, require_template
from sleb_cli.engine.text.mixture import Part, divide, interleave, parse_mixture
from sleb_cli.engine.text.sources import (
    REFERENCE_ROWS,
    calibration_conversations,
    calibration_text,
    reference_calibration_text,
)
from sleb_cli.engine.text.windows import (
    DEFAULT_LENGTH,
    adds_bos,
    choose_length,
    cut_running_text,
    cut_windows,
    require_windows,
    tokens_sha256,
)
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.events import Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.plan import CalibrationRecord, Chat
from sleb_plugins import ModelError, UnsupportedModelError, UsageError

SELF = "self"
DEFAULT_SOURCE = "wikitext2"
DEFAULT_SAMPLES = 16

# For the demo model, what ranks its blocks within minutes on two cores.
DEMO_LENGTH = 128

REFERENCE_PRESETS = ("wikitext2-sleb", "c4-sleb")

# Sequences that are written together: the more, the faster, as weights are read once for all; the KV cache limits them.
_FEWEST_AT_ONCE, _MOST_AT_ONCE, _TOKENS_AT_ONCE = 16, 64, 16384


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user asked for; None leaves it to the model and the source. That may be a mixture: "self:0.5,c4:0.5"."""

    source: str | None
    samples: int | None
    sequence_length: int | None
    seed: int | None
    chat: Chat | None = None


@dataclass(frozen=True)
class CalibrationSettings:
    """A request with every gap filled.

    `parts` are the sources that `source` names, with their shares. `samples` counts sequences of all parts together, or
    rows where a reference preset draws those.
    """

    source: str
    parts: tuple[Part, ...]
    samples: int
    sequence_length: int
    seed: int
    chat: Chat | None
    samples_were_asked: bool

    @property
    def counts(self) -> list[int]:
        """How many of the samples each part gives."""
        return divide(self.samples, [part.share for part in self.parts])


@dataclass(frozen=True)
class Calibration:
    """The calibration sequences, int64 [sequences, length], and how they came to be.

    `loss_mask` says which tokens count where they are predicted, bool of that shape; None for all.
    """

    sequences: Tensor
    record: CalibrationRecord
    loss_mask: Tensor | None = None

    def part(self, rows: slice | list[int]) -> Calibration:
        """Give some of the sequences, in this order."""
        loss_mask = None if self.loss_mask is None else self.loss_mask[rows]
        return replace(self, sequences=self.sequences[rows], loss_mask=loss_mask)

    def shuffled(self) -> Calibration:
        """Give them in an order that the seed decides: candidates race over the sequences as they come."""
        count = len(self.sequences)
        return self.part(random.Random(self.record.seed).sample(range(count), count))

    def to(self, device: torch.device) -> Calibration:
        """Move the tokens to a device."""
        loss_mask = None if self.loss_mask is None else self.loss_mask.to(device)
        return replace(self, sequences=self.sequences.to(device), loss_mask=loss_mask)


_Rows = tuple[Tensor, Tensor | None]
"""Sequences of one source, and which of their tokens count (None: all)."""


def resolve_calibration(request: CalibrationRequest, architecture: Architecture) -> CalibrationSettings:
    """Fill in what the user left open.

    Raises:
        UsageError: the number of samples or their length is out of range, or the mixture is none.
    """
    if request.samples is not None and request.samples < 1:
        raise UsageError(f"--samples {request.samples} is too small.", hint="Take 1 or more.")
    is_demo = architecture.source.id == DEMO
    source = request.source or (SELF if is_demo else DEFAULT_SOURCE)
    parts = parse_mixture(source)
    settings = CalibrationSettings(
        source=source,
        parts=parts,
        samples=request.samples or (REFERENCE_ROWS if parts[0].source in REFERENCE_PRESETS else DEFAULT_SAMPLES),
        sequence_length=choose_length(
            request.sequence_length, architecture, DEMO_LENGTH if is_demo else DEFAULT_LENGTH
        ),
        seed=request.seed or 0,
        chat=request.chat,
        samples_were_asked=request.samples is not None,
    )
    if len(parts) > 1:
        _require_mixable(settings)
    return settings


def _require_mixable(settings: CalibrationSettings) -> None:
    presets = [part.source for part in settings.parts if part.source in REFERENCE_PRESETS]
    if presets:
        raise UsageError(
            f"{presets[0]} is drawn as the reference implementation does, and cannot be mixed.",
            hint=f"Mix {presets[0].removesuffix('-sleb')}, which is cut into windows.",
        )
    for part, count in zip(settings.parts, settings.counts, strict=True):
        if count == 0:
            raise UsageError(
                f"{settings.samples} sequences are too few for {settings.source!r}: none would be of {part.source}.",
                hint="Take more --samples, or a larger share.",
            )


def calibrate(
    settings: CalibrationSettings, tokenizer: Any, load_model: Callable[[], Any], notify: Notify
) -> Calibration:
    """Give the sequences that the settings describe; the model is loaded only where it writes them itself.

    Those of a mixture are spread evenly over one another, so that any stretch of them has all sources. Where nobody
    said how many, there are as many as there is text for in these shares.

    Raises:
        DataError: the text is missing, or too short.
    """
    if settings.chat is not None:
        require_template(tokenizer)
    bos = adds_bos(tokenizer) and settings.parts[0].source not in REFERENCE_PRESETS
    written = [part.source == SELF and settings.chat is None for part in settings.parts]
    read: dict[int, _Rows] = {}
    for number, (part, count) in enumerate(zip(settings.parts, settings.counts, strict=True)):
        if not written[number]:
            notify(TaskStarted(task := f"Reading {part.source}"))
            read[number] = _read_sequences(part.source, count, settings, tokenizer, bos=bos, notify=notify)
            notify(TaskFinished(task))
    if len(settings.parts) > 1:
        settings = _as_far_as_texts_go(settings, {number: len(rows) for number, (rows, _) in read.items()}, notify)
        read = {number: _drawn(*rows, settings.counts[number], settings.seed) for number, rows in read.items()}
    found: list[_Rows] = []
    for number, count in enumerate(settings.counts):
        if written[number]:
            own = replace(settings, samples=count)
            found.append((write_own_text(load_model(), tokenizer, own, bos=bos, notify=notify), None))
        else:
            found.append(read[number])
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
    return Calibration(sequences, record, torch.cat(masks)[order] if masks else None)


def _as_far_as_texts_go(settings: CalibrationSettings, found: Mapping[int, int], notify: Notify) -> CalibrationSettings:
    """Take as many samples as there is text for, the shares being what they are; `found` are sequences by part.

    Raises:
        UsageError: of some part that would be none.
    """
    wanted = settings.samples
    while any(settings.counts[number] > count for number, count in found.items()):
        settings = replace(settings, samples=settings.samples - 1)
    _require_mixable(settings)
    if settings.samples < wanted:
        scarce = min(found, key=lambda number: found[number] / settings.parts[number].share)
        notify(
            Notice(
                f"{settings.parts[scarce].source} has text for {found[scarce]} sequences of {settings.sequence_length} "
                f"tokens, so the mixture has {settings.samples}, not {wanted}."
            )
        )
    return settings


def _drawn(sequences: Tensor, loss_mask: Tensor | None, count: int, seed: int) -> _Rows:
    rows = draw(len(sequences), count, seed)
    return sequences[rows], loss_mask[rows] if loss_mask is not None else None


def _read_sequences(
    source: str, samples: int, settings: CalibrationSettings, tokenizer: Any, *, bos: bool, notify: Notify
) -> _Rows:
    """Cut the sequences out of a text: all of a reference preset, else as many as wanted, drawn by the seed."""
    length, seed = settings.sequence_length, settings.seed
    asked = samples if settings.samples_were_asked else None
    loss_mask = None
    if settings.chat is not None:
        conversations = calibration_conversations(source, tokens=samples * length, seed=seed)
        answers = settings.chat == "answers"
        windows, loss_mask = cut_conversations(tokenizer, conversations, length, answers=answers, asked=asked)
    elif source in REFERENCE_PRESETS:
        text = reference_calibration_text(source, rows=samples, seed=seed)
        return require_windows(cut_running_text(tokenizer, text.content, length), text, tokenizer, length), None
    else:
        text = calibration_text(source, tokens=samples * length, seed=seed)
        windows = cut_windows(tokenizer, text.content, length, bos=bos)
        require_windows(windows, text, tokenizer, length, asked)
    if len(windows) < samples and len(settings.parts) == 1:
        notify(Notice(f"{source} has text for {len(windows)} sequences of {length} tokens: all are used."))
    return _drawn(windows, loss_mask if settings.chat == "answers" else None, samples, seed)


def draw(found: int, count: int, seed: int) -> list[int]:
    """Draw `count` of so many windows (all, where there are fewer) by the seed, in the order of the text."""
    return list(range(found)) if count >= found else sorted(random.Random(seed).sample(range(found), count))


def write_own_text(model: Any, tokenizer: Any, settings: CalibrationSettings, *, bos: bool, notify: Notify) -> Tensor:
    """Let the model write the sequences, sampled from its own distribution after BOS.

    The BOS token itself stays in the sequences where the tokenizer adds it to every text, and only there.

    Raises:
        ModelError: the tokenizer has no token to begin with.
    """
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if start is None:
        raise ModelError(
            "The tokenizer has neither a BOS nor an EOS token, so the model cannot begin a text by itself.",
            hint="Calibrate on a file or a data set: --calibration FILE.",
        )
    count, length = settings.samples, settings.sequence_length
    new = length - 1 if bos else length
    at_once = min(_MOST_AT_ONCE, max(_FEWEST_AT_ONCE, _TOKENS_AT_ONCE // length))
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, min_new_tokens=new, use_cache=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=start,
    )  # fmt: skip
    task = "Writing calibration text"
    notify(TaskStarted(task, count * new, "tokens"))

    def report(ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        """Tell of each token as it is written; never stop."""
        notify(TaskAdvanced(task, len(ids)))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def refused(words: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{model.config.model_type} does not write text by itself: {words}.",
            hint="Calibrate on a file or a data set: --calibration FILE.",
        )

    written: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(settings.seed)
        for first in range(0, count, at_once):
            rows = min(at_once, count - first)
            prompt = torch.full((rows, 1), start, device=model.device)
            with translate_errors(refused):
                ids = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=sampling,
                    stopping_criteria=StoppingCriteriaList([report]),
                )
            written.append(ids[:, -length:].cpu())
    notify(TaskFinished(task))
    return torch.cat(written).clone()
