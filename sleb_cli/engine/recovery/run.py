"""`sleb apply --recover` and `--heal`: new values for the kept blocks, and how much they recover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name, free_bytes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.file_tensors import file_tensors
from sleb_cli.engine.recovery.heal import Case, HealBudget, Healed, choose_budget, heal
from sleb_cli.engine.recovery.heal_state import HealState, Saved
from sleb_cli.engine.recovery.low_rank import RANK, rank_of, trained_numbers
from sleb_cli.engine.recovery.process_group import ProcessGroup
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_dense, load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import (
    REFERENCE_PRESETS,
    SELF,
    Calibration,
    CalibrationSettings,
    calibrate,
    draw,
    resolve_calibration,
)
from sleb_cli.engine.text.mixture import parse_mixture
from sleb_cli.events import Notify, task
from sleb_cli.plan import HealRecord, LossesRecord, Plan, RecoveryRecord
from sleb_cli.requests import (
    AUTO,
    HEAL_LENGTH,
    RECOVERY_LENGTH,
    RECOVERY_SELF_TOKENS,
    RECOVERY_TOKENS,
    ApplyRequest,
)
from sleb_cli.units import format_bytes
from sleb_plugins import DataError, MachineError, ModelError, UnsupportedModelError

HELD_OUT_EVERY = 5
"""One sequence in this many is held out: it decides on each fit, and the recovery is measured on it."""
HELD_OUT_TOKENS = 8192
"""The most tokens to hold out, since every fit runs the model on all of them; the others are fitted."""

TRAINED_BELOW = 4
"""Training starts this many blocks below the first gap; the blocks before that keep the dense model's inputs."""
SHARING_TOLERANCE = 1e-2

TRAINING_BYTES = 20
"""Bytes per trained number, besides the models, in float32: its value, best value, gradient and two moments."""


@dataclass(frozen=True)
class Recovered:
    """New values of kept blocks.

    Attributes:
        parameters: the values by the dense model's parameter names.
        tensors: the values by the names in the pruned checkpoint's files.
        record: the text and the losses.
    """

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    record: RecoveryRecord


@dataclass(frozen=True)
class _Start:
    """The state before healing: held-out sequences, values fitted in closed form, and the record so far."""

    held_out: Tensor
    values: dict[str, Tensor]
    record: RecoveryRecord


def recover(
    subject: Subject, request: ApplyRequest, cast: torch.dtype | None, state: HealState, notify: Notify
) -> Recovered:
    """Return new values for the kept blocks with which the pruned model comes closer to the dense one.

    Args:
        subject: the model and the removed blocks.
        request: how to recover.
        cast: the data type of the checkpoint; None for the model's own.
        state: the saved state of an unfinished healing.
        notify: the listener for events.

    Raises:
        UnsupportedModelError: the model is quantized, or its files cannot take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
        PlanError: the unfinished healing is a different one.
    """
    return _Recovery(subject, request, cast, state, notify).run()


