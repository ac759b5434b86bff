"""Resolve `sleb apply --recover` and `--heal`: to stages, text, placement and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.device import CPU, choose_device, cpu_dtypes, dtype_name, parse_dtype
from sleb_cli.engine.files.tensors import float_dtypes
from sleb_cli.engine.forward.memory_needs import model_bytes
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.memory import memory_shortage
from sleb_cli.engine.model.experts import find_experts
from sleb_cli.engine.output.checkpoint import Output
from sleb_cli.engine.recovery.heal import Heal, HealReader, HealRouters
from sleb_cli.engine.recovery.ridge import Ridge
from sleb_cli.engine.recovery.saved_state import begun_dtype, saved_bytes
from sleb_cli.engine.recovery.stage import HIDDEN_STATES, RecoverySettings, Stage
from sleb_cli.engine.recovery.training import HealBudget
from sleb_cli.engine.surgery.loading import Placement, has_tokenizer, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.settings import (
    CalibrationSettings,
    require_given_text,
    resolve_calibration,
)
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.requests import (
    AUTO,
    DEFAULT_CALIBRATION,
    DEFAULT_HEAL_MINUTES,
    HEALING_TEXTS,
    READER_LENGTH,
    RECOVERY_HEAL_TOKENS,
    RECOVERY_LENGTH,
    RECOVERY_SELF_TOKENS,
    RECOVERY_TOKENS,
    ApplyRequest,
)
from sleb_cli.texts.named import is_reference, is_written, text_source
from sleb_cli.texts.source import TextSplit
from sleb_cli.texts.written import SELF, SELF_CHAT
from sleb_cli.units import format_bytes, plural
from sleb_plugins import DataError, MachineError, UnsupportedModelError, UsageError

SPLITS = (TextSplit(0, 0.7), TextSplit(0.7, 0.9), TextSplit(0.9, 1))
"""Values are fitted to the first split, chosen by the second, and measured on the third."""
READER_SPLITS = (TextSplit(0, 0.9), TextSplit(0.9, 0.95), TextSplit(0.95, 1))
MIN_SEQUENCES = 5
MAX_TOKENS_HELD_OUT = 8192
"""Of validation and of test: every fit runs the model on all of the validation text."""


def resolve_recovery(
    subject: Subject, request: ApplyRequest, output: Output, notify: Notify
) -> RecoverySettings:
    """Decide on which text, in which data type and where a model is recovered."""
    architecture = subject.architecture
    surgery = subject.surgery
    if architecture.reading and request.recover:
        raise UsageError(
            f"--recover fits what language models add to their hidden states, and "
            f"{architecture.source.id} only reads.",
            hint="Use --heal: it trains the blocks to put out what the dense model does.",
        )
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its blocks cannot be recovered.",
            hint="Recover the model it was quantized from, and quantize the result.",
        )
    target = output.dtype or architecture.dtype or torch.float32
    # Values are rounded to what every file can hold, which may be narrower than what the config
    # says.
    written = [output.dtype] if output.dtype else float_dtypes(architecture.source.weights)
    stored = min([*written, target], key=lambda dtype: dtype.itemsize)

    # An unfinished recovery goes on in the data type that it began in.
    dtype = begun_dtype(output.path, dtype_name(stored)) or AUTO
    # Gradients and sums may leave the range of float16. All weights that are trained are float32.
    if target is torch.float16 or architecture.reading:
        dtype = "float32"
    stages, placement = _place(subject, request, output, dtype, notify)
    text = _resolve_text(request, subject, stream=placement.stream)
    if request.calibration is None and all(map(is_written, text.shares)):
        _say_what_is_not_read(subject, text, notify)
    if placement.rounded:
        # Rounded weights write other text, which must not be taken from the cache.
        text = replace(text, writer=f"{text.writer} {dtype_name(placement.rounded)}")
    on_host = _check_memory(subject, stages, placement, text)
    saved = sum(stage.saved_bytes(surgery, stored) for stage in stages)
    kept_bytes = max(0, saved - saved_bytes(output.path))
    splits = _splits(text, READER_SPLITS if architecture.reading else SPLITS)
    return RecoverySettings(
        surgery, stages, placement, stored, on_host, splits, output.path, kept_bytes
    )


def _stages(request: ApplyRequest, subject: Subject) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    if request.recover:
        stages.append(Ridge())
    minutes = request.heal_minutes
    tokens = request.heal_tokens
    if minutes is None and tokens is None:
        if request.heal:
            minutes = DEFAULT_HEAL_MINUTES
        else:
            tokens = RECOVERY_HEAL_TOKENS
    if request.heal is not False:
        budget = HealBudget(minutes, tokens)
        if "experts" in subject.surgery.other_cuts:
            stages.append(HealRouters(budget, find_experts(subject.architecture).router))
        elif subject.architecture.reading:
            stages.append(HealReader(budget))
        else:
            stages.append(Heal(budget))
    return tuple(stages)


def _place(
    subject: Subject,
    request: ApplyRequest,
    output: Output,
    dtype: str,
    notify: Notify,
) -> tuple[tuple[Stage, ...], Placement]:
    """Place the dense model, which computes in bfloat16 or float32, beside what the stages need."""
    device = choose_device(request.device or AUTO)
    widest = parse_dtype(dtype, output.dtype or subject.architecture.dtype)
    if device.type == "cpu" and widest not in cpu_dtypes():
        widest = torch.float32
    stages = _stages(request, subject)
    if not _can_train(subject, request, stages, device, widest):
        notify(
            Notice(
                "Training is left out, since it needs the whole model in memory on one device: the "
                "blocks before the gaps are only refitted."
            )
        )
        stages = tuple(stage for stage in stages if stage.streams)
    reserved = _reserved(subject, stages, widest)
    placement = place_model(
        subject.architecture,
        device,
        dtype,
        notify,
        device_map=request.device_map,
        stream=request.stream if all(stage.streams for stage in stages) else False,
        reserved=reserved,
        cast=output.dtype,
    )
    return stages, replace(placement, device=device)


def _can_train(
    subject: Subject,
    request: ApplyRequest,
    stages: Sequence[Stage],
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Tell whether training has a place. It is always tried if options ask for it."""
    asked = request.heal or request.heal_minutes or request.heal_tokens
    if asked or all(stage.streams for stage in stages):
        return True
    if request.stream or request.device_map is not None:
        return False
    needed = model_bytes(subject.architecture, dtype) + _reserved(subject, stages, dtype)
    return memory_shortage(needed, device) is None


