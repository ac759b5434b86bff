"""From a subject to new values for its kept blocks: calibration, fit in closed form, healing, and what each gave."""

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
from sleb_cli.engine.recovery.heal import Case, HealBudget, choose_budget, heal
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
    CalibrationRequest,
    CalibrationSettings,
    calibrate,
    draw,
    resolve_calibration,
)
from sleb_cli.engine.text.mixture import parse_mixture
from sleb_cli.events import Notify, TaskFinished, TaskStarted
from sleb_cli.plan import HealRecord, LossesRecord, Plan, RecoveryRecord
from sleb_cli.units import size as in_words
from sleb_plugins import DataError, MachineError, ModelError, UnsupportedModelError

DEFAULT_TOKENS = 65536
DEFAULT_OWN_TOKENS = 32768
"""Where the model writes all of it: writing a token takes as long as fitting several."""
DEFAULT_LENGTH = 512
HEAL_LENGTH = 256
"""Shorter where blocks are trained: more and cheaper steps in the same time."""

HELD_OUT_EVERY = 5
"""Every so manieth sequence is not fitted: it decides on each fit, and what recovery gave is measured there."""
HELD_OUT_TOKENS = 8192
"""Of more than that, so many are drawn and the rest is fitted: every fit runs the model on all that is held out."""

TRAINED_BELOW = 4
"""So many blocks below the first gap are trained, too: those before see what they saw in the dense model."""
SHARING_TOLERANCE = 1e-2

TRAINING_BYTES = 20
"""What a trained number takes beside the models, in float32: itself, its best, its gradient and two moments."""


@dataclass(frozen=True)
class HealRequest:
    """For how long to heal, None leaving it to us; `resume` goes on with a healing that was interrupted."""

    minutes: float | None = None
    tokens: int | None = None
    resume: bool = False


@dataclass(frozen=True)
class RecoveryRequest:
    """What the user asked for; None leaves it to us."""

    closed_form: bool
    calibration: CalibrationRequest
    heal: HealRequest | None = None
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


@dataclass(frozen=True)
class _Start:
    """Where healing begins: what was held out, what the closed form gave, and what is known so far."""

    held_out: Tensor
    values: dict[str, Tensor]
    record: RecoveryRecord


def recover(
    subject: Subject, request: RecoveryRequest, cast: torch.dtype | None, state: HealState, notify: Notify
) -> Recovered:
    """Give the kept blocks new values, so that the pruned model does again what the dense one does.

    Args:
        subject: the model and what is removed.
        request: how.
        cast: the data type that the checkpoint is to have, where it is not the model's own.
        state: where an unfinished healing is kept.
        notify: is told of the progress.

    Raises:
        UnsupportedModelError: the model is quantized, or its files do not take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
        PlanError: the healing to go on with is another one.
    """
    return _Recovery(subject, request, cast, state, notify).run()