class _Recovery:
    def __init__(
        self, subject: Subject, request: ApplyRequest, cast: torch.dtype | None, state: HealState, notify: Notify
    ) -> None:
        self.subject, self.request, self.state, self.notify = subject, request, state, notify
        self.architecture, self.surgery = subject.architecture, subject.surgery
        self.budget = choose_budget(request.heal_minutes, request.heal_tokens) if request.heal else None
        self.settings = _resolve_settings(request, subject)
        _require_plain(self.architecture)
        self.group = ProcessGroup(choose_device(request.device or AUTO))
        self.dtype = cast or choose_dtype("auto", self.architecture.config.dtype, self.group.device)
        _require_memory(self.surgery, self.dtype, self.group.device, heals=request.heal)

    def run(self) -> Recovered:
        saved = self.state.read(self.identity) if self.request.heal and self.request.resume else None
        self.tokenizer = load_tokenizer(self.architecture.source)
        model = load_dense(self.architecture, self.dtype, self.group.device, self.notify)
        with SkippableModel(model, self.architecture.blocks_of(model)) as skippable:
            start = _resumed(saved) if saved else self._closed_form(skippable)
            values, record = start.values, start.record
            if self.budget:
                values, record = self._heal(skippable, self.budget, start, saved)
        self.group.leave()
        return Recovered(values, file_tensors(model, self.surgery, values), record)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a healing to be resumed."""
        text, budget = self.settings, self.budget
        return {
            "model": self.architecture.source.fingerprint,
            "removals": list(self.surgery.removals),
            "recover": self.request.recover,
            "calibration": text.source,
            "samples": text.samples,
            "sequence_length": text.sequence_length,
            "seed": text.seed,
            "heal_minutes": budget.minutes if budget else None,
            "heal_tokens": budget.tokens if budget else None,
            "dtype": dtype_name(self.dtype),
            "processes": self.group.size,
        }

    def _text(self, skippable: SkippableModel, settings: CalibrationSettings, notify: Notify) -> Calibration:
        skippable.skip(())
        return calibrate(settings, self.tokenizer, lambda: skippable.model, notify)

    def _closed_form(self, skippable: SkippableModel) -> _Start:
        """Draw the text, measure the cost of the removal, and fit in closed form if requested."""
        calibration = self._text(skippable, self.settings, self.notify)
        fit, held_out = _split(calibration.sequences)
        removed, dense = self.surgery.removed, Variant(skippable)
        record = RecoveryRecord(
            text=calibration.record,
            held_out=len(held_out),
            dense=self._measure("dense", dense, dense, held_out),
            pruned=self._measure("pruned", Variant(skippable, removed), dense, held_out),
        )
        values: dict[str, Tensor] = {}
        if self.request.recover:
            values, closed_form = recover_in_closed_form(skippable, removed, fit, held_out, self.notify)
            after = self._measure("recovered", Variant(skippable, removed, values), dense, held_out)
            record = record.model_copy(update={"closed_form": closed_form, "closed_form_losses": after})
        return _Start(held_out, values, record)

    def _heal(
        self, skippable: SkippableModel, budget: HealBudget, start: _Start, saved: Saved | None
    ) -> tuple[dict[str, Tensor], RecoveryRecord]:
        """Distill the dense model into the pruned one, which has the values from `start`."""
        model = load_pruned(self.surgery, self.dtype, self.group.device, self.notify)
        parameters = block_parameters(self.surgery, model)
        _place(model, parameters, start.values)
        start_tensors = {f"start.{name}": value for name, value in start.values.items()} | {"held_out": start.held_out}

        def save(now: Saved) -> None:
            record = {"record": start.record.model_dump_json()}
            self.state.write(self.identity, Saved(now.data | record, now.tensors | start_tensors))

        with SkippableModel(model, self.architecture.blocks_of(model)) as student:
            case = self._case(skippable, Variant(student), parameters, start, budget)
            healed = heal(case, budget, self.group, saved, save, self.notify)
        values = start.values | healed.values
        after = self._measure(
            "healed", Variant(skippable, self.surgery.removed, values), Variant(skippable), start.held_out
        )
        return values, start.record.model_copy(update={"heal": self._heal_record(case, budget, healed, after)})

    def _case(
        self,
        skippable: SkippableModel,
        student: Variant,
        parameters: Mapping[str, nn.Parameter],
        start: _Start,
        budget: HealBudget,
    ) -> Case:
        teacher, first = Variant(skippable), self._first_trained(start.values)
        if not can_share(teacher, student, first, start.held_out[:1].to(self.group.device)):
            first = 0
        weights = {name: parameter for name, parameter in parameters.items() if rank_of(parameter.shape)}
        return Case(
            teacher=teacher,
            student=student,
            first=first,
            weights={name: weights[name] for name in self._names_from(first, weights)},
            write=lambda number, notify: self._text(skippable, self._portion(budget, number), notify).sequences,
            held_out=start.held_out,
            seed=self.settings.seed,
            width=self.architecture.text_config.hidden_size,
        )

    def _heal_record(self, case: Case, budget: HealBudget, healed: Healed, after: LossesRecord) -> HealRecord:
        progress = healed.progress
        return HealRecord(
            minutes=budget.minutes,
            token_budget=budget.tokens,
            sequence_length=self.settings.sequence_length,
            batch_size=case.batch * self.group.size,
            learning_rate=case.rate,
            rank=RANK,
            tokens=progress.tokens,
            kept_tokens=progress.best_tokens,
            steps=progress.steps,
            seconds=progress.seconds,
            stopped=healed.stopped,
            losses=after,
        )

    def _first_trained(self, values: Mapping[str, Tensor]) -> int:
        """Return the first block to train: a few below the first gap, or the first fitted one if that is lower."""
        fitted = [block for block in range(self.architecture.block_count) if self._names_of(block, values)]
        return max(0, min([min(self.surgery.removed) - TRAINED_BELOW, *fitted]))

    def _names_of(self, block: int, names: Iterable[str]) -> list[str]:
        """Return the names of the parameters of a block."""
        return [name for name in names if name.startswith(f"{self.architecture.adapter.blocks_path}.{block}.")]

    def _names_from(self, first: int, names: Iterable[str]) -> list[str]:
        """Return the names of the parameters of the blocks from `first` on."""
        below = {name for block in range(first) for name in self._names_of(block, names)}
        return [name for name in names if name not in below]

    def _portion(self, budget: HealBudget, number: int) -> CalibrationSettings:
        """Return the settings of one portion of the text to heal on, drawn by a seed of its own."""
        settings = self.settings
        wanted = -(-budget.portion_tokens // settings.sequence_length)
        samples = max(wanted, *(math.ceil(1 / part.share) for part in settings.parts))
        if len(settings.parts) > 1 or settings.source in REFERENCE_PRESETS:
            # The shares of the sources hold only if each has enough text, so draw no more than before.
            samples = min(settings.samples, samples)
        return replace(settings, samples=samples, samples_given=False, seed=settings.seed + 1 + number)

    def _measure(self, what: str, variant: Variant, dense: Variant, sequences: Tensor) -> LossesRecord:
        with task(self.notify, f"Measuring the {what} model on held-out text"):
            loss, divergence = losses(variant, dense, sequences)
        if not math.isfinite(loss + divergence):
            raise ModelError(
                f"The loss of the {what} model on held-out text is {loss}.",
                hint="Use a wider data type, or other text.",
            )
        return LossesRecord(loss=loss, divergence=divergence)


@torch.inference_mode()
def can_share(dense: Variant, pruned: Variant, first: int, ids: Tensor) -> bool:
    """Whether the pruned model may start at block `first` with the dense model's hidden states.

    It may not if blocks take more than hidden states from earlier blocks.
    """
    if not first:
        return False
    try:
        entering, _ = dense.entering_and_final_states(ids, first)
        found, expected = pruned.final_states(ids, (first, entering)), pruned.final_states(ids)
    except UnsupportedModelError:
        return False
    return float((found - expected).float().norm() / expected.float().norm()) < SHARING_TOLERANCE


def block_parameters(surgery: Surgery, pruned: Any) -> dict[str, nn.Parameter]:
    """Return the floating-point parameters of a pruned model's blocks, by the dense model's parameter names."""
    path, blocks = surgery.architecture.adapter.blocks_path, surgery.architecture.blocks_of(pruned)
    return {
        f"{path}.{old}.{name}": parameter
        for new, old in enumerate(surgery.kept.blocks)
        for name, parameter in blocks[new].named_parameters()
        if parameter.is_floating_point()
    }


def _place(pruned: Any, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values by the dense model's names into the pruned one; outside the blocks, the names are the same."""
    for name, value in values.items():
        parameter = parameters[name] if name in parameters else pruned.get_parameter(name)
        parameter.data.copy_(value)


