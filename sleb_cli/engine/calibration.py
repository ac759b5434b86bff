"""The sequences of tokens on which candidates are scored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from sleb_cli.engine.architecture import Architecture
from sleb_cli.engine.foreign import verdict
from sleb_cli.engine.source import DEMO
from sleb_cli.engine.texts import REFERENCE_ROWS, calibration_text, reference_calibration_text
from sleb_cli.engine.windows import (
    DEFAULT_LENGTH,
    adds_bos,
    choose_length,
    cut_running_text,
    cut_windows,
    require_windows,
    tokens_sha256,
)
from sleb_cli.events import Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.plan import CalibrationRecord
from sleb_plugins import ModelError, UnsupportedModelError, UsageError

SELF = "self"
DEFAULT_SOURCE = "wikitext2"
DEFAULT_SAMPLES = 16

# For the demo model, what ranks its blocks within minutes on two cores.
DEMO_LENGTH = 128

REFERENCE_PRESETS = ("wikitext2-sleb", "c4-sleb")

_GENERATION_BATCH = 16


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user asked for; None leaves it to the model and the source."""

    source: str | None
    samples: int | None
    sequence_length: int | None
    seed: int | None


@dataclass(frozen=True)
class CalibrationSettings:
    """A request with every gap filled. `samples` counts sequences, or rows where a reference preset draws those."""

    source: str
    samples: int
    sequence_length: int
    seed: int
    samples_were_asked: bool


@dataclass(frozen=True)
class Calibration:
    """The calibration sequences, int64 [sequences, length], and how they came to be."""

    sequences: Tensor
    record: CalibrationRecord


def settle_calibration(request: CalibrationRequest, architecture: Architecture) -> CalibrationSettings:
    """Fill in what the user left open.

    Raises:
        UsageError: the number of samples or their length is out of range.
    """
    if request.samples is not None and request.samples < 1:
        raise UsageError(f"--samples {request.samples} is too small.", hint="Take 1 or more.")
    is_demo = architecture.source.id == DEMO
    source = request.source or (SELF if is_demo else DEFAULT_SOURCE)
    usual = REFERENCE_ROWS if source in REFERENCE_PRESETS else DEFAULT_SAMPLES
    return CalibrationSettings(
        source=source,
        samples=request.samples or usual,
        sequence_length=choose_length(
            request.sequence_length, architecture, DEMO_LENGTH if is_demo else DEFAULT_LENGTH
        ),
        seed=request.seed or 0,
        samples_were_asked=request.samples is not None,
    )


def calibrate(
    settings: CalibrationSettings, tokenizer: Any, load_model: Callable[[], Any], notify: Notify
) -> Calibration:
    """Give the sequences that the settings describe; the model is loaded only where it writes them itself.

    Raises:
        DataError: the text is missing, or too short.
    """
    bos = adds_bos(tokenizer) and settings.source not in REFERENCE_PRESETS
    if settings.source == SELF:
        sequences = write_own_text(load_model(), tokenizer, settings, bos=bos, notify=notify)
    else:
        notify(TaskStarted(task := f"Reading {settings.source}"))
        sequences = _read_sequences(settings, tokenizer, bos=bos, notify=notify)
        notify(TaskFinished(task))
    record = CalibrationRecord(
        source=settings.source,
        seed=settings.seed,
        sequences=len(sequences),
        sequence_length=settings.sequence_length,
        bos=bos,
        tokens_sha256=tokens_sha256(sequences),
    )
    return Calibration(sequences, record)


def _read_sequences(settings: CalibrationSettings, tokenizer: Any, *, bos: bool, notify: Notify) -> Tensor:
    """Cut the sequences out of a text: all of a reference preset, else as many as wanted, drawn by the seed."""
    source, samples, length = settings.source, settings.samples, settings.sequence_length
    if source in REFERENCE_PRESETS:
        text = reference_calibration_text(source, rows=samples, seed=settings.seed)
        return require_windows(cut_running_text(tokenizer, text.content, length), text, tokenizer, length)
    text = calibration_text(source, tokens=samples * length, seed=settings.seed)
    windows = cut_windows(tokenizer, text.content, length, bos=bos)
    require_windows(windows, text, tokenizer, length, samples if settings.samples_were_asked else None)
    if len(windows) < samples:
        notify(Notice(f"{source} has text for {len(windows)} sequences of {length} tokens: all are used."))
    return draw(windows, samples, settings.seed)


def draw(windows: Tensor, count: int, seed: int) -> Tensor:
    """Draw `count` of the windows (all, where there are fewer) by the seed, in the order of the text."""
    if count >= len(windows):
        return windows
    return windows[sorted(random.Random(seed).sample(range(len(windows)), count))]


def shuffled(windows: Tensor, seed: int) -> Tensor:
    """Give the windows in an order that the seed decides: candidates race over them as they come."""
    return windows[random.Random(seed).sample(range(len(windows)), len(windows))]


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
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, min_new_tokens=new,
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
        for first in range(0, count, _GENERATION_BATCH):
            rows = min(_GENERATION_BATCH, count - first)
            prompt = torch.full((rows, 1), start, device=model.device)
            with verdict(refused):
                ids = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=sampling,
                    stopping_criteria=StoppingCriteriaList([report]),
                )
            written.append(ids[:, -length:].cpu())
    notify(TaskFinished(task))
    return torch.cat(written).clone()