def _reserved(subject: Subject, stages: Sequence[Stage], dtype: torch.dtype) -> int:
    """Return the bytes that the stages need besides the model.

    Hidden states are left out: if there is no room for them, they wait on the host.
    """
    reserved = 0
    for stage in stages:
        reserved += sum(stage.needed_bytes(subject.surgery, dtype, tokens=0).values())
    return reserved


def _check_memory(
    subject: Subject, stages: Sequence[Stage], placement: Placement, text: CalibrationSettings
) -> bool:
    """Check that the memory suffices; return whether hidden states must wait on the host."""
    needed: dict[str, int] = {}
    if placement.device_map is None:  # a map spreads the model over several devices
        weights = "two blocks and what is outside of them" if placement.stream else "the model"
        needed[weights] = model_bytes(
            subject.architecture, placement.dtype, stream=placement.stream
        )
    tokens = text.samples * text.sequence_length
    for stage in stages:
        needed |= stage.needed_bytes(subject.surgery, placement.dtype, tokens)
    device = placement.device
    on_host = False
    if placement.stream and device != CPU and memory_shortage(sum(needed.values()), device):
        on_host = True
        _require_free(CPU, {HIDDEN_STATES: needed[HIDDEN_STATES]}, stages[-1])
        del needed[HIDDEN_STATES]
    _require_free(device, needed, stages[-1])
    return on_host