def _resumed(saved: Saved) -> _Start:
    start = {name.removeprefix("start."): value for name, value in saved.tensors.items() if name.startswith("start.")}
    return _Start(saved.tensors["held_out"], start, RecoveryRecord.model_validate_json(saved.data["record"]))


def _require_plain(architecture: Architecture) -> None:
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its blocks cannot be recovered.",
            hint="Recover the model it was quantized from, and quantize the result.",
        )


def _require_memory(surgery: Surgery, dtype: torch.dtype, device: torch.device, *, heals: bool) -> None:
    """Check that the models fit into memory; recovery loads them, while pruning alone needs only a buffer."""
    dense = surgery.architecture.skeleton
    needed = sum(parameter.numel() for parameter in dense.parameters()) * dtype.itemsize
    if heals:
        blocks = surgery.architecture.blocks_of(dense)
        shapes = [parameter.shape for block in surgery.kept.blocks for parameter in blocks[block].parameters()]
        # Both models, the original values of the trained weights, and the training state.
        needed += needed + sum(map(math.prod, shapes)) * dtype.itemsize
        needed += sum(map(trained_numbers, shapes)) * TRAINING_BYTES
    free = free_bytes(device)
    if needed > free:
        what = "Healing needs both models and its training state" if heals else "Recovery needs the dense model"
        raise MachineError(
            f"{what} in memory: {format_bytes(needed)} on {device.type}, and only {format_bytes(free)} are free.",
            hint=f"Leave out {'--heal' if heals else '--recover'}, or use a machine with more memory.",
        )