class _Recovery:
    def __init__(
        self, subject: Subject, request: RecoveryRequest, cast: torch.dtype | None, state: HealState, notify: Notify
    ) -> None:
        self.subject, self.request, self.state, self.notify = subject, request, state, notify
        self.architecture, self.surgery = subject.architecture, subject.surgery
        self.budget = choose_budget(request.heal.minutes, request.heal.tokens) if request.heal else None
        self.settings = _resolve_settings(request, subject)
        _require_plain(self.architecture)
        self.group = ProcessGroup(choose_device(request.device))
        self.dtype = cast or choose_dtype("auto", self.architecture.config.dtype, self.group.device)
        _require_memory(self.surgery, self.dtype, self.group.device, heals=request.heal is not None)

    def run(self) -> Recovered:
        saved = self.state.read(self.identity) if self.request.heal and self.request.heal.resume else None
        self.tokenizer = load_tokenizer(self.architecture.source)
        model = load_dense(self.architecture, self.dtype, self.group.device, self.notify)
        with SkippableModel(model, self.architecture.blocks_of(model)) as skippable:
            start = _begun(saved) if saved else self._closed_form(skippable)
            values, record = start.values, start.record
            if self.budget:
                values, record = self._heal(skippable, self.budget, start, saved)
        self.group.leave()
        return Recovered(values, file_tensors(model, self.surgery, values), record)

    @property
    def identity(self) -> dict[str, Any]:
        """What an unfinished healing must agree in with the one that goes on with it."""
        text, budget = self.settings, self.budget
        return {
            "model": self.architecture.source.fingerprint,
            "removals": list(self.surgery.removals),
            "recover": self.request.closed_form,
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
        skippable.switch_off(())
        return calibrate(settings, self.tokenizer, lambda: skippable.model, notify)

    def _closed_form(self, skippable: SkippableModel) -> _Start:
        """Draw the text, measure what the removal cost, and fit in closed form where that was asked for."""
        calibration = self._text(skippable, self.settings, self.notify)
        fit, held_out = _split(calibration.sequences)
        removed, dense = self.surgery.removed, Variant(skippable)
        record = RecoveryRecord(
            text=calibration.record,
            held_out=len(held_out),
            dense=self._measured("dense", dense, dense, held_out),
            pruned=self._measured("pruned", Variant(skippable, removed), dense, held_out),
        )
        values: dict[str, Tensor] = {}
        if self.request.closed_form:
            values, how = recover_in_closed_form(skippable, removed, fit, held_out, self.notify)
            after = self._measured("recovered", Variant(skippable, removed, values), dense, held_out)
            record = record.model_copy(update={"closed_form": how, "closed_form_losses": after})
        return _Start(held_out, values, record)

    def _heal(
        self, skippable: SkippableModel, budget: HealBudget, start: _Start, saved: Saved | None
    ) -> tuple[dict[str, Tensor], RecoveryRecord]:
        """Distill from where the closed form ended."""
        model = load_pruned(self.surgery, self.dtype, self.group.device, self.notify)
        parameters = block_parameters(self.surgery, model)
        weights = {name: parameter for name, parameter in parameters.items() if rank_of(parameter.shape)}
        _place(model, parameters, start.values)
        first = self._first_trained(start.values)
        beginning = {f"start.{name}": value for name, value in start.values.items()} | {"held_out": start.held_out}

        def save(now: Saved) -> None:
            record = {"record": start.record.model_dump_json()}
            self.state.write(self.identity, Saved(now.data | record, now.tensors | beginning))

        with SkippableModel(model, self.architecture.blocks_of(model)) as student:
            teacher, pupil = Variant(skippable), Variant(student)
            if not can_share(teacher, pupil, first, start.held_out[:1].to(self.group.device)):
                first = 0
            case = Case(
                teacher=teacher,
                student=pupil,
                first=first,
                weights={name: weights[name] for name in self._names_from(first, weights)},
                write=lambda number, notify: self._text(skippable, self._portion(budget, number), notify).sequences,
                held_out=start.held_out,
                seed=self.settings.seed,
                width=self.architecture.text_config.hidden_size,
            )
            healed = heal(case, budget, self.group, saved, save, self.notify)
        values, progress = start.values | healed.values, healed.progress
        record = HealRecord(
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
            losses=self._measured(
                "healed", Variant(skippable, self.surgery.removed, values), Variant(skippable), start.held_out
            ),
        )
        return values, start.record.model_copy(update={"heal": record})

    def _first_trained(self, values: Mapping[str, Tensor]) -> int:
        """Choose the first block to train: a few below the first gap, and none that was given new values below it."""
        fitted = [block for block in range(self.architecture.block_count) if self._names_of(block, values)]
        return max(0, min([min(self.surgery.removed) - TRAINED_BELOW, *fitted]))

    def _names_of(self, block: int, names: Iterable[str]) -> list[str]:
        """Give the names of parameters of a block."""
        return [name for name in names if name.startswith(f"{self.architecture.adapter.blocks_path}.{block}.")]

    def _names_from(self, first: int, names: Iterable[str]) -> list[str]:
        """Give the names of parameters of blocks from `first` on."""
        below = {name for block in range(first) for name in self._names_of(block, names)}
        return [name for name in names if name not in below]

    def _portion(self, budget: HealBudget, number: int) -> CalibrationSettings:
        """Give the settings of one portion of the text to heal on: other sequences than those that are held out."""
        settings = self.settings
        wanted = -(-budget.portion_tokens // settings.sequence_length)
        samples = max(wanted, *(math.ceil(1 / part.share) for part in settings.parts))
        if len(settings.parts) > 1 or settings.source in REFERENCE_PRESETS:
            # Their shares hold only where each source has enough: no more than was drawn before.
            samples = min(settings.samples, samples)
        return replace(settings, samples=samples, samples_were_asked=False, seed=settings.seed + 1 + number)

    def _measured(self, what: str, variant: Variant, dense: Variant, sequences: Tensor) -> LossesRecord:
        task = f"Measuring the {what} model on held-out text"
        self.notify(TaskStarted(task))
        loss, divergence = losses(variant, dense, sequences)
        self.notify(TaskFinished(task))
        if not math.isfinite(loss + divergence):
            raise ModelError(
                f"The {what} model's loss on the held-out text is {loss}.", hint="Try a wider data type, or other text."
            )
        return LossesRecord(loss=loss, divergence=divergence)


@torch.inference_mode()
def can_share(dense: Variant, pruned: Variant, first: int, ids: Tensor) -> bool:
    """Whether the pruned model's walk may begin at block `first` with the dense model's states.

    It may not where blocks read more from those before them than hidden states.
    """
    if not first:
        return False
    try:
        entering, _ = dense.two_depths(ids, first)
        found, expected = pruned.final_states(ids, (first, entering)), pruned.final_states(ids)
    except UnsupportedModelError:
        return False
    return float((found - expected).float().norm() / expected.float().norm()) < SHARING_TOLERANCE


def block_parameters(surgery: Surgery, pruned: Any) -> dict[str, nn.Parameter]:
    """Give the floating-point parameters of a pruned model's blocks, by the names that the dense model has for them."""
    path, blocks = surgery.architecture.adapter.blocks_path, surgery.architecture.blocks_of(pruned)
    return {
        f"{path}.{old}.{name}": parameter
        for new, old in enumerate(surgery.kept.blocks)
        for name, parameter in blocks[new].named_parameters()
        if parameter.is_floating_point()
    }


def _place(pruned: Any, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Put values by the dense model's names into the pruned one; outside of the blocks, both have the same names."""
    for name, value in values.items():
        parameter = parameters[name] if name in parameters else pruned.get_parameter(name)
        parameter.data.copy_(value)


def _begun(saved: Saved) -> _Start:
    start = {name.removeprefix("start."): value for name, value in saved.tensors.items() if name.startswith("start.")}
    return _Start(saved.tensors["held_out"], start, RecoveryRecord.model_validate_json(saved.data["record"]))


def _require_plain(architecture: Architecture) -> None:
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized: its blocks cannot be given new values.",
            hint="Recover the model that it was quantized from, and quantize the result.",
        )


def _require_memory(surgery: Surgery, dtype: torch.dtype, device: torch.device, *, heals: bool) -> None:
    """Make sure that the models fit: recovery looks at all of them, also where pruning alone needs but a buffer."""
    dense = surgery.architecture.skeleton
    needed = sum(parameter.numel() for parameter in dense.parameters()) * dtype.itemsize
    if heals:
        blocks = surgery.architecture.blocks_of(dense)
        shapes = [parameter.shape for block in surgery.kept.blocks for parameter in blocks[block].parameters()]
        # Both models, what the trained weights were, and what is trained of them.
        needed += needed + sum(map(math.prod, shapes)) * dtype.itemsize
        needed += sum(map(trained_numbers, shapes)) * TRAINING_BYTES
    free = free_bytes(device)
    if needed > free:
        what = "Healing needs the dense model and what it trains" if heals else "Recovery needs the dense model"
        raise MachineError(
            f"{what} in memory: {in_words(needed)} on {device.type}, and {in_words(free)} are free.",
            hint=f"Leave out {'--heal' if heals else '--recover'}, or take a machine with more memory.",
        )


def _resolve_settings(request: RecoveryRequest, subject: Subject) -> CalibrationSettings:
    """Fill in what the user left open, with more text than a search needs: weights are fitted to it."""
    asked, architecture = request.calibration, subject.architecture
    usual = HEAL_LENGTH if request.heal else DEFAULT_LENGTH
    length = asked.sequence_length or min(usual, architecture.longest_sequence or usual)
    source = asked.source or (_usual_source(subject.plan) if request.closed_form else SELF)
    settings = resolve_calibration(replace(asked, source=source, sequence_length=length), architecture)
    if settings.samples_were_asked or settings.source in REFERENCE_PRESETS:
        return settings
    tokens = DEFAULT_OWN_TOKENS if settings.source == SELF else DEFAULT_TOKENS
    return replace(settings, samples=max(HELD_OUT_EVERY, tokens // length))


def _usual_source(plan: Plan | None) -> str:
    """Choose the text to fit on: what the plan was searched on, and the model's own, of no special kind."""
    searched = plan.calibration if plan else None
    if searched is None or searched.chat or searched.source == SELF:
        return SELF
    source = searched.source.removesuffix("-sleb")
    return source if len(parse_mixture(source)) > 1 else f"{source}:0.75,{SELF}:0.25"


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
    rows = range(HELD_OUT_EVERY - 1, len(sequences), HELD_OUT_EVERY)
    # Drawn rather than further apart: a mixture's sources take turns, and steps may meet one of them alone.
    drawn = [rows[row] for row in draw(len(rows), max(1, HELD_OUT_TOKENS // sequences.shape[1]), seed=0)]
    held_out = torch.zeros(len(sequences), dtype=torch.bool)
    held_out[drawn] = True
    return sequences[~held_out], sequences[held_out]