def _splits(
    text: CalibrationSettings, splits: tuple[TextSplit, TextSplit, TextSplit]
) -> list[CalibrationSettings]:
    train, validation, test = splits
    counts = {}
    for split in (validation, test):
        share = round(text.samples * (split.end - split.begin), 6)
        counts[split] = max(1, min(int(share), MAX_TOKENS_HELD_OUT // text.sequence_length))
    counts = {train: text.samples - sum(counts.values()), **counts}
    return [replace(text, samples=samples, split=split) for split, samples in counts.items()]


def _require_free(device: torch.device, needed: Mapping[str, int], last: Stage) -> None:
    purposes = ", ".join(f"{format_bytes(size)} for {purpose}" for purpose, size in needed.items())
    if lacking := memory_shortage(
        sum(needed.values()), device, f"memory on {device.type} ({purposes})"
    ):
        raise MachineError(
            f"{last.title} needs {lacking}.",
            hint="Use fewer --samples, leave out --heal or --recover, write narrower weights with "
            "--dtype bfloat16, or use a machine with more memory.",
        )


def _resolve_text(request: ApplyRequest, subject: Subject, *, stream: bool) -> CalibrationSettings:
    """Fill unset options with the defaults; fitting weights takes more text than a search."""
    architecture = subject.architecture
    if architecture.reading:
        return _resolve_reader_text(request, subject)
    length = request.sequence_length or choose_length(None, architecture, RECOVERY_LENGTH)
    source = request.calibration or _default_source(subject, stream=stream)
    text = resolve_calibration(
        architecture, source, request.samples, length, request.seed, request.chat, request.prompt
    )
    text = replace(text, length_given=request.sequence_length is not None)
    if stream:
        require_given_text(text)
    if not (text.samples_given or is_reference(text.source)):
        text = replace(text, samples=max(MIN_SEQUENCES, _default_tokens(text, request) // length))
    _require_divisible(text)
    return text


def _default_tokens(text: CalibrationSettings, request: ApplyRequest) -> int:
    tokens = RECOVERY_SELF_TOKENS if all(map(is_written, text.shares)) else RECOVERY_TOKENS
    if request.heal_minutes is not None and any(map(is_written, text.shares)):
        # Writing must not take longer than the healing that reads it.
        tokens = int(tokens * min(1, max(1 / 4, request.heal_minutes / DEFAULT_HEAL_MINUTES)))
    return tokens


def _say_what_is_not_read(subject: Subject, text: CalibrationSettings, notify: Notify) -> None:
    searched = subject.plan and subject.plan.calibration.source
    if searched and not any(map(is_written, parse_mixture(searched))):
        count = text.samples * text.sequence_length
        notify(
            Notice(
                f"A few conversations are too little to fit weights, so the model writes {count:,} "
                f"tokens itself. If {searched} has that many, add --calibration {searched}."
            )
        )


def _require_divisible(text: CalibrationSettings) -> None:
    if text.samples < MIN_SEQUENCES:
        raise DataError(
            f"{plural(text.samples, 'sequence')} cannot be divided into training, validation and "
            f"test.",
            hint=f"Use --samples {MIN_SEQUENCES} or more.",
        )


def _resolve_reader_text(request: ApplyRequest, subject: Subject) -> CalibrationSettings:
    """Fill unset options of a model that only reads: many texts, like those of the search."""
    architecture = subject.architecture
    length = choose_length(None, architecture, READER_LENGTH)
    source = DEFAULT_CALIBRATION
    prompt = request.prompt
    if subject.plan:
        length = min(length, subject.plan.calibration.sequence_length)
        source = subject.plan.calibration.source
        searched_with = subject.plan.request.get("prompt")
        if prompt is None and searched_with:
            prompt = str(searched_with)
    text = resolve_calibration(
        architecture,
        request.calibration or source,
        request.samples,
        request.sequence_length or length,
        request.seed,
        request.chat,
        prompt,
    )
    if not text.samples_given:
        text = replace(text, samples=HEALING_TEXTS)
    _require_divisible(text)
    return text


def _default_source(subject: Subject, *, stream: bool) -> str:
    """Return the default text: the plan's, if it is general, with a quarter of the model's own."""
    # A streamed model writes nothing, since each token would read all of its weights.
    source = subject.architecture.source
    own = SELF
    alone = SELF
    if stream:
        alone = DEFAULT_CALIBRATION
    elif has_tokenizer(source) and load_tokenizer(source).chat_template:
        own = SELF_CHAT
        alone = f"{SELF}:0.5,{SELF_CHAT}:0.5"
    if subject.plan is None or subject.plan.calibration.chat:
        return alone
    searched = subject.plan.calibration.source
    shares = parse_mixture(searched)
    if any(map(is_written, shares)) and (stream or len(shares) == 1):
        return alone
    # A name with a comma cannot be part of a mixture.
    if len(shares) > 1 or "," in searched:
        return searched
    text = text_source(next(iter(shares))).in_windows
    if stream:
        return text
    return f"{text}:0.75,{own}:0.25"