def _resolve_settings(request: ApplyRequest, subject: Subject) -> CalibrationSettings:
    """Fill unset options with the defaults; fitting weights takes more text than a search."""
    architecture = subject.architecture
    default = HEAL_LENGTH if request.heal else RECOVERY_LENGTH
    length = request.sequence_length or min(default, architecture.longest_sequence or default)
    source = request.calibration or (_default_source(subject.plan) if request.recover else SELF)
    settings = resolve_calibration(replace(request, calibration=source, sequence_length=length), architecture)
    if settings.samples_given or settings.source in REFERENCE_PRESETS:
        return settings
    tokens = RECOVERY_SELF_TOKENS if settings.source == SELF else RECOVERY_TOKENS
    return replace(settings, samples=max(HELD_OUT_EVERY, tokens // length))


def _default_source(plan: Plan | None) -> str:
    """Return the default text to fit on: the plan's, if it is general, with a quarter of the model's own."""
    searched = plan.calibration if plan else None
    if searched is None or searched.chat or searched.source == SELF:
        return SELF
    source = searched.source.removesuffix("-sleb")
    return source if len(parse_mixture(source)) > 1 else f"{source}:0.75,{SELF}:0.25"


def _split(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Split the sequences into those to fit and those held out.

    Raises:
        DataError: there are too few.
    """
    if len(sequences) < HELD_OUT_EVERY:
        raise DataError(
            f"{len(sequences)} sequences are too few to recover on: one in {HELD_OUT_EVERY} is held out.",
            hint=f"Use --samples {HELD_OUT_EVERY} or more, or more text.",
        )
    rows = range(HELD_OUT_EVERY - 1, len(sequences), HELD_OUT_EVERY)
    # Drawn at random: a mixture's sources alternate, so regular steps could always hit the same one.
    drawn = [rows[row] for row in draw(len(rows), max(1, HELD_OUT_TOKENS // sequences.shape[1]), seed=0)]
    held_out = torch.zeros(len(sequences), dtype=torch.bool)
    held_out[drawn] = True
    return sequences[~held_out], sequences[held_out]
