"""From a subject to new values for its kept blocks: calibration, fit in closed form, healing, and what each gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sleb_cli.engine.architecture import Architecture
from sleb_cli.engine.calibration import (
    REFERENCE_PRESETS,
    SELF,
    CalibrationRequest,
    CalibrationSettings,
    calibrate,
    settle_calibration,
)
from sleb_cli.engine.gates import GatedModel
from sleb_cli.engine.loading import choose_device, choose_dtype, load_dense, load_tokenizer
from sleb_cli.engine.memory import free_bytes
from sleb_cli.engine.recovery.naming import file_tensors
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.subject import Subject
from sleb_cli.events import Notify, TaskFinished, TaskStarted
from sleb_cli.plan import LossesRecord, RecoveryRecord
from sleb_cli.units import size as in_words
from sleb_plugins import DataError, MachineError, UnsupportedModelError

DEFAULT_SOURCE = SELF
"""The text to recover on where none is named: it needs no data, and favours no kind of text."""
DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512

HELD_OUT_EVERY = 5
"""Every so manieth sequence is not fitted: what recovery gave is measured there."""


@dataclass(frozen=True)
class RecoveryRequest:
    """What the user asked for; None leaves it to us."""

    closed_form: bool
    calibration: CalibrationRequest
    device: str = "auto"


@dataclass(frozen=True)
class Recovered:
    """New values of kept blocks, and how they came about.

    Attributes:
        parameters: by the dense model's own parameter names.
        tensors: the same by the names in the pruned checkpoint's files.
        record: on which text, and what it gave.
    """

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    record: RecoveryRecord


def recover(subject: Subject, request: RecoveryRequest, cast: torch.dtype | None, notify: Notify) -> Recovered:
    """Fit the kept blocks anew, so that the pruned model does again what the dense one does.

    `cast` is the data type that the checkpoint is to have, where it is not the model's own.

    Raises:
        UnsupportedModelError: the model is quantized, or its files do not take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
    """
    architecture, surgery = subject.architecture, subject.surgery
    device = choose_device(request.device)
    dtype = cast or choose_dtype("auto", architecture, device)
    _require_plain(architecture)
    _require_memory(architecture, dtype, device)
    tokenizer = load_tokenizer(architecture.source)
    model = load_dense(architecture, dtype, device, notify)
    calibration = calibrate(_settle(request.calibration, architecture), tokenizer, lambda: model, notify)
    fit, held_out = _split(calibration.sequences)
    with GatedModel(model, architecture.blocks_of(model)) as gated:
        dense, pruned = Variant(gated), Variant(gated, surgery.removed)
        record = RecoveryRecord(
            text=calibration.record,
            held_out=len(held_out),
            dense=_measured("dense", dense, dense, held_out, notify),
            pruned=_measured("pruned", pruned, dense, held_out, notify),
        )
        values: dict[str, Tensor] = {}
        if request.closed_form:
            from sleb_cli.engine.recovery.closed_form import recover_in_closed_form  # type: ignore[import-not-found]

            values, how = recover_in_closed_form(gated, surgery.removed, fit, held_out, notify)
            recovered = Variant(gated, surgery.removed, values)
            after = _measured("recovered", recovered, dense, held_out, notify)
            record = record.model_copy(update={"closed_form": how, "closed_form_losses": after})
    return Recovered(values, file_tensors(model, surgery, values), record)


def _measured(what: str, variant: Variant, dense: Variant, sequences: Tensor, notify: Notify) -> LossesRecord:
    task = f"Measuring the {what} model on held-out text"
    notify(TaskStarted(task))
    found = losses(variant, dense, sequences)
    notify(TaskFinished(task))
    return found


def _require_plain(architecture: Architecture) -> None:
    if "quantization_config" in architecture.source.raw_config:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized: its blocks cannot be given new values.",
            hint="Recover the model that it was quantized from, and quantize the result.",
        )


def _require_memory(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Make sure that the dense model fits: recovery looks at all of it, also where pruning alone needs but a buffer."""
    parameters = sum(parameter.numel() for parameter in architecture.skeleton.parameters())
    needed, free = parameters * dtype.itemsize, free_bytes(device)
    if needed > free:
        raise MachineError(
            f"Recovery needs the dense model in memory: {in_words(needed)} on {device.type}, and {in_words(free)} are "
            "free.",
            hint="Leave out --recover and --heal, or take a machine with more memory.",
        )


def _settle(request: CalibrationRequest, architecture: Architecture) -> CalibrationSettings:
    """Fill in what the user left open, with more text than a search needs: weights are fitted to it."""
    length = request.sequence_length or min(DEFAULT_LENGTH, architecture.longest_sequence or DEFAULT_LENGTH)
    asked = replace(request, source=request.source or DEFAULT_SOURCE, sequence_length=length)
    settings = settle_calibration(asked, architecture)
    if settings.samples_were_asked or settings.source in REFERENCE_PRESETS:
        return settings
    return replace(settings, samples=DEFAULT_SAMPLES)


def _split(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the sequences into those to fit and those that are held out.

    Raises:
        DataError: there are too few.
    """
    if len(sequences) < HELD_OUT_EVERY:
        raise DataError(
            f"{len(sequences)} sequences are too few to recover on: every {HELD_OUT_EVERY}th is held out.",
            hint=f"Take --samples {HELD_OUT_EVERY} or more, or more text.",
        )
    held_out = torch.arange(len(sequences)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return sequences[~held_out], sequences[held_out]
