"""Resolve `sleb apply --recover` and `--heal`: to stages, text, placement and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.device import CPU, choose_device, dtype_name
from sleb_cli.engine.files.tensors import float_dtypes
from sleb_cli.engine.forward.memory_needs import model_bytes
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.memory import memory_shortage
from sleb_cli.engine.output.checkpoint import Output
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.closed_form import ClosedForm
from sleb_cli.engine.recovery.heal import Heal
from sleb_cli.engine.recovery.heal_budget import HealBudget
from sleb_cli.engine.recovery.stage import HIDDEN_STATES, RecoverySettings, Stage
from sleb_cli.engine.recovery.unfinished import Unfinished
from sleb_cli.engine.surgery.loading import Placement, has_tokenizer, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.settings import (
    CalibrationSettings,
    require_given_text,
    resolve_calibration,
)
from sleb_cli.events import Notify
from sleb_cli.requests import (
    AUTO,
    DEFAULT_CALIBRATION,
    DEFAULT_HEAL_MINUTES,
    RECOVERY_LENGTH,
    RECOVERY_SELF_TOKENS,
    RECOVERY_TOKENS,
    ApplyRequest,
)
from sleb_cli.texts.named import is_reference, is_written, text_source
from sleb_cli.texts.source import TextSplit
from sleb_cli.texts.written import SELF, SELF_CHAT
from sleb_cli.units import format_bytes, plural
from sleb_plugins import DataError, MachineError, UnsupportedModelError

TRAIN, VALIDATION, TEST = TextSplit(0, 0.7), TextSplit(0.7, 0.9), TextSplit(0.9, 1)
"""Values are fitted to the first split, chosen by the second, and measured on the third."""
MIN_SEQUENCES = 5
MAX_VALIDATION_TOKENS, MAX_TEST_TOKENS = 8192, 8192
"""Every fit runs the model on all of the validation text, so it must be short."""

_STAGES: Mapping[str, Callable[[ApplyRequest], Stage]] = {
    "recover": lambda request: ClosedForm(),
    "heal": lambda request: Heal(
        HealBudget(
            request.heal_minutes or (None if request.heal_tokens else DEFAULT_HEAL_MINUTES),
            request.heal_tokens,
        )
    ),
}
"""The stage that each option asks for."""


def resolve_recovery(
    subject: Subject, request: ApplyRequest, output: Output, group: ProcessGroup, notify: Notify
) -> RecoverySettings:
    """Decide on which text, in which data type and where a model is recovered."""
    architecture, surgery, dtype = subject.architecture, subject.surgery, output.dtype
    state = Unfinished(output.path)
    state.require_no_links()
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its blocks cannot be recovered.",
            hint="Recover the model it was quantized from, and quantize the result.",
        )
    target = dtype or architecture.dtype or torch.float32
    # Values are rounded to what every file can hold, which may be narrower than what the config
    # says.
    written = [dtype] if dtype else float_dtypes(architecture.source.weights)
    stored = min([*written, target], key=lambda dtype: dtype.itemsize)
    stages = tuple(_STAGES[option](request) for option in request.recoveries)
    place_in = partial(_place_recovery, subject, request, stages, dtype, group, notify)
    # An unfinished healing goes on in the data type that it began in.
    placement, text, needed = place_in(state.dtype(dtype_name(stored)) or AUTO)
    is_wider, device = placement.dtype is not target and not placement.stream, placement.device
    if is_wider and group.from_main(lambda: memory_shortage(sum(needed.values()), device)):
        placement, text, needed = place_in(dtype_name(target))  # takes half of the memory
    on_host = (
        placement.stream
        and device != CPU
        and memory_shortage(sum(needed.values()), device) is not None
    )
    if on_host:
        _require_free(CPU, {HIDDEN_STATES: needed.pop(HIDDEN_STATES)}, stages[-1])
    _require_free(device, needed, stages[-1])
    kept_bytes = max(0, sum(stage.saved_bytes(surgery, stored) for stage in stages) - state.size)
    return RecoverySettings(
        surgery, stages, placement, stored, on_host, _splits(text), state, kept_bytes
    )


def _place_recovery(
    subject: Subject,
    request: ApplyRequest,
    stages: Sequence[Stage],
    cast: torch.dtype | None,
    group: ProcessGroup,
    notify: Notify,
    dtype: str,
) -> tuple[Placement, CalibrationSettings, dict[str, int]]:
    """Place the model in this data type; return also the text, and the bytes of memory by purpose."""
    device = choose_device(request.device or AUTO)
    placement = group.from_main(
        lambda: place_model(
            subject.architecture,
            device,
            dtype,
            notify,
            device_map=request.device_map,
            stream=request.stream if all(stage.streams for stage in stages) else False,
            reserved=sum(stage.reserved_bytes(subject.surgery) for stage in stages),
            cast=cast,
        )
    )
    text = _resolve_text(request, subject, stream=placement.stream)
    if (
        placement.rounded
    ):  # rounded weights write other text, which must not be taken from the cache
        text = replace(text, writer=f"{text.writer} {dtype_name(placement.rounded)}")
    needed = {}
    if placement.device_map is None:  # a map spreads the model over several devices
        weights = "two blocks and what is outside of them" if placement.stream else "the model"
        needed[weights] = model_bytes(
            subject.architecture, placement.dtype, stream=placement.stream
        )
    for stage in stages:
        needed |= stage.needed_bytes(
            subject.surgery, placement.dtype, text.samples * text.sequence_length
        )
    return replace(placement, device=device), text, needed


def _splits(text: CalibrationSettings) -> list[CalibrationSettings]:
    validation = max(1, min(text.samples // 5, MAX_VALIDATION_TOKENS // text.sequence_length))
    test = max(1, min(text.samples // 10, MAX_TEST_TOKENS // text.sequence_length))
    counts = {TRAIN: text.samples - validation - test, VALIDATION: validation, TEST: test}
    return [replace(text, samples=samples, split=split) for split, samples in counts.items()]


def _require_free(device: torch.device, needed: Mapping[str, int], last: Stage) -> None:
    purposes = ", ".join(f"{format_bytes(size)} for {purpose}" for purpose, size in needed.items())
    if lacking := memory_shortage(
        sum(needed.values()), device, f"memory on {device.type} ({purposes})"
    ):
        raise MachineError(
            f"{last.title} needs {lacking}.",
            hint="Use fewer --samples, leave out --heal or --recover, or use a machine with more "
            "memory.",
        )


def _resolve_text(request: ApplyRequest, subject: Subject, *, stream: bool) -> CalibrationSettings:
    """Fill unset options with the defaults; fitting weights takes more text than a search."""
    architecture = subject.architecture
    length = request.sequence_length or min(
        RECOVERY_LENGTH, architecture.longest_sequence or RECOVERY_LENGTH
    )
    source = request.calibration or _default_source(subject, stream=stream)
    text = resolve_calibration(
        architecture, source, request.samples, length, request.seed, request.chat
    )
    if stream:
        require_given_text(text)
    if not (text.samples_given or is_reference(text.source)):
        tokens = RECOVERY_SELF_TOKENS if all(map(is_written, text.shares)) else RECOVERY_TOKENS
        text = replace(text, samples=max(MIN_SEQUENCES, tokens // length))
    if text.samples < MIN_SEQUENCES:
        raise DataError(
            f"{plural(text.samples, 'sequence')} cannot be divided into training, validation and "
            f"test.",
            hint=f"Use --samples {MIN_SEQUENCES} or more.",
        )
    return text


def _default_source(subject: Subject, *, stream: bool) -> str:
    """Return the default text to recover on: the plan's, if it is general, with a quarter of the
    model's own.
    """
    # A streamed model writes nothing, since each token would read all of its weights.
    source, searched = (
        subject.architecture.source,
        subject.plan.calibration if subject.plan else None,
    )
    is_chat = not stream and has_tokenizer(source) and bool(load_tokenizer(source).chat_template)
    alone = DEFAULT_CALIBRATION if stream else f"{SELF}:0.5,{SELF_CHAT}:0.5" if is_chat else SELF
    if searched is None or searched.chat:
        return alone
    shares = parse_mixture(searched.source)
    if [*map(is_written, shares)] == [True]:
        return alone
    is_mixed = (
        len(shares) > 1 or "," in searched.source
    )  # a name with a comma cannot be part of a mixture
    text = searched.source if is_mixed else text_source(next(iter(shares))).in_windows
    if stream:
        return alone if any(map(is_written, shares)) else text
    return text if is_mixed else f"{text}:0.75,{SELF_CHAT if is_chat else SELF}:0.25"
