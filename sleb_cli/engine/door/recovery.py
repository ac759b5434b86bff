"""The door of `sleb apply --recover` and `--heal`: text, placement and memory are decided before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from sleb_cli.asked.mixture import parse_mixture
from sleb_cli.asked.text_names import REFERENCE_PRESETS, SELF, SELF_CHAT, is_written
from sleb_cli.engine.device import CPU, choose_device, dtype_name, own_free_bytes
from sleb_cli.engine.forward.placement import Placement, place_model
from sleb_cli.engine.forward.streaming import streamed_bytes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.output.apply import Output
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.closed_form import fitted_numbers, fitting_bytes
from sleb_cli.engine.recovery.heal import HealBudget
from sleb_cli.engine.recovery.low_rank import trained_numbers
from sleb_cli.engine.recovery.stage import RecoverySettings
from sleb_cli.engine.recovery.unfinished import Unfinished
from sleb_cli.engine.surgery.loading import has_tokenizer, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.settings import CalibrationSettings, require_given_text, resolve_calibration
from sleb_cli.engine.text.sources import TextSplit
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
from sleb_cli.units import format_bytes, plural
from sleb_plugins import DataError, MachineError, UnsupportedModelError

TRAIN, VALIDATION, TEST = TextSplit(0, 0.7), TextSplit(0.7, 0.9), TextSplit(0.9, 1)
"""The parts of a text that values are fitted to, that choose among them, and that the recovery is measured on."""
FEWEST_SEQUENCES = 5
VALIDATION_TOKENS, TEST_TOKENS = 8192, 8192
"""The most tokens of these parts: every fit runs the model on all of the validation text."""

HIDDEN_STATES = "hidden states"

TRAINING_BYTES = 32
"""Bytes per trained number, besides the models, in float32: its value, best value and two moments, and in a step
three of its gradient and what AdamW computes."""
KEPT_BYTES = 16
"""The same of what is kept: its value, best value and two moments."""


def resolve_recovery(
    subject: Subject, request: ApplyRequest, output: Output, group: ProcessGroup, notify: Notify
) -> RecoverySettings:
    """Decide how to recover a model into a checkpoint.

    Raises:
        UnsupportedModelError: the model is quantized.
        MachineError: it does not fit into memory.
        DataError: the text is too short.
        UsageError: a streamed model is to write the text.
        OutputError: what is found would be saved elsewhere.
    """
    architecture, surgery, dtype = subject.architecture, subject.surgery, output.dtype
    state = Unfinished(output.place)
    state.require_no_links()
    minutes = request.heal_minutes or (DEFAULT_HEAL_MINUTES if request.heal_tokens is None else None)
    budget = HealBudget(minutes, request.heal_tokens) if request.heal else None
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its blocks cannot be recovered.",
            hint="Recover the model it was quantized from, and quantize the result.",
        )
    device = choose_device(request.device or AUTO)
    own = dtype or architecture.dtype or torch.float32
    # Values are rounded to what every file can hold, which may be narrower than what the config says.
    written = [dtype] if dtype else architecture.source.weights.float_dtypes
    asked = False if budget else request.stream
    blocks = architecture.blocks_of(architecture.skeleton)
    kept = [blocks[block] for block in surgery.kept.blocks]
    width = architecture.text_config.hidden_size
    sums = max(fitting_bytes(block, width) for block in kept) if request.recover else 0

    def place(name: str) -> tuple[Placement, CalibrationSettings, dict[str, int]]:
        """Return where the model is if it computes in this data type, the text, and the memory that it takes."""
        found = group.from_main(
            lambda: place_model(
                architecture,
                device,
                name,
                notify,
                device_map=request.device_map,
                stream=asked,
                reserved=sums,
                cast=dtype,
            )
        )
        text = _resolve_text(request, subject, stream=found.stream)
        needed = _needed_bytes(architecture, kept, found, heal=request.heal)
        if request.recover:
            # What enters the model and a block on all the text, in the dense and in the recovered model, and what
            # leaves it.
            needed[HIDDEN_STATES] = 4 * text.samples * text.sequence_length * width * found.dtype.itemsize
            needed["regression sums"] = sums
        return replace(found, device=device), text, needed

    placement, text, needed = place(state.dtype or AUTO)  # an unfinished healing goes on in its own
    narrower = placement.dtype is not own and not placement.stream
    if narrower and group.from_main(lambda: sum(needed.values()) > own_free_bytes(device)):
        placement, text, needed = place(dtype_name(own))  # which takes half of the memory
    on_host = placement.stream and device != CPU and sum(needed.values()) > own_free_bytes(device)
    if on_host:
        _require_free(CPU, {HIDDEN_STATES: needed.pop(HIDDEN_STATES)}, heal=request.heal)
    _require_free(device, needed, heal=request.heal)
    stored = min([*written, own], key=lambda each: each.itemsize)
    splits = _splits(text)
    fitted = kept[max(0, min(surgery.removed) - 1) :] if request.recover else []
    to_keep = sum(fitted_numbers(block, width) for block in fitted) * stored.itemsize
    to_keep += _trained(kept) * KEPT_BYTES if request.heal else 0
    kept_bytes = max(0, to_keep - state.size)
    return RecoverySettings(subject, request.recover, budget, placement, stored, on_host, splits, state, kept_bytes)


def _trained(kept: Sequence[nn.Module]) -> int:
    """Return how many numbers are trained, if no block before the gap is left as it is."""
    return sum(trained_numbers(parameter.shape) for block in kept for parameter in block.parameters())


def _splits(text: CalibrationSettings) -> list[CalibrationSettings]:
    """Return the settings of the texts for training, validation and test."""
    validation = max(1, min(text.samples // 5, VALIDATION_TOKENS // text.sequence_length))
    test = max(1, min(text.samples // 10, TEST_TOKENS // text.sequence_length))
    counts = {TRAIN: text.samples - validation - test, VALIDATION: validation, TEST: test}
    return [replace(text, samples=samples, split=split) for split, samples in counts.items()]


def _needed_bytes(
    architecture: Architecture, kept: Sequence[nn.Module], placement: Placement, *, heal: bool
) -> dict[str, int]:
    """Return the memory that weights take, by what for; of a model that a device map spreads out, only the rest."""
    size, needed = placement.dtype.itemsize, dict[str, int]()
    if placement.stream:
        needed["two blocks and what is outside of them"] = streamed_bytes(architecture, placement.dtype)
    elif placement.device_map is None:
        needed["the model"] = sum(parameter.numel() for parameter in architecture.skeleton.parameters()) * size
    if heal:
        # Their original values, and all that is not trained, both models share.
        needed["the trained weights"] = sum(each.numel() for block in kept for each in block.parameters()) * size
        needed["the state of training"] = _trained(kept) * TRAINING_BYTES
    return needed


def _require_free(device: torch.device, needed: Mapping[str, int], *, heal: bool) -> None:
    total, free = sum(needed.values()), own_free_bytes(device)
    if total <= free:
        return
    parts = ", ".join(f"{format_bytes(size)} for {what}" for what, size in needed.items())
    raise MachineError(
        f"{'Healing' if heal else 'Recovery'} needs {format_bytes(total)} of memory on {device.type} ({parts}), but "
        f"only {format_bytes(free)} is free.",
        hint="Use fewer --samples, leave out --heal or --recover, or use a machine with more memory.",
    )


def _resolve_text(request: ApplyRequest, subject: Subject, *, stream: bool) -> CalibrationSettings:
    """Fill unset options with the defaults; fitting weights takes more text than a search.

    Raises:
        DataError: the text is too short.
        UsageError: a streamed model is to write it.
    """
    architecture = subject.architecture
    length = request.sequence_length or min(RECOVERY_LENGTH, architecture.longest_sequence or RECOVERY_LENGTH)
    source = request.calibration or _default_source(subject, stream=stream)
    text = resolve_calibration(architecture, source, request.samples, length, request.seed, request.chat)
    if stream:
        require_given_text(text)
    if not (text.samples_given or text.source in REFERENCE_PRESETS):
        tokens = RECOVERY_SELF_TOKENS if all(map(is_written, text.shares)) else RECOVERY_TOKENS
        text = replace(text, samples=max(FEWEST_SEQUENCES, tokens // length))
    if text.samples < FEWEST_SEQUENCES:
        raise DataError(
            f"{plural(text.samples, 'sequence')} cannot be divided into training, validation and test.",
            hint=f"Use --samples {FEWEST_SEQUENCES} or more.",
        )
    return text


def _default_source(subject: Subject, *, stream: bool) -> str:
    """Return the default text to recover on: the plan's, if it is general, with a quarter of the model's own.

    A chat model writes conversations. A streamed model writes nothing: each token would read all of it.
    """
    source, searched = subject.architecture.source, subject.plan.calibration if subject.plan else None
    is_chat = not stream and has_tokenizer(source) and bool(load_tokenizer(source).chat_template)
    alone = DEFAULT_CALIBRATION if stream else f"{SELF}:0.5,{SELF_CHAT}:0.5" if is_chat else SELF
    if searched is None or searched.chat:
        return alone
    shares = parse_mixture(searched.source)
    if [*map(is_written, shares)] == [True]:
        return alone
    is_mixed = len(shares) > 1 or "," in searched.source  # a name that cannot be in a mixture stays alone
    text = searched.source if is_mixed else next(iter(shares)).removesuffix("-sleb")
    if stream:
        return alone if any(map(is_written, shares)) else text
    return text if is_mixed else f"{text}:0.75,{SELF_CHAT if is_chat else SELF}:0.25"
